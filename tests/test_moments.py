"""Moments against autograd through the full expression, and the lazy rows against dense ones."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fedss.algorithm import draw_cohort, on_top_of_map, run_round
from fedss.class_rows import create_class_rows
from fedss.client import Broadcast, Submodel, own_classes, train_client
from fedss.errors import DivergedError
from fedss.moments import (
    Moments,
    RowHistory,
    RowMap,
    absent_classes,
    absent_step,
    forget_,
    moments_now,
)
from fedss.optimizers import ServerOptimizer, read_rows, step_rows_, with_history
from fedss.samplers import class_sample, draw_uniform
from fedss.softmax import AbsentClasses, ClassSample, Scoring, moments_softmax, sampled_softmax
from tests.reference import whole
from tests.test_algorithm import DATA, MOMENTUM, SGD, Model, N, engine, plan, same, start


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def moments_of(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mean = rows.mean(dim=0)
    return mean, (rows - mean).T @ (rows - mean) / len(rows)


def test_held_rows_are_taken_out_exactly():
    rows = torch.randn(30, 4, generator=generator(0), dtype=torch.float64) + 0.3
    absent = absent_classes(Moments(*moments_of(rows)), 30, rows[[2, 5, 7]])
    others = [i for i in range(30) if i not in (2, 5, 7)]
    mean, covariance = moments_of(rows[others])
    assert absent.count == 27
    assert (absent.mean_D - mean).abs().max() < 1e-6
    assert (absent.covariance_DD - covariance).abs().max() < 1e-6


def test_who_holds_all_classes_has_the_full_softmax():
    g = generator(1)
    h, rows = F.normalize(torch.randn(4, 3, generator=g), dim=1), torch.randn(5, 3, generator=g)
    sample = ClassSample(torch.arange(5), torch.zeros(5), torch.ones(5, dtype=torch.bool))
    target = torch.tensor([0, 1, 4, 2])
    assert absent_classes(Moments(*moments_of(rows)), 5, rows) is None
    loss = moments_softmax(h, rows, target, sample, Scoring(10.0), None)
    assert torch.equal(loss, sampled_softmax(h, rows, target, sample, Scoring(10.0)))


def test_exact_in_the_limit_of_gaussian_rows():
    """log of the mean of exp(s w'h) over many Gaussian rows is s mu'h + s^2/2 h'Sigma h."""
    g, dim, count, s = generator(2), 4, 400_000, 3.0
    factor = 0.3 * torch.randn(dim, dim, generator=g, dtype=torch.float64)
    mean = 0.2 * torch.randn(dim, generator=g, dtype=torch.float64)
    absent_rows = mean + torch.randn(count, dim, generator=g, dtype=torch.float64) @ factor.T
    h = F.normalize(torch.randn(6, dim, generator=g, dtype=torch.float64), dim=1)
    own = F.normalize(torch.randn(2, dim, generator=g, dtype=torch.float64), dim=1)
    target = torch.tensor([0, 1, 0, 1, 0, 1])
    sample = ClassSample(torch.arange(2), torch.zeros(2), torch.ones(2, dtype=torch.bool))
    absent = AbsentClasses(count, mean, factor @ factor.T)
    ours = moments_softmax(h, own, target, sample, Scoring(s), absent)
    o = s * h @ torch.cat([own, absent_rows]).T
    exact = F.cross_entropy(o, target, reduction="none")
    assert (ours - exact).abs().max() < 0.02
    # The spread of the rows matters here: without it the loss is far off.
    flat = AbsentClasses(count, mean, torch.zeros(dim, dim, dtype=torch.float64))
    assert (moments_softmax(h, own, target, sample, Scoring(s), flat) - exact).abs().max() > 0.2


def test_the_virtual_logit_against_its_formula():
    g = generator(3)
    h, rows = F.normalize(torch.randn(3, 4, generator=g), dim=1), torch.randn(2, 4, generator=g)
    a = torch.randn(4, 4, generator=g)
    absent = AbsentClasses(7, torch.randn(4, generator=g), a @ a.T / 9)
    sample = ClassSample(torch.arange(2), torch.zeros(2), torch.ones(2, dtype=torch.bool))
    target = torch.tensor([0, 1, 1])
    scoring = Scoring(5.0, "cosface", 0.2)
    ours = moments_softmax(h, rows, target, sample, scoring, absent)
    for b in range(3):
        x, mu, sigma = h[b].tolist(), absent.mean_D.tolist(), absent.covariance_DD.tolist()
        v = math.log(7) + 5 * sum(p * q for p, q in zip(x, mu, strict=True))
        v += 12.5 * sum(x[i] * sigma[i][j] * x[j] for i in range(4) for j in range(4))
        cos = F.cosine_similarity(h[b], rows).tolist()
        o = [5 * (c - 0.2 * (i == int(target[b]))) for i, c in enumerate(cos)]
        expected = math.log(sum(map(math.exp, o)) + math.exp(v)) - o[int(target[b])]
        assert ours[b].item() == pytest.approx(expected, rel=1e-5)


def test_steps_of_absent_rows_against_autograd_through_the_full_expression():
    """dL/dw_j of each absent row, L a function of all of W through its mean and covariance."""
    g, n, dim, lr = generator(4), 12, 4, 0.7
    W = F.normalize(torch.randn(n, dim, generator=g, dtype=torch.float64), dim=1)
    held, others = [0, 3, 8], [i for i in range(n) if i not in (0, 3, 8)]
    h = F.normalize(torch.randn(5, dim, generator=g, dtype=torch.float64), dim=1)
    target = torch.tensor([0, 1, 2, 1, 0])
    sample = ClassSample(torch.tensor(held), torch.zeros(3), torch.ones(3, dtype=torch.bool))
    W.requires_grad_()
    absent = AbsentClasses(len(others), *moments_of(W[others]))
    moments_softmax(h, W[held], target, sample, Scoring(6.0), absent).mean().backward()

    at_client = absent_classes(Moments(*moments_of(W.detach())), n, W.detach()[held])
    moments_softmax(
        h.float(), W.detach()[held].float(), target, sample, Scoring(6.0), at_client
    ).mean().backward()
    step = absent_step(at_client, dim, lr)
    ours = step.shift_D + W.detach()[others].float() @ step.matrix_DD
    assert (ours + lr * W.grad[others]).abs().max() < 1e-6
    assert W.grad[others].abs().max() > 1e-3
    assert torch.equal(step.matrix_DD, step.matrix_DD.T)


def test_the_client_returns_the_sum_over_its_steps():
    """train_client against a loop in which W is whole, absent rows and all."""
    told = plan("moments", batch_size=2)
    state, model, labels = start(SGD, told), Model(), DATA.train.labels
    where = engine(SGD)
    client = 2
    example_N = where.clients.examples(client)
    own = own_classes(told, client, labels[example_N])
    sample = class_sample(own, np.zeros(0, np.int64), np.zeros(0))
    W0 = whole(state.class_rows)
    sent = Broadcast(state.backbone_P, Moments(*moments_of(W0)))
    submodel = Submodel(sent, sample.ids_S, W0[own])
    update = train_client(told, client, model, submodel, sample, example_N, labels[example_N])

    from fedss.client import batches
    from fedss.seeds import generator as keyed

    others = np.setdiff1d(np.arange(N), own)
    model.theta_P.copy_(state.backbone_P)
    held, step = W0[own].clone(), torch.zeros(len(others), W0.shape[1])
    for batch in batches(len(example_N), told.local, keyed(told.seed, "batches", 0, client)):
        model.grad_P.zero_()
        h = model.embed(model.pictures(example_N[batch]))
        rows, absent_W = held.clone().requires_grad_(), W0[others].clone().requires_grad_()
        target = torch.from_numpy(np.searchsorted(own, labels[example_N[batch]]))
        absent = AbsentClasses(len(others), *moments_of(absent_W))
        moments_softmax(h, rows, target, sample, told.scoring, absent).mean().backward()
        model.theta_P.sub_(model.grad_P, alpha=told.local.lr)
        held -= told.local.row_lr * rows.grad
        step -= told.local.row_lr * absent_W.grad
    every = update.row_map.shift_D + W0 @ update.row_map.matrix_DD
    assert (every[others] - step).abs().max() < 1e-5
    assert (update.rows_delta_SD - (held - W0[own])).abs().max() < 1e-5
    # The server takes the client's map off the rows that it held, where it will be applied again.
    (on_top,) = on_top_of_map(SGD, state, [update])
    assert (on_top.rows_delta_SD + every[own] - (held - W0[own])).abs().max() < 1e-5
    assert (update.backbone_delta_P - (model.theta_P - state.backbone_P)).abs().max() < 1e-6


class Dense:
    """All rows take every step at once: what the lazy rows must equal."""

    def __init__(self, optimizer: ServerOptimizer, weight: torch.Tensor) -> None:
        self.optimizer, self.weight = optimizer, weight.double().clone()
        self.velocity = torch.zeros_like(self.weight)

    def step(self, ids: torch.Tensor, update: torch.Tensor, row_map: RowMap) -> None:
        g = row_map.shift_D.double() + self.weight @ row_map.matrix_DD.double()
        g[ids] += update.double()
        beta = self.optimizer.momentum if self.optimizer.kind == "momentum" else 0.0
        self.velocity = beta * self.velocity + g
        self.weight = self.weight + self.optimizer.lr * self.velocity
        if self.optimizer.normalize_rows:
            self.weight[ids] = F.normalize(self.weight[ids], dim=1)


@settings(max_examples=15)
@given(
    st.integers(0, 10_000),
    st.integers(1, 40),
    st.sampled_from(["sgd", "momentum"]),
    st.booleans(),
)
def test_lazy_rows_equal_the_dense_optimizer(seed, rounds, kind, normalize):
    g, n, dim = generator(seed), 12, 3
    optimizer = ServerOptimizer(kind, 0.8, 0.7, normalize_rows=normalize)
    rows = with_history(create_class_rows(n, dim, optimizer.slots, seed))
    weight, history = whole(rows), rows.history
    dense = Dense(optimizer, weight)
    for round in range(rounds):
        ids = torch.randperm(n, generator=g)[: 1 + round % 3].sort().values
        update = 0.1 * torch.randn(len(ids), dim, generator=g)
        matrix = 0.02 * torch.randn(dim, dim, generator=g)
        row_map = RowMap(0.02 * torch.randn(dim, generator=g), matrix + matrix.T)
        before = whole(rows)
        step_rows_(optimizer, rows, ids, update, round, row_map)
        dense.step(ids, update, row_map)
        # What is stored of an untouched row does not change by one bit.
        untouched = torch.ones(n, dtype=torch.bool)
        untouched[ids] = False
        assert torch.equal(whole(rows)[untouched], before[untouched])
        now, now_slots = read_rows(optimizer, rows, torch.arange(n), round + 1)
        assert (now - dense.weight).abs().max() < 2e-5
        if kind == "momentum":
            assert (now_slots["momentum"] - dense.velocity).abs().max() < 2e-5
        mean, covariance = moments_of(dense.weight)
        moments = moments_now(history, n, dim)
        assert (moments.mean_D - mean).abs().max() < 2e-5
        assert (moments.covariance_DD - covariance).abs().max() < 2e-5
        if round % 16 == 0:
            assert min(history.maps, default=round) >= int(rows.updated_N.min())


def test_rows_that_run_away_are_not_summed_up():
    """Their squares would swallow the others', bit by bit and without a word."""
    optimizer = ServerOptimizer("sgd", 1.0, normalize_rows=True)
    rows = with_history(create_class_rows(6, 3, optimizer.slots, 0))
    doubled, touched = RowMap(torch.zeros(3), torch.eye(3)), torch.tensor([2])
    for round in range(10):
        step_rows_(optimizer, rows, touched, torch.zeros(1, 3), round, doubled)
        now, _ = read_rows(optimizer, rows, torch.arange(6), round + 1)
        mean, covariance = moments_of(now.double())
        moments = moments_now(rows.history, 6, 3)
        scale = float(now.abs().max()) ** 2
        assert (moments.mean_D - mean).abs().max() < 1e-6 * scale
        assert (moments.covariance_DD - covariance).abs().max() < 1e-6 * scale
    with pytest.raises(DivergedError, match=r"length of over 1,000.*lower class_row_lr"):
        step_rows_(optimizer, rows, touched, torch.zeros(1, 3), 10, doubled)


def test_what_no_row_needs_is_forgotten_and_the_rest_kept():
    history = RowHistory(torch.zeros(2, 2))
    history.maps.update({r: torch.zeros(1, 2) for r in range(10)})
    history.products.update({(1, 1): torch.zeros(2, 2), (1, 3): torch.zeros(2, 2)})
    forget_(history, 5)
    assert sorted(history.maps) == [5, 6, 7, 8, 9]
    assert list(history.products) == [(1, 3)]


def test_rounds_with_moments_of_one_client_with_all_classes_are_full():
    """No class is absent: the same weights as the full softmax, which has no map."""
    told = {name: plan(name, N) for name in ("moments", "full")}
    data = replace(DATA.train, clients=np.zeros(len(DATA.train), np.int64), client_names=["all"])
    after = []
    for one in told.values():
        where = replace(engine(MOMENTUM), clients=replace_index(data))
        state = start(MOMENTUM, one)
        for round in range(3):
            state, updates, _ = run_round(
                where, MOMENTUM, state, np.array([0]), replace(one, round=round), "cohort"
            )
        assert len(updates[0].ids_S) == N
        after.append(state)
    gap = whole(after[0].class_rows) - whole(after[1].class_rows)
    assert gap.abs().max() < 1e-6
    assert torch.equal(after[0].backbone_P, after[1].backbone_P)


def replace_index(images):
    from fedss.data import index_clients

    return index_clients(images)


@pytest.mark.parametrize("cover", [0, 3])
def test_rounds_against_dense_rows(cover):
    """run_round on lazy rows, and the same updates applied to rows that are all up to date."""
    told = plan("moments", cover=cover)
    state, where = start(MOMENTUM, told), engine(MOMENTUM)
    dense = Dense(MOMENTUM, whole(state.class_rows))
    for round in range(6):
        now = replace(told, round=round)
        state, updates, _ = run_round(
            where, MOMENTUM, state, draw_cohort(6, 2, 3, round), now, "cohort"
        )
        total = sum(u.num_examples for u in updates)
        ids = torch.cat([u.ids_S for u in updates]).unique()
        delta, shift, matrix = torch.zeros(N, 6), torch.zeros(6), torch.zeros(6, 6)
        for u in updates:
            p = u.num_examples / total
            mapped = u.row_map.shift_D + dense.weight[u.ids_S].float() @ u.row_map.matrix_DD
            delta[u.ids_S] += p * (u.rows_delta_SD - mapped)
            shift, matrix = shift + p * u.row_map.shift_D, matrix + p * u.row_map.matrix_DD
        dense.step(ids, delta[ids], RowMap(shift, matrix))
        rows, _ = read_rows(MOMENTUM, state.class_rows, torch.arange(N), state.round)
        assert (rows - dense.weight).abs().max() < 1e-5
        for u in updates:
            own = np.unique(DATA.train.labels[where.clients.examples(u.client)])
            assert len(u.ids_S) == min(N, len(own) + cover)


def test_a_cover_changes_what_is_asked_for_and_the_loss_only_for_the_better():
    """With all other classes as cover nothing is absent: the full softmax again."""
    told = plan("moments", size=N, cover=N)
    a, b = start(MOMENTUM, told), start(MOMENTUM)
    for round in range(3):
        cohort = draw_cohort(6, 3, 3, round)
        a, *_ = run_round(
            engine(MOMENTUM), MOMENTUM, a, cohort, replace(told, round=round), "cohort"
        )
        b, *_ = run_round(
            engine(MOMENTUM), MOMENTUM, b, cohort, replace(plan("full"), round=round), "cohort"
        )
    assert (whole(a.class_rows) - whole(b.class_rows)).abs().max() < 1e-6
    assert not same(a, start(MOMENTUM, told))


def test_the_client_never_sees_n():
    """A billion classes: the client's own tensors are of size S and D alone."""
    rows = F.normalize(torch.randn(3, 4, generator=generator(5)), dim=1)
    absent = absent_classes(Moments(torch.zeros(4), torch.eye(4) / 4), 10**9, rows)
    assert absent.count == 10**9 - 3
    ids, q = draw_uniform(np.array([1, 2]), 10**9, 0, np.random.default_rng(0))
    assert len(ids) == len(q) == 0
