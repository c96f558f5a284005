"""A client's part of a round against a plain loop with torch's own optimizer."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fedss.core.algorithm import broadcast, select
from fedss.core.client import (
    LocalTraining,
    Submodel,
    batches,
    draw_classes,
    limit_own_classes,
    num_negatives,
    train_client,
)
from fedss.seeds import generator
from tests.core.test_algorithm import DATA, SGD, Model, N, engine, plan, start
from tests.reference import whole


def virtual_logits(h_BD: torch.Tensor, absent_ND: torch.Tensor) -> torch.Tensor:
    """Of rows that are Gaussian: log of number times the mean of exp(8 w'h)."""
    o_BN = 8 * h_BD @ absent_ND.T
    return math.log(len(absent_ND)) + o_BN.mean(1) + o_BN.var(1, correction=0) / 2


@pytest.mark.parametrize("method", ["fedss-published", "fedss", "full", "pos-only"])
def test_local_training_is_sgd_over_mini_batches(method):
    told = plan(method, batch_size=2, epochs=2, lr=0.1, row_lr=0.3)
    state, client = start(told=told), 3
    example_N = engine().clients.examples(client)
    label_N = DATA.train.labels[example_N]
    sample = draw_classes(told, client, limit_own_classes(told, client, label_N))
    sent = Submodel(broadcast(state, told), sample.ids_S, select(SGD, state, sample.ids_S))
    update = train_client(told, client, Model(), sent, sample, example_N, label_N)

    absent_ND = whole(state.class_rows)[np.setdiff1d(np.arange(N), sample.ids_S)]
    model = Model().embedder
    rows = sent.rows_SD.clone().requires_grad_()
    before = torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()])
    sgd = torch.optim.SGD(
        [{"params": [*model.parameters()], "lr": 0.1}, {"params": [rows], "lr": 0.3}]
    )
    losses = []
    for batch_B in batches(len(example_N), told.local, generator(told.seed, "batches", 0, client)):
        h_BD = model(torch.from_numpy(DATA.train.pixels[example_N[batch_B]]))
        o_BS = 8.0 * h_BD @ F.normalize(rows, dim=1).T
        if method == "fedss":
            o_BS = torch.cat([o_BS, virtual_logits(h_BD, absent_ND)[:, None]], dim=1)
        else:
            o_BS = o_BS - sample.log_q_S
        places = [sample.ids_S.tolist().index(label) for label in label_N[batch_B]]
        loss = F.cross_entropy(o_BS, torch.tensor(places))
        sgd.zero_grad()
        loss.backward()
        if method == "fedss":
            rows.grad /= sample.log_q_S.exp()[:, None]
        sgd.step()
        losses.append(loss.item())
    assert len(losses) > 4
    after = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    torch.testing.assert_close(update.backbone_delta_P, after - before, atol=2e-6, rtol=0)
    torch.testing.assert_close(
        update.rows_delta_SD, rows.detach() - sent.rows_SD, atol=2e-6, rtol=0
    )
    assert update.loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert update.num_examples == len(example_N)


def test_every_epoch_has_an_order_of_its_own():
    found = list(batches(20, LocalTraining(3, None, 20, 0.1, 0.1), np.random.default_rng(0)))
    assert len({tuple(order) for order in found} | {tuple(range(20))}) == 4


@pytest.mark.parametrize(
    ("method", "kept"),
    # Where negatives are sampled, one place of four is left for them.
    [("full", 8), ("fedss", 3), ("neg-only", 3), ("pos-only", 4), ("fedaws", 4), ("moments", 4)],
)
def test_how_many_own_classes_a_client_brings(method, kept):
    assert len(limit_own_classes(plan(method, 4, cover=2), 0, np.arange(8))) == kept


def test_there_are_no_more_negatives_than_other_classes():
    assert num_negatives(plan("fedss", N + 5), 3) == N - 3
    assert num_negatives(plan("fedss", 7), 3) == 4
    assert num_negatives(plan("moments", 4, cover=2), 3) == 2
    assert num_negatives(plan("moments", 4, cover=50), 3) == N - 3
    assert num_negatives(plan("pos-only", 7), 3) == 0
    assert num_negatives(plan("full", 4), 3) == N - 3
