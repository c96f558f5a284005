"""The library's parts alone: in a loop of one's own, and in a Flower app of one's own."""

import math

import numpy as np
import pytest
import torch
from flwr.app import Context, RecordDict

from examples import one_machine, own_flower_app
from tests.flower_grid import ProcessGrid


def virtual_logit(classes, scale, size):
    """What a full softmax loses at first, when rows and embeddings have nothing to do with each
    other: cosines of random directions are as good as normal, of variance 1 / size."""
    return math.log(classes) + scale**2 / (2 * size)


def test_one_machine_starts_at_the_loss_of_all_classes_and_learns(capsys):
    (first,) = one_machine.main(steps=1, classes=100_000)
    # Without log q it would be that of the 1,500 classes in the sample: 4.2 less.
    assert first == pytest.approx(virtual_logit(100_000, 20, one_machine.SIZE), abs=1.0)
    assert " steps/s" in capsys.readouterr().out
    losses = one_machine.main(steps=40, classes=2000, negatives=200)
    assert np.mean(losses[-5:]) < 0.7 * losses[0]


def test_the_flower_app_sends_the_rows_asked_for_and_learns(monkeypatch, capsys):
    monkeypatch.setattr(own_flower_app, "ROUNDS", 12)
    torch.manual_seed(1)  # with 0 the first rows would be the centres of the images
    rows = []

    def see(node, message, reply):
        if message.metadata.message_type == "train":
            assert reply.has_content()
            sent, returned = (own_flower_app.unpack(m.content) for m in (message, reply))
            assert [t.shape for t in returned[:2]] == [t.shape for t in sent]
            rows.append(sent[1])
        return [reply]

    sites = {node: {"partition-id": node - 1} for node in (1, 2, 3)}
    grid = ProcessGrid(sites, see, app=own_flower_app.client)
    own_flower_app.server(grid, Context(1, 0, {}, RecordDict(), {}))
    assert len(rows) == 12 * 3
    assert {len(rows_SD) for rows_SD in rows} == {own_flower_app.OWN + 200}
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    expected = virtual_logit(own_flower_app.CLASSES, 10, own_flower_app.SIZE)
    assert losses[0] == pytest.approx(expected, abs=1.0)
    assert losses[-1] < 0.8 * losses[0]
