"""Requests that are the same for all clients of a round: ``all`` rows, and a ``common`` set."""

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import fedss
from fedss.choices import SAMPLED_METHODS
from fedss.core import client as of_client
from fedss.core.algorithm import Server, draw_cohort, run_round
from fedss.core.client import (
    Broadcast,
    ClientUpdate,
    RoundPlan,
    Submodel,
    common_classes,
    prepare,
    request_classes,
    shared_classes,
    train_client,
)
from fedss.core.optimizers import ServerOptimizer
from fedss.core.state import ServerState
from fedss.data import index_clients
from fedss.engines.local import LocalEngine, local_engine
from fedss.losses.moments import payload, row_sums
from fedss.losses.softmax import ClassSample
from fedss.sampling.samplers import whole_sample
from fedss.training.summary import costs
from fedss.wire.downlink import receive
from fedss.wire.messages import (
    WireFormat,
    encode_answer,
    encode_request,
    encode_update,
    encoded_size,
)
from tests.core.test_algorithm import DATA, MOMENTUM, SGD, Model, N, engine, plan, start
from tests.reference import TINY, whole

LABELS, CLIENTS = DATA.train.labels, index_clients(DATA.train)
SECRET = b"s" * 32


def labels_of(client: int) -> np.ndarray:
    found: np.ndarray = LABELS[CLIENTS.examples(client)]
    return found


@contextmanager
def local(
    optimizer: ServerOptimizer, stack: int = 1, workers: int = 2, **wire: Any
) -> Iterator[LocalEngine]:
    model = Model().embedder
    form = WireFormat(tuple(p.shape for p in model.parameters()), 6, N, **wire)
    with local_engine(model, CLIENTS, optimizer, form, workers, stack=stack) as threads:
        yield threads


def run(told: RoundPlan, optimizer: ServerOptimizer = MOMENTUM, **how: Any) -> ServerState:
    """Four rounds on the local engine."""
    state = start(optimizer, told)
    with local(optimizer, **how) as threads:
        for round in range(4):
            cohort = draw_cohort(6, 3, 3, round)
            now = replace(told, round=round)
            state, *_ = run_round(Server(optimizer), threads, state, now, cohort)
    return state


def tensors(state: ServerState) -> list[torch.Tensor]:
    rows = state.class_rows
    kept = [*rows.slots.values(), *state.backbone_slots.values(), rows.updated_N]
    return [state.backbone_P, whole(rows), *kept]


OPTIMIZERS = {"sgd": SGD, "momentum": MOMENTUM, "adam": ServerOptimizer("adam", 0.05)}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("sampler", ["uniform", "sticky"])
@pytest.mark.parametrize("method", SAMPLED_METHODS)
def test_all_trains_as_own_does_bit_for_bit(method, sampler, optimizer):
    """Rows that nobody trained stay as they are, whoever names them."""
    told, stepped = replace(plan(method, 5, sampler), secret=SECRET), OPTIMIZERS[optimizer]
    own, all_rows = run(told, stepped), run(replace(told, requests="all"), stepped)
    assert own.class_rows.updated_N.min() < 4  # not all rows are touched in each round
    assert all(map(torch.equal, tensors(own), tensors(all_rows)))


def test_all_is_own_to_the_rounding_of_its_messages():
    told = plan("fedss", 7)
    exact = run(told, SGD).backbone_P
    moved = (exact - start(SGD).backbone_P).norm()
    int8 = {"rows_down": "int8", "rows_up": "int8"}
    of_own, of_all = (run(replace(told, requests=r), SGD, **int8) for r in ("own", "all"))
    assert (of_own.backbone_P - of_all.backbone_P).norm() < 0.02 * moved
    # A row that no client trained is still exactly zero in what is sent, and stays.
    assert torch.equal(of_own.class_rows.updated_N, of_all.class_rows.updated_N)


@pytest.mark.parametrize("requests", ["all", "common"])
def test_a_stack_of_clients_is_each_for_itself(requests):
    told = replace(plan("fedss", 3), requests=requests)
    for one, other in zip(tensors(run(told)), tensors(run(told, stack=3)), strict=True):
        assert (one - other).abs().max() < 1e-4


@pytest.mark.parametrize("method", SAMPLED_METHODS)
def test_a_set_of_all_classes_is_the_full_sample(method):
    """And so ``full`` itself, but for neg-only, which leaves own classes out of the sum."""
    common = run(replace(plan(method, N), requests="common"))
    reference = run(plan("neg-only" if method == "neg-only" else "full", N))
    assert all(map(torch.equal, tensors(common)[:2], tensors(reference)[:2]))


def messages(told: RoundPlan, monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict, dict]]:
    """What each of six clients asks for, and sends."""
    requests, updates = [], []

    def ask(wire: WireFormat, ids_S: torch.Tensor) -> Any:
        requests.append(encode_request(wire, ids_S))
        return requests[-1]

    def send(*of_update: Any) -> Any:
        updates.append(encode_update(*of_update))
        return updates[-1]

    monkeypatch.setattr("fedss.engines.local.encode_request", ask)
    monkeypatch.setattr("fedss.engines.local.encode_update", send)
    with local(MOMENTUM, workers=1, rows_up="int8") as threads:
        found = list(threads.train(start(MOMENTUM, told), np.arange(6), told))
    for update, request, sent in zip(found, requests, updates, strict=True):
        up = encoded_size(request) + encoded_size(sent)
        assert update.traffic["bytes_up"] == up
        assert update.traffic["class_row_bytes_up"] == len(update.ids_S) * (6 + 2)
        assert update.traffic["class_row_bytes_down"] == len(update.ids_S) * 6 * 4
    return list(zip(requests, updates, strict=True))


@pytest.mark.parametrize(("requests", "rows"), [("all", N), ("common", 2)])
def test_messages_of_all_clients_are_alike(requests, rows, monkeypatch):
    """What they ask for and name, its shapes and bytes; also where there is nothing to say."""
    told = replace(plan("fedss", 2 if requests == "common" else 5), requests=requests)
    asked = [request_classes(told, k, labels_of(k)) for k in range(6)]
    idle = [len(request.own_P) == 0 for request in asked]
    assert any(idle) == (requests == "common")
    first, *others = messages(told, monkeypatch)
    assert len(first[1]["class_rows.scale"]) == rows
    for kind in (0, 1):
        for other in others:
            assert other[kind].keys() == first[kind].keys()
            for name, tensor in first[kind].items():
                same = other[kind][name]
                assert (same.dtype, same.shape) == (tensor.dtype, tensor.shape)
                assert name != "ids" or torch.equal(same, tensor)
    own = [request.ids_S for request in map(plain_request, range(6))]
    assert not all(torch.equal(own[0], ids_S) for ids_S in own)


def plain_request(client: int) -> Any:
    return request_classes(plan("fedss", 5), client, labels_of(client))


def test_the_set_of_a_round_is_known_to_all_and_to_no_secret():
    told = replace(plan("fedss", 5), requests="common")
    sets = [common_classes(replace(told, round=r)) for r in range(400)]
    assert all((np.diff(ids_C) > 0).all() and len(ids_C) == 5 for ids_C in sets)
    times = np.bincount(np.concatenate(sets), minlength=N)
    # Six standard deviations.
    assert (abs(times - 400 * 5 / N) < 6 * (400 * 5 / N * (1 - 5 / N)) ** 0.5).all()
    assert np.array_equal(sets[0], common_classes(replace(told, secret=SECRET)))
    assert not np.array_equal(sets[0], common_classes(replace(told, seed=4)))
    assert shared_classes(replace(told, requests="own")) is None


def test_who_has_no_class_in_the_set_changes_nothing():
    told = replace(plan("fedss", 2, steps=3), requests="common")
    idle = [k for k in range(6) if not np.isin(common_classes(told), labels_of(k)).any()]
    with local(MOMENTUM) as threads:
        (update,) = threads.train(start(MOMENTUM, told), np.array(idle[:1]), told)
        assert not update.backbone_delta_P.any()
        assert not update.rows_delta_SD.any()
        assert (update.num_examples, update.loss) == (len(labels_of(idle[0])), 0.0)
        state = start(MOMENTUM, told)
        before = tensors(state)[:2]
        state, *_ = run_round(Server(MOMENTUM), threads, state, told, np.array(idle))
    assert all(map(torch.equal, before, tensors(state)[:2]))
    assert not state.class_rows.updated_N.any()


def test_over_all_sets_an_update_stands_for_all_images(monkeypatch):
    """Each own class as often as its images say; and the number that is sent says nothing."""
    client, m = 1, 4
    told = replace(plan("fedss", m), requests="common")
    label_N, example_N = labels_of(client), CLIENTS.examples(client)
    total, sets = np.zeros(N), list(itertools.combinations(range(N), m))
    rows_ND = torch.nn.functional.normalize(torch.randn(N, 6), dim=1)
    sent = Broadcast(Model().theta_P, payload(row_sums(rows_ND)))
    for ids_C in sets:
        monkeypatch.setattr(of_client, "common_classes", lambda told, c=ids_C: np.array(c))
        sample = request_classes(told, client, label_N).sample
        submodel = Submodel(sent, sample.ids_S, rows_ND[sample.ids_S])
        device = torch.device("cpu")
        learner = prepare(told, client, submodel, sample, example_N, label_N, device)
        assert learner.num_examples == len(label_N)
        used_N = np.isin(label_N, ids_C)
        if used_N.any():
            share = learner.weight / used_N.sum()
            total += share * np.bincount(label_N[used_N], minlength=N)
    expected = np.bincount(label_N, minlength=N) / len(label_N)
    assert total / len(sets) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("labels", [(1, 1), (1, 4)])
def test_over_all_sets_a_step_is_that_of_full(labels, monkeypatch):
    """Where absent rows are all alike, so that the sum is known: the backbone and rows that are not
    own move as under ``full``. So does an own row, but that images of another own class push it
    only where the set has both.
    """
    n, m, label_N, example_N = 6, 4, np.array(labels), np.array([0, 9])
    rows_ND = torch.nn.functional.normalize(torch.ones(n, 6), dim=1)
    if labels == (1, 1):
        rows_ND[1] = torch.eye(6)[2]
    sent = Broadcast(Model().theta_P, payload(row_sums(rows_ND)))

    def step(told: RoundPlan, sample: ClassSample) -> ClientUpdate:
        submodel = Submodel(sent, sample.ids_S, rows_ND[sample.ids_S])
        return train_client(told, 0, Model(), submodel, sample, example_N, label_N)

    told = replace(plan("full", batch_size=9), num_classes=n)
    full = step(told, whole_sample(np.unique(label_N), n))
    told = replace(plan("fedss", m, batch_size=9), num_classes=n, requests="common")
    sets = list(itertools.combinations(range(n), m))
    backbone_P, moved_ND, loss = torch.zeros(()), torch.zeros(n, 6), 0.0
    for ids_C in sets:
        monkeypatch.setattr(of_client, "common_classes", lambda told, c=ids_C: np.array(c))
        update = step(told, request_classes(told, 0, label_N).sample)
        backbone_P, loss = backbone_P + update.backbone_delta_P / len(sets), loss + update.loss
        moved_ND[update.ids_S] += update.rows_delta_SD / len(sets)
    assert loss / len(sets) == pytest.approx(full.loss, rel=1e-5)
    expected_ND = full.rows_delta_SD.clone()
    if labels == (1, 4):
        # Of a row's gradient, pi s h for each image of another label, and pi is 1 / n.
        h_BD = Model().embed(torch.from_numpy(DATA.train.pixels[example_N])).detach()
        along_BD = h_BD - (h_BD @ rows_ND[0])[:, None] * rows_ND[0]
        pushed_BD = -told.local.row_lr * told.scoring.scale * along_BD / n / 2
        expected_ND[[1, 4]] -= (n - m) / (n - 1) * pushed_BD[[1, 0]]
    else:
        assert full.backbone_delta_P.abs().max() > 1e-3
        torch.testing.assert_close(backbone_P, full.backbone_delta_P, atol=1e-6, rtol=1e-4)
    assert expected_ND.abs().min(dim=0).values.max() > 1e-3
    torch.testing.assert_close(moved_ND, expected_ND, atol=1e-6, rtol=1e-4)


def test_a_client_takes_no_other_set_than_that_of_the_round():
    told = replace(plan("fedss", 5), requests="common")
    request, form = request_classes(told, 1, labels_of(1)), WireFormat((), 6, N)
    sent = Broadcast(torch.zeros(0))
    for ids_C, right in ((common_classes(told), True), (np.arange(5), False)):
        answer = encode_answer(form, torch.from_numpy(ids_C), torch.randn(5, 6), None)
        if right:
            submodel, sample = receive(form, request, sent, answer)
            assert torch.equal(submodel.rows_SD, answer["class_rows.values"])
            assert torch.equal(sample.ids_S, torch.from_numpy(ids_C))
            continue
        with pytest.raises(ValueError, match="rows of other classes"):
            receive(form, request, sent, answer)


@pytest.mark.parametrize("requests", ["all", "common"])
def test_a_run_goes_on_with_the_same_bits(requests, tmp_path):
    config = replace(TINY, requests=requests, sample_size=10, class_row_lr=1.0, eval_every=0)
    config = replace(config, lr_schedule="constant")
    quiet: dict[str, Any] = {"on_round": lambda record: None}
    fedss.train(config, tmp_path / "two", **quiet)
    longer = replace(config, rounds=4)
    grown = fedss.train(longer, tmp_path / "two", **quiet)
    at_once = fedss.train(longer, tmp_path / "four", **quiet)
    ours, theirs = grown.embedder.state_dict(), at_once.embedder.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("requests", ["all", "common"])
def test_what_info_says_beforehand_is_what_a_run_moves(requests, tmp_path):
    told = replace(TINY, requests=requests, sample_size=10, rounds=1, clients_per_round=8)
    data = fedss.load_data(told)
    run = fedss.train(told, tmp_path / "run", data=data, on_round=lambda record: None)
    (cost,) = [c for c in costs(told, data, run.embedder) if c.method == "fedss"]
    record = json.loads((run.folder / "records.jsonl").read_text())
    moved = [record[name] / 8 for name in ("class_rows", "bytes_down", "bytes_up")]
    assert [cost.class_rows, cost.bytes_down, cost.bytes_up] == pytest.approx(moved)
    assert cost.class_rows == (32 if requests == "all" else 10)


def test_the_plain_loop_is_the_local_engine():
    told = replace(plan("fedss", 5), requests="common")
    plain = list(engine(MOMENTUM).train(start(MOMENTUM, told), np.arange(6), told))
    with local(MOMENTUM) as threads:
        threaded = list(threads.train(start(MOMENTUM, told), np.arange(6), told))
    for one, other in zip(plain, threaded, strict=True):
        assert torch.equal(one.backbone_delta_P, other.backbone_delta_P)
        assert torch.equal(one.rows_delta_SD, other.rows_delta_SD)
        assert (one.num_examples, one.loss) == (other.num_examples, other.loss)
