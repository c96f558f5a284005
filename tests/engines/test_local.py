import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fedss.core.algorithm import Server, broadcast, run_round
from fedss.core.client import train_client
from fedss.core.engine import Engine
from fedss.data import index_clients
from fedss.engines.local import Replica, intra_op_threads, local_engine
from fedss.models import build_embedder, embed_pixels, flatten_
from fedss.sampling.samplers import SAMPLERS
from fedss.wire.codec import decode_rows, encode_rows
from fedss.wire.messages import WireFormat, decode_broadcast, encode_broadcast, encode_request
from tests.core.test_algorithm import DATA, MOMENTUM, Model, N, PlainEngine, engine, plan, start
from tests.reference import whole


def local(workers: int = 2, **wire: str):
    model = Model().embedder
    layout = tuple(p.shape for p in model.parameters())
    return local_engine(
        model, index_clients(DATA.train), MOMENTUM, WireFormat(layout, 6, N, **wire), workers
    )


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize(
    ("method", "sampler"),
    [
        *(
            (method, "uniform")
            for method in ("full", "pos-only", "fedaws", "moments", "local-heads")
        ),
        *(("fedss", sampler) for sampler in SAMPLERS),
    ],
)
def test_threads_give_the_bits_of_the_plain_loop(workers, method, sampler):
    told, cohort = plan(method, sampler=sampler), np.arange(6)
    state = start(MOMENTUM, told)
    plain = list(engine(MOMENTUM).train(state, cohort, told))
    with local(workers) as threads:
        threaded = list(threads.train(state, cohort, told))
    assert [u.client for u in threaded] == [u.client for u in plain]
    for one, other in zip(plain, threaded, strict=True):
        assert torch.equal(one.backbone_delta_P, other.backbone_delta_P)
        assert torch.equal(one.ids_S, other.ids_S)
        assert torch.equal(one.rows_delta_SD, other.rows_delta_SD)
        assert (one.num_examples, one.loss) == (other.num_examples, other.loss)


def own_network() -> nn.Sequential:
    """As one would write it: the engine runs it in channels_last, its pool before its ReLU."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.GroupNorm(2, 16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(256, 6),
    )


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("network", [own_network, lambda: "conv4-8"])
@pytest.mark.parametrize("method", ["full", "fedss", "moments"])
def test_what_is_fast_trains_as_what_is_plain(method, network, layout):
    """Three rounds end where a loop over clients ends that takes the network as it was written.

    With the same bits, where images lie in memory as they do there. Elsewhere operations round
    in another order, each processor in its own; a pixel that ties in a pool goes another way, and
    the difference grows with each step: it is held against how far training moved.
    """
    embedder = build_embedder(network(), channels=1, image_size=8, embedding_size=6, seed=0)
    assert embedder.channels_last == (network is own_network)
    as_written = copy.deepcopy(embedder)
    as_written.channels_last = False
    embedder.channels_last &= layout == "channels_last"
    flat = flatten_(as_written)
    replica = Replica(as_written, flat.theta_P, flat.grad_P, DATA.train.pixels)
    theta_P, clients = flat.theta_P.clone(), index_clients(DATA.train)
    wire = WireFormat(tuple(p.shape for p in embedder.parameters()), 6, N)

    told, slots = plan(method), {"momentum": torch.zeros_like(theta_P)}
    first = replace(start(MOMENTUM, told), backbone_P=theta_P, backbone_slots=slots)
    begin = theta_P.clone(), whole(first.class_rows).clone()

    def train(where: Engine) -> tuple[torch.Tensor, torch.Tensor]:
        state = replace(start(MOMENTUM, told), backbone_P=theta_P, backbone_slots=slots)
        for round in range(3):
            now = replace(told, round=round)
            state, *_ = run_round(Server(MOMENTUM), where, state, now, np.arange(6))
        return state.backbone_P, whole(state.class_rows)

    with intra_op_threads(1):
        plain = train(PlainEngine(clients, MOMENTUM, replica))
    with local_engine(embedder, clients, MOMENTUM, wire, 2) as engine:
        fast = train(engine)
    assert (plain[0] - theta_P).abs().max() > 0.01
    for ours, theirs, before in zip(fast, plain, begin, strict=True):
        if embedder.channels_last:
            assert (ours - theirs).norm() < 2e-3 * (theirs - before).norm()
        else:
            assert torch.equal(ours, theirs)


def near(value: torch.Tensor, step: float) -> bool:
    return bool(((value / step - (value / step).round()).abs() < 1e-3).all())


def test_a_client_works_with_what_it_decodes(monkeypatch):
    """Rows, backbone and moments that reach a client are those of the wire, and so is its reply."""
    seen, sent = {}, {}

    def spy(plan, client, model, submodel, *rest):
        seen[client] = submodel
        sent[client] = train_client(plan, client, model, submodel, *rest)
        return sent[client]

    monkeypatch.setattr("fedss.engines.local.train_client", spy)
    int4 = dict.fromkeys(("rows_down", "rows_up", "backbone_down", "backbone_up"), "int4")
    told = plan("moments")
    state = start(MOMENTUM, told)
    with local(1, **int4) as threads:
        format_ = threads.wire
        updates = list(threads.train(state, np.arange(6), told))
    for update in updates:
        submodel, exact = seen[update.client], sent[update.client]
        rows = whole(state.class_rows)[submodel.ids_S]
        assert torch.equal(
            submodel.rows_SD, decode_rows(encode_rows(rows, "int4", None), rows.shape[1], "int4")
        )
        assert not torch.equal(submodel.rows_SD, rows)
        to_all = decode_broadcast(format_, encode_broadcast(format_, broadcast(state, told)))
        assert torch.equal(submodel.broadcast.backbone_P, to_all.backbone_P)
        assert not torch.equal(to_all.backbone_P, state.backbone_P)
        covariance_DD = submodel.broadcast.payload["covariance"]
        assert torch.equal(covariance_DD, to_all.payload["covariance"])
        for row, original in zip(update.rows_delta_SD, exact.rows_delta_SD, strict=True):
            scale = encode_rows(original[None], "int4", None)["scale"].item()
            assert near(row, scale)
            assert (row - original).abs().max() <= scale * 1.001
        assert not torch.equal(update.backbone_delta_P, exact.backbone_delta_P)


def test_each_client_and_round_rounds_for_itself(monkeypatch):
    """Were the noise shared, it would not average out over clients."""

    def same_delta(plan, client, model, submodel, *rest):
        return replace(
            train_client(plan, client, model, submodel, *rest),
            backbone_delta_P=torch.linspace(-1, 1, len(submodel.broadcast.backbone_P)),
        )

    monkeypatch.setattr("fedss.engines.local.train_client", same_delta)
    told, state = plan(), start(MOMENTUM)
    with local(1, backbone_up="int4") as threads:
        found = [
            update.backbone_delta_P
            for round in range(2)
            for update in threads.train(state, np.arange(3), replace(told, round=round))
        ]
    for i, one in enumerate(found):
        assert not any(torch.equal(one, other) for other in found[i + 1 :])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_a_client_asks_for(monkeypatch, sampler):
    """Own classes alone where the server draws; all of its sample where it draws for itself."""
    asked = []

    def spy(wire, ids_S):
        asked.append(ids_S.tolist())
        return encode_request(wire, ids_S)

    monkeypatch.setattr("fedss.engines.local.encode_request", spy)
    told = plan("fedss", sampler=sampler)
    state = start(MOMENTUM, told)
    with local(1) as threads:
        samples = [
            [update.ids_S.tolist() for update in threads.train(state, np.arange(6), now)]
            for now in (told, replace(told, round=1))
        ]
        labels = DATA.train.labels
        own = [np.unique(labels[threads.clients.examples(k)]).tolist() for k in range(6)]
    if SAMPLERS[sampler].drawn_by == "server":
        assert asked == own * 2
    else:
        assert asked == samples[0] + samples[1]
    assert (samples[0] == samples[1]) == (sampler == "sticky")


def test_embedding_in_blocks_is_embedding_at_once():
    model = Model().embedder
    theta = Model().theta_P
    with local() as threads:
        ours = threads.workers.embed(theta, DATA.train.pixels, block=7)
    assert (ours - embed_pixels(model, DATA.train.pixels)).abs().max() < 1e-6


def test_a_failing_client_raises_and_the_engine_goes_on():
    state, told = start(MOMENTUM), plan("fedss")
    with local() as threads:
        with pytest.raises(IndexError):
            list(threads.train(state, np.array([0, 99]), told))
        assert len(list(threads.train(state, np.arange(6), told))) == 6


def test_the_number_of_torch_threads_is_put_back():
    before = torch.get_num_threads()
    with intra_op_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
