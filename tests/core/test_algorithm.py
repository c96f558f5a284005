"""The laws of Algorithm 1, on the plain path: a loop over clients in this thread."""

import copy
import itertools
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedss.core.algorithm import (
    Server,
    aggregate,
    apply_update,
    broadcast,
    deal_classes,
    draw_cohort,
    run_round,
    select,
    step_all_rows_,
)
from fedss.core.class_rows import create_class_rows, with_sums, write_
from fedss.core.client import (
    ClientUpdate,
    LocalTraining,
    RoundPlan,
    Submodel,
    batches,
    draw_classes,
    limit_own_classes,
    request_classes,
    train_client,
)
from fedss.core.optimizers import ServerOptimizer, current_rows
from fedss.core.state import ServerState
from fedss.data import ClientIndex, index_clients
from fedss.distributed import ALONE, Ranks
from fedss.errors import DivergedError
from fedss.losses.methods import METHODS
from fedss.losses.softmax import ClassSample, Scoring, spread_out_step
from fedss.models import build_embedder, flatten_
from fedss.sampling.samplers import SAMPLERS
from fedss.seeds import generator
from tests import reference
from tests.reference import whole

DATA = reference.tiny_dataset()
N = len(DATA.train.class_names)
SGD = ServerOptimizer("sgd", 1.0, normalize_rows=False)
MOMENTUM = ServerOptimizer("momentum", 1.0, 0.9)


class Model:
    """A trainable copy of the tiny backbone in float32."""

    def __init__(self) -> None:
        self.embedder = build_embedder(
            reference.tiny_backbone(), channels=1, image_size=8, embedding_size=6, seed=0
        )
        flat = flatten_(self.embedder)
        self.theta_P, self.grad_P = flat.theta_P, flat.grad_P

    def images(self, example: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(DATA.train.pixels[example])

    def embed(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        return self.embedder(pixels_BCHW)


@dataclass(frozen=True)
class PlainEngine:
    clients: ClientIndex
    optimizer: ServerOptimizer
    model: Model
    reverse: bool = False
    ranks: Ranks = ALONE

    def num_clients(self, round: int) -> int:
        return self.clients.num_clients

    def train(
        self, state: ServerState, cohort: np.ndarray, plan: RoundPlan
    ) -> Iterator[ClientUpdate]:
        labels_N = self.clients.images.labels
        asked_K = [
            request_classes(plan, k, labels_N[self.clients.examples(k)]) for k in cohort.tolist()
        ]
        samples = [asked.sample for asked in asked_K]
        if plan.sampler.drawn_by == "server":
            samples = deal_classes(plan, state, [asked.own_P for asked in asked_K])
        chosen = zip(cohort.tolist(), samples, strict=True)
        for client, sample in reversed(list(chosen)) if self.reverse else chosen:
            example_N = self.clients.examples(client)
            ids_S = torch.arange(0) if plan.method.local_rows else sample.ids_S
            rows_SD = select(self.optimizer, state, ids_S)
            submodel = Submodel(broadcast(state, plan), ids_S, rows_SD)
            yield train_client(
                plan, client, self.model, submodel, sample, example_N, labels_N[example_N]
            )


def engine(optimizer: ServerOptimizer = SGD, reverse: bool = False) -> PlainEngine:
    return PlainEngine(index_clients(DATA.train), optimizer, Model(), reverse)


def start(optimizer: ServerOptimizer = SGD, told: RoundPlan | None = None) -> ServerState:
    """A server's first state, with what the method of ``told`` keeps."""
    theta_P, told = Model().theta_P, told or plan()
    rows = create_class_rows(N, 6, optimizer.slots, 0)
    if told.method.moments:
        rows = with_sums(rows)
    slots = {name: torch.zeros_like(theta_P) for name in optimizer.slots}
    return ServerState(theta_P.clone(), slots, rows, 0)


def plan(
    method: str = "fedss", size: int = 7, sampler: str = "uniform", cover: int = 0, **local: object
) -> RoundPlan:
    settings = {"epochs": 1, "steps": None, "batch_size": 3, "lr": 0.1, "row_lr": 0.5, **local}
    return RoundPlan(
        0,
        3,
        METHODS[method],
        SAMPLERS[sampler],
        N,
        size,
        cover,
        Scoring(8.0),
        LocalTraining(**settings),
    )


def run(
    method: str,
    size: int,
    rounds: int,
    optimizer: ServerOptimizer = MOMENTUM,
    sampler: str = "uniform",
    **kw: bool,
) -> ServerState:
    told = plan(method, size, sampler)
    state, where = start(optimizer, told), engine(optimizer, **kw)
    for round in range(rounds):
        cohort = draw_cohort(6, 3, 3, round)
        state, *_ = run_round(Server(optimizer), where, state, replace(told, round=round), cohort)
    return state


def same(a: ServerState, b: ServerState) -> bool:
    return torch.equal(a.backbone_P, b.backbone_P) and torch.equal(
        whole(a.class_rows), whole(b.class_rows)
    )


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_full_is_the_limit_bit_for_bit(sampler):
    assert same(run("fedss", N, 4, sampler=sampler), run("full", 7, 4))
    assert not same(run("fedss", 7, 4, sampler=sampler), run("full", 7, 4))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_order_of_arrival_does_not_change_a_bit(sampler):
    assert same(
        run("fedss", 7, 4, sampler=sampler), run("fedss", 7, 4, sampler=sampler, reverse=True)
    )


def test_one_client_one_step_all_classes_is_central_sgd():
    state, where = start(), engine()
    client, lr, row_lr = 2, 0.1, 0.5
    one_step = plan("full", batch_size=1000)
    after, *_ = run_round(Server(SGD), where, state, one_step, np.array([client]))

    fresh = start()
    model = Model().embedder
    rows = whole(fresh.class_rows).clone().requires_grad_()
    examples = where.clients.examples(client)
    h = model(torch.from_numpy(DATA.train.pixels[examples]))
    labels = torch.from_numpy(DATA.train.labels[examples])
    F.cross_entropy(8.0 * h @ F.normalize(rows, dim=1).T, labels).backward()
    torch.optim.SGD(
        [{"params": model.parameters(), "lr": lr}, {"params": [rows], "lr": row_lr}]
    ).step()
    theta = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    assert (after.backbone_P - theta).abs().max() < 1e-6
    assert (whole(after.class_rows) - rows).abs().max() < 1e-6

    on_the_sphere = replace(SGD, normalize_rows=True)
    after, *_ = run_round(Server(on_the_sphere), where, start(), one_step, np.array([client]))
    assert (whole(after.class_rows) - F.normalize(rows, dim=1)).abs().max() < 1e-6


@pytest.mark.parametrize("optimizer", [SGD, MOMENTUM, ServerOptimizer("adam", 0.01)], ids=str)
def test_rows_that_nobody_asked_for_do_not_change_by_one_bit(optimizer):
    state, where = start(optimizer), engine(optimizer)
    for round in range(5):
        before = whole(state.class_rows).clone()
        cohort = draw_cohort(6, 2, 0, round)
        told = replace(plan("fedss", 5), round=round)
        state, updates, _ = run_round(Server(optimizer), where, state, told, cohort)
        touched = torch.cat([u.ids_S for u in updates]).unique()
        untouched = torch.ones(N, dtype=torch.bool)
        untouched[touched] = False
        assert untouched.any()
        assert torch.equal(whole(state.class_rows)[untouched], before[untouched])
        assert not torch.equal(whole(state.class_rows)[touched], before[touched])


def test_a_client_gets_the_rows_it_asked_for_and_nothing_else():
    state = start()
    rows_SD = select(SGD, state, torch.tensor([1, 4, 9]))
    assert torch.equal(rows_SD, whole(state.class_rows)[[1, 4, 9]])
    assert broadcast(state, plan()).backbone_P is state.backbone_P
    # No view into W travels: what a client does to its rows cannot reach the server.
    rows_SD.zero_()
    assert whole(state.class_rows)[1].any()


def test_training_a_client_leaves_what_it_was_given():
    state, where = start(), engine()
    theta, rows = state.backbone_P.clone(), whole(state.class_rows).clone()
    list(where.train(state, np.arange(6), plan()))
    assert torch.equal(state.backbone_P, theta)
    assert torch.equal(whole(state.class_rows), rows)


def test_renaming_classes_permutes_w_and_changes_nothing_else():
    """The same client, its classes under other numbers: the same update, its rows permuted."""
    state, where, told = start(), engine(), plan()
    sent = broadcast(state, told)
    permutation = generator(1, "rename").permutation(N)  # class i becomes permutation[i]
    example_N = where.clients.examples(1)
    label_N = DATA.train.labels[example_N]
    sample = draw_classes(told, 1, np.unique(label_N))
    submodel = Submodel(sent, sample.ids_S, select(SGD, state, sample.ids_S))
    before = train_client(told, 1, where.model, submodel, sample, example_N, label_N)
    new_ids = torch.from_numpy(permutation[sample.ids_S.numpy()])
    order = torch.argsort(new_ids)
    renamed = ClassSample(new_ids[order], sample.log_q_S[order], sample.own_S[order])
    weight = torch.empty_like(whole(state.class_rows))
    weight[torch.from_numpy(permutation)] = whole(state.class_rows)
    submodel = Submodel(sent, renamed.ids_S, weight[renamed.ids_S])
    after = train_client(told, 1, where.model, submodel, renamed, example_N, permutation[label_N])
    assert (after.backbone_delta_P - before.backbone_delta_P).abs().max() < 1e-6
    assert (after.rows_delta_SD - before.rows_delta_SD[order]).abs().max() < 1e-6


@st.composite
def cohorts(draw: st.DrawFn) -> list[ClientUpdate]:
    number = st.floats(-5, 5, width=32)
    updates = []
    for client in draw(st.lists(st.integers(0, 30), min_size=1, max_size=5, unique=True)):
        ids = sorted(draw(st.sets(st.integers(0, 9), min_size=1, max_size=6)))
        rows = [[draw(number), draw(number)] for _ in ids]
        updates.append(
            ClientUpdate(
                client,
                torch.tensor([draw(number) for _ in range(3)]),
                torch.tensor(ids),
                torch.tensor(rows),
                draw(st.integers(1, 50)),
                0.0,
            )
        )
    return updates


@given(cohorts(), st.sampled_from(["cohort", "holders"]))
def test_aggregate_against_the_loop(updates, row_mean):
    means = aggregate(updates, row_mean)
    backbone, rows = reference.weighted_means(updates, 10, row_mean)
    assert means.backbone_delta_P.tolist() == pytest.approx(backbone, abs=1e-6)
    assert means.ids_U.tolist() == sorted(rows)
    for i, row in zip(means.ids_U.tolist(), means.rows_delta_UD.tolist(), strict=True):
        assert row == pytest.approx(rows[i], abs=1e-6)


@given(cohorts(), st.randoms())
def test_aggregate_does_not_depend_on_the_order_of_arrival(updates, random):
    shuffled = copy.copy(updates)
    random.shuffle(shuffled)
    one, other = aggregate(updates, "cohort"), aggregate(shuffled, "cohort")
    assert torch.equal(one.backbone_delta_P, other.backbone_delta_P)
    assert torch.equal(one.rows_delta_UD, other.rows_delta_UD)


def test_what_a_row_is_divided_by():
    """The cohort: who does not hold the row counts as zero. The holders: nobody else counts."""
    updates = [
        ClientUpdate(0, torch.zeros(1), torch.tensor([0, 3]), torch.ones(2, 1), 2, 0.0),
        ClientUpdate(1, torch.zeros(1), torch.tensor([1, 3]), torch.ones(2, 1), 6, 0.0),
    ]
    assert aggregate(updates, "cohort").rows_delta_UD[:, 0].tolist() == [0.25, 0.75, 1.0]
    assert aggregate(updates, "holders").rows_delta_UD[:, 0].tolist() == [1.0, 1.0, 1.0]


def test_a_client_with_too_many_classes_uses_only_the_kept_ones_images():
    told, state = plan("fedss", 4), start()
    own = limit_own_classes(told, 0, np.repeat(np.arange(8), 2))
    sample = draw_classes(told, 0, own)
    assert len(own) == 3
    assert len(sample.ids_S) == 4
    assert sample.own_S.sum() == 3
    examples = np.array([int(np.flatnonzero(DATA.train.labels == i)[0]) for i in range(8)])
    rows_SD = select(SGD, state, sample.ids_S)
    submodel = Submodel(broadcast(state, told), sample.ids_S, rows_SD)
    update = train_client(told, 0, Model(), submodel, sample, examples, np.arange(8))
    assert update.num_examples == 3


@given(st.integers(1, 20), st.integers(1, 7), st.integers(1, 4))
def test_epochs_cover_every_example_once(examples, batch, epochs):
    local = LocalTraining(epochs, None, batch, 0.1, 0.1)
    found = list(batches(examples, local, np.random.default_rng(0)))
    assert sorted(np.concatenate(found).tolist()) == sorted(list(range(examples)) * epochs)
    assert max(map(len, found)) <= batch


@given(st.integers(1, 20), st.integers(1, 7), st.integers(1, 30))
def test_local_steps_are_exactly_that_many(examples, batch, steps):
    local = LocalTraining(9, steps, batch, 0.1, 0.1)
    assert len(list(batches(examples, local, np.random.default_rng(0)))) == steps


def test_a_cohort_has_no_client_twice_and_is_keyed_by_seed_and_round():
    cohort = draw_cohort(1_000_000, 100, 0, 5)
    assert len(np.unique(cohort)) == 100
    assert np.array_equal(cohort, draw_cohort(1_000_000, 100, 0, 5))
    assert not np.array_equal(cohort, draw_cohort(1_000_000, 100, 0, 6))
    assert not np.array_equal(cohort, draw_cohort(1_000_000, 100, 1, 5))
    assert draw_cohort(4, 100, 0, 0).tolist() == [0, 1, 2, 3]


def test_divergence_names_round_and_client_and_applies_nothing():
    state, where = start(), engine()
    label = torch.tensor([DATA.train.labels[where.clients.examples(4)[0]]])
    write_(state.class_rows, label, torch.full((1, 6), float("nan")), {}, 1)
    before = state.backbone_P.clone()
    with pytest.raises(DivergedError, match="round 1, client 4"):
        run_round(Server(SGD), where, state, plan("full"), np.array([4]))
    assert torch.equal(state.backbone_P, before)


@pytest.mark.parametrize("where", ["backbone_delta_P", "rows_delta_SD"])
def test_a_finite_update_that_makes_a_slot_infinite_is_no_step(where):
    """The square of 1e22 is no float32: FedAdam's steps would be zero from then on."""
    optimizer = ServerOptimizer("adam", 1e-3)

    @dataclass(frozen=True)
    class Given:
        size: float
        ranks: Ranks = ALONE

        def train(self, state, cohort, plan):
            for update in engine(optimizer).train(state, cohort, plan):
                delta = getattr(update, where)
                yield replace(update, **{where: torch.full_like(delta, self.size)})

    state = start(optimizer)
    state, *_ = run_round(Server(optimizer), Given(1e17), state, plan(), np.arange(2))
    with pytest.raises(DivergedError, match="round 2: the server's step gave numbers"):
        run_round(Server(optimizer), Given(1e22), state, plan(), np.arange(2))


def test_fedaws_spreads_the_rows_and_keeps_what_momentum_owes():
    state, where = start(MOMENTUM), engine(MOMENTUM)
    state, *_ = run_round(Server(MOMENTUM), where, state, plan("pos-only"), np.arange(2))
    rows, slots = current_rows(MOMENTUM, state.class_rows, torch.arange(N), state.round)
    step = partial(
        spread_out_step, spread_out_weight=0.1, spread_out_margin=0.7, spread_out_neighbours=3
    )
    step_all_rows_(MOMENTUM, replace(METHODS["fedaws"], server_step=step), state)
    moved, kept = current_rows(MOMENTUM, state.class_rows, torch.arange(N), state.round)
    assert torch.equal(slots["momentum"], kept["momentum"])

    def nearest(w: torch.Tensor) -> float:
        cos = F.normalize(w, dim=1) @ F.normalize(w, dim=1).T
        return cos.fill_diagonal_(-1).max().item()

    assert nearest(moved) < nearest(rows)


def test_apply_update_returns_a_new_state():
    state = start(MOMENTUM)
    mean = aggregate(list(engine(MOMENTUM).train(state, np.arange(3), plan())), "cohort")
    theta = state.backbone_P.clone()
    after = apply_update(MOMENTUM, state, mean)
    assert torch.equal(state.backbone_P, theta)
    assert (state.round, after.round) == (0, 1)


class Made(TorchDispatchMode):
    """Counts the bytes of every new tensor that an operation gives back, and the largest."""

    total = largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = {
            t.untyped_storage().data_ptr()
            for t in tree_leaves((args, kwargs))
            if torch.is_tensor(t)
        }
        result = func(*args, **kwargs)
        for tensor in tree_leaves(result):
            if torch.is_tensor(tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.total += tensor.nbytes
                self.largest = max(self.largest, tensor.nbytes)
        return result


@pytest.mark.parametrize(
    ("method", "sampler"),
    [("fedss", "uniform"), ("fedss", "deck"), ("pos-only", "uniform"), ("moments", "uniform")],
)
def test_what_a_round_makes_does_not_depend_on_the_number_of_classes(method, sampler):
    """Bytes of all tensors, and numpy's at their peak, at client and server, from 10^5 to 10^7."""
    found = {}
    with Made():
        run("fedss", 7, 1)  # imports what torch imports late
    for n in (10**5, 10**7):
        told = replace(plan(method, 64, sampler, cover=8), num_classes=n)
        rows = create_class_rows(n, 6, MOMENTUM.slots, 0)
        if told.method.moments:
            rows = replace(rows, sums_EE=with_sums(create_class_rows(N, 6, (), 0)).sums_EE)
        theta_P = Model().theta_P
        state = ServerState(theta_P, {"momentum": torch.zeros_like(theta_P)}, rows, 0)
        tracemalloc.start()
        with Made() as made:
            run_round(Server(MOMENTUM), engine(MOMENTUM), state, told, draw_cohort(6, 3, 3, 0))
        found[n] = made, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    (few, few_peak), (many, many_peak) = found.values()
    assert many.largest == few.largest < 10**5
    assert many.total < 1.02 * few.total
    assert many_peak < 1.1 * few_peak + 50_000 < 10**6


def test_the_order_of_arrival_does_not_change_a_bit():
    """Values that cancel: a sum in another order, even in float64, would lose the small one."""
    values = {3: 1e20, 5: -1e20, 7: 1.0, 8: 1e-3}
    updates = [
        ClientUpdate(
            client, torch.full((2,), value), torch.tensor([1]), torch.full((1, 3), value), 1, 0.0
        )
        for client, value in values.items()
    ]
    sums = {
        tuple(mean.backbone_delta_P.tolist() + mean.rows_delta_UD.flatten().tolist())
        for order in itertools.permutations(updates)
        for mean in [aggregate(order, "cohort")]
    }
    assert len(sums) == 1
