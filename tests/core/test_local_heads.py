"""Class rows that stay with the clients: ``local-heads``."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import fedss
from fedss.core.algorithm import Server, broadcast, run_round
from fedss.core.client import RoundPlan, Submodel, batches, request_classes, train_client
from fedss.core.defence import Defence
from fedss.core.optimizers import ServerOptimizer
from fedss.core.state import ServerState
from fedss.data import index_clients
from fedss.engines.local import LocalEngine, local_engine
from fedss.errors import ConfigError
from fedss.losses.methods import METHODS
from fedss.seeds import generator
from fedss.settings import resolve
from fedss.training.build import build_model
from fedss.training.summary import costs, notes
from fedss.wire.messages import WireFormat
from tests.core.test_algorithm import DATA, MOMENTUM, Model, N, plan, start
from tests.reference import TINY

LABELS, CLIENTS = DATA.train.labels, index_clients(DATA.train)
NONE = torch.zeros(0, dtype=torch.int64)


def heads(**local: Any) -> RoundPlan:
    return plan("local-heads", **local)


def by_hand(told: RoundPlan, client: int) -> tuple[torch.Tensor, float]:
    """The change of the backbone and the mean loss, by a loop with torch's own optimizers."""
    example_N = CLIENTS.examples(client)
    label_N = LABELS[example_N].tolist()
    own = sorted(set(label_N))
    model, scale = Model().embedder.double(), told.scoring.scale
    before = [p.detach().clone() for p in model.parameters()]

    def embed(places: Any) -> torch.Tensor:
        pixels = torch.from_numpy(DATA.train.pixels[example_N[places]])
        scaled = (pixels.double() / 255 - model.mean) / model.std
        return F.normalize(model.projection(model.backbone(scaled)), dim=1)

    def loss_of(h_BD: torch.Tensor, places: Any) -> torch.Tensor:
        o_BP = scale * torch.stack([F.cosine_similarity(h_BD, row[None]) for row in rows], 1)
        return F.cross_entropy(o_BP, torch.tensor([own.index(label_N[i]) for i in places]))

    with torch.no_grad():
        h_ND = torch.stack([embed([i])[0] for i in range(len(label_N))])
    rows = []
    for label in own:
        total = sum(h for h, other in zip(h_ND, label_N, strict=True) if other == label)
        rows.append((total / total.norm()).clone().requires_grad_())
    of_both = torch.optim.SGD(
        [{"params": [*model.parameters()], "lr": told.local.lr}, {"params": rows}],
        told.local.row_lr,
    )
    losses, rng = [], generator(told.seed, "batches", told.round, client)
    for batch_B in batches(len(example_N), told.local, rng):
        of_both.zero_grad()
        loss = loss_of(embed(batch_B), batch_B)
        loss.backward()
        of_both.step()
        losses.append(loss.item())
    after = zip(model.parameters(), before, strict=True)
    return torch.cat([(p.detach() - b).reshape(-1) for p, b in after]), float(np.mean(losses))


def trained(told: RoundPlan, client: int, example_N: np.ndarray | None = None) -> Any:
    example_N = CLIENTS.examples(client) if example_N is None else example_N
    label_N, state = LABELS[example_N], start(told=told)
    sample = request_classes(told, client, label_N).sample
    sent = Submodel(broadcast(state, told), NONE, torch.zeros(0, 6))
    assert sample is not None
    return train_client(told, client, Model(), sent, sample, example_N, label_N)


@pytest.mark.parametrize("local", [{"epochs": 2}, {"steps": 1}], ids=str)
def test_it_is_a_plain_loop_over_rows_of_means(local):
    told = heads(batch_size=2, lr=0.1, row_lr=0.3, **local)
    for client in range(4):
        update = trained(told, client)
        delta_P, loss = by_hand(told, client)
        off = (update.backbone_delta_P - delta_P).norm()
        assert off < 1e-4 * delta_P.norm() + 2e-6
        assert update.loss == pytest.approx(loss, rel=1e-4, abs=1e-6)
        assert update.backbone_delta_P.norm() > 1e-3


def test_one_class_leaves_nothing_to_tell_apart():
    example_N = CLIENTS.examples(0)
    alone_N = example_N[LABELS[example_N] == LABELS[example_N[0]]]
    update = trained(heads(), 0, alone_N)
    assert not update.backbone_delta_P.any()
    assert update.loss == 0


@contextmanager
def engine(optimizer: ServerOptimizer, stack: int = 1, **wire: Any) -> Iterator[LocalEngine]:
    model = Model().embedder
    form = WireFormat(tuple(p.shape for p in model.parameters()), 6, N, **wire)
    with local_engine(model, CLIENTS, optimizer, form, 1, stack=stack) as threads:
        yield threads


def rounds(told: RoundPlan, state: ServerState, **how: Any) -> tuple[ServerState, list[Any]]:
    sent = []
    with engine(MOMENTUM, **how) as threads:
        for round in range(3):
            now = replace(told, round=round)
            state, updates, _ = run_round(Server(MOMENTUM), threads, state, now, np.arange(6))
            sent += updates
    return state, sent


@pytest.mark.parametrize("rows", ["float32", "int8", "int4"])
@pytest.mark.parametrize("stack", [1, 3])
def test_nothing_of_class_rows_travels(stack, rows):
    told, state = heads(), start(MOMENTUM, heads())
    after, sent = rounds(told, state, stack=stack, rows_down=rows, rows_up=rows)
    for update in sent:
        assert update.ids_S.shape == (0,)
        assert update.rows_delta_SD.shape == (0, 6)
        assert update.traffic["class_row_bytes_down"] == update.traffic["class_row_bytes_up"] == 0
    # Messages are of one size, whatever a client has.
    assert len({tuple(update.traffic.items()) for update in sent}) == 1
    assert not after.class_rows.updated_N.any()
    assert not after.class_rows.weight_ND.any()
    # Whatever the server's table had, nobody read it.
    spoilt = start(MOMENTUM, told)
    spoilt.class_rows.weight_ND.fill_(torch.nan)
    spoilt.class_rows.updated_N.fill_(1)
    other, _ = rounds(told, spoilt, stack=stack, rows_down=rows, rows_up=rows)
    assert torch.equal(other.backbone_P, after.backbone_P)
    assert not torch.equal(after.backbone_P, state.backbone_P)


@pytest.mark.parametrize("aggregate", ["trimmed", "median"])
def test_a_server_can_defend_itself(aggregate):
    with engine(MOMENTUM) as threads:
        server = Server(MOMENTUM, defence=Defence(3.0, 2.0, aggregate))
        state = start(MOMENTUM, heads())
        state, updates, failures = run_round(server, threads, state, heads(), np.arange(6))
    assert (len(updates), failures) == (6, [])
    each = torch.stack([update.backbone_delta_P for update in updates])
    moved = state.backbone_P - start(MOMENTUM, heads()).backbone_P
    lowest, highest = each.min(dim=0).values, each.max(dim=0).values
    assert ((moved >= lowest - 1e-6) & (moved <= highest + 1e-6)).all()


def test_a_request_is_the_same_whatever_a_client_has():
    for size in (2, 7, N):
        told = replace(heads(), sample_size=size)
        asked = [request_classes(told, k, LABELS[CLIENTS.examples(k)]) for k in range(6)]
        assert all(len(request.ids_S) == 0 for request in asked)
        # Its classes are all used: there is no sample to fill.
        for k, request in enumerate(asked):
            assert request.own_P.tolist() == sorted({*LABELS[CLIENTS.examples(k)].tolist()})


def test_what_info_says_of_it():
    data = fedss.load_data(TINY)
    found = {c.method: c for c in costs(TINY, data, build_model(TINY, data, None))}["local-heads"]
    assert (found.class_rows, found.share, found.row_bytes) == (0, 0, 0)
    config, _ = resolve(replace(TINY, method="local-heads", projection_init="whitened"), None)
    assert config.rows_init == "random"
    assert config.class_row_lr == METHODS["local-heads"].class_row_lr


def test_clients_of_one_class_are_told_of(tmp_path):
    config = replace(TINY, method="local-heads")
    alone = replace(config, partition="class")
    with pytest.raises(ConfigError, match="local-heads has clients tell their own classes apart"):
        fedss.train(alone, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    fedss.train(replace(alone, method="fedss", rounds=1), tmp_path / "run")
    assert not [note for note in notes(config, fedss.load_data(config)) if "one class" in note]
    few = replace(config, client_classes=4, glyphs_classes=45)
    alone_at = [note for note in notes(few, fedss.load_data(few)) if "learn nothing" in note]
    assert len(alone_at) <= 1
