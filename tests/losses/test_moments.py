"""The loss against its formula and its limit; the sums at the server against the whole table."""

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fedss.core.algorithm import Server, adjust_rows, aggregate, draw_cohort, run_round
from fedss.core.client import (
    Broadcast,
    ClientUpdate,
    Submodel,
    batches,
    limit_own_classes,
    train_client,
)
from fedss.losses.methods import METHODS
from fedss.losses.moments import Moments, absent_classes, moments_of, payload, row_sums
from fedss.losses.softmax import (
    AbsentClasses,
    ClassSample,
    Objective,
    Scoring,
    completed_softmax,
    moments_softmax,
    sampled_softmax,
)
from fedss.sampling.samplers import class_sample, draw_uniform, whole_sample
from fedss.seeds import generator as keyed
from tests.core.test_algorithm import DATA, MOMENTUM, SGD, Model, N, engine, plan, same, start
from tests.reference import whole


def sampled(
    rows: torch.Tensor, own: list[int], negatives: list[int]
) -> tuple[torch.Tensor, ClassSample, AbsentClasses]:
    """The rows of a class sample, and the moments of the others."""
    q = len(negatives) / (len(rows) - len(own))
    sample = class_sample(np.array(own), np.array(negatives), np.full(len(negatives), q))
    held = rows[sample.ids_S]
    absent = absent_classes(Moments(*mean_and_covariance(rows)), len(rows), held)
    assert absent is not None
    return held, sample, absent


def gradients(
    objective: Objective, rows: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the sum of losses: for the embeddings, and for the rows."""
    h = F.normalize(torch.randn(6, rows.shape[1], generator=generator(5)), dim=1)
    h, rows = h.requires_grad_(), rows.clone().requires_grad_()
    objective(h, rows, *rest).sum().backward()
    return h.grad, rows.grad


@pytest.mark.parametrize("correction", [1.0, 0.5, 0.0])
def test_negatives_count_once_in_the_sum_and_by_q_in_their_rows(correction):
    rows = F.normalize(torch.randn(30, 5, generator=generator(2)), dim=1)
    held, sample, absent = sampled(rows, [3, 8], [0, 5, 9, 20])
    target, scoring = torch.tensor([1, 1, 3, 3, 1, 3]), Scoring(7.0, "cosface", 0.1, correction)
    rest = target, sample, scoring, absent
    h_grad, rows_grad = gradients(completed_softmax, held, *rest)
    h_once, rows_once = gradients(moments_softmax, held, *rest)
    assert torch.equal(h_grad, h_once)
    weight = torch.where(sample.own_S, 1.0, (28 / 4) ** correction)
    assert torch.allclose(rows_grad, weight[:, None] * rows_once, atol=1e-7)
    assert sample.own_S.nonzero()[:, 0].tolist() == [1, 3]


def test_over_all_draws_rows_are_pushed_as_under_the_full_softmax():
    """Exact where the moments are: absent classes that are all alike."""
    n, own, m = 9, [2, 6], 3
    g = generator(3)
    alike, mine = torch.randn(4, generator=g), torch.randn(2, 4, generator=g)
    rows = F.normalize(alike.expand(n, 4).clone().index_copy(0, torch.tensor(own), mine), dim=1)
    target = torch.tensor([0, 1, 0, 0, 1, 1])
    everything = whole_sample(np.array(own), n)
    place = torch.tensor(own)[target]
    h_full, rows_full = gradients(sampled_softmax, rows, place, everything, Scoring(5.0))
    others = np.setdiff1d(np.arange(n), own)
    sets, total = list(itertools.combinations(others.tolist(), m)), torch.zeros(n, 4)
    for negatives in sets:
        held, sample, absent = sampled(rows, own, [*negatives])
        at = torch.searchsorted(sample.ids_S, place)
        h_grad, rows_grad = gradients(completed_softmax, held, at, sample, Scoring(5.0), absent)
        assert torch.allclose(h_grad, h_full, atol=1e-5)
        total[sample.ids_S] += rows_grad
    assert torch.allclose(total / len(sets), rows_full, atol=1e-5)


def test_without_absent_classes_it_is_the_corrected_softmax():
    rows = F.normalize(torch.randn(6, 4, generator=generator(4)), dim=1)
    target, sample = torch.tensor([0, 2, 2, 0, 2, 0]), whole_sample(np.array([0, 2]), 6)
    rest = target, sample, Scoring(9.0), None
    for found, expected in zip(
        gradients(completed_softmax, rows, *rest),
        gradients(sampled_softmax, rows, *rest),
        strict=True,
    ):
        assert torch.equal(found, expected)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mean_and_covariance(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mean = rows.mean(dim=0)
    return mean, (rows - mean).T @ (rows - mean) / len(rows)


def test_held_rows_are_taken_out_exactly():
    rows = torch.randn(30, 4, generator=generator(0), dtype=torch.float64) + 0.3
    absent = absent_classes(Moments(*mean_and_covariance(rows)), 30, rows[[2, 5, 7]])
    others = [i for i in range(30) if i not in (2, 5, 7)]
    mean, covariance = mean_and_covariance(rows[others])
    assert absent.count == 27
    assert (absent.mean_D - mean).abs().max() < 1e-6
    assert (absent.covariance_DD - covariance).abs().max() < 1e-6


def test_who_holds_all_classes_has_the_full_softmax():
    g = generator(1)
    h, rows = F.normalize(torch.randn(4, 3, generator=g), dim=1), torch.randn(5, 3, generator=g)
    sample = ClassSample(torch.arange(5), torch.zeros(5), torch.ones(5, dtype=torch.bool))
    target = torch.tensor([0, 1, 4, 2])
    assert absent_classes(Moments(*mean_and_covariance(rows)), 5, rows) is None
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


def test_the_client_moves_its_own_rows_alone_under_the_loss_of_all():
    """train_client against a loop in which W is whole and absent rows stay where they are."""
    told = plan("moments", batch_size=2)
    state, model, labels = start(SGD, told), Model(), DATA.train.labels
    client = 2
    example_N = engine(SGD).clients.examples(client)
    own = limit_own_classes(told, client, labels[example_N])
    sample = class_sample(own, np.zeros(0, np.int64), np.zeros(0))
    W0 = whole(state.class_rows)
    sent = Broadcast(state.backbone_P, payload(row_sums(W0)))
    submodel = Submodel(sent, sample.ids_S, W0[own])
    update = train_client(told, client, model, submodel, sample, example_N, labels[example_N])

    others = np.setdiff1d(np.arange(N), own)
    model.theta_P.copy_(state.backbone_P)
    held, absent = W0[own].clone(), AbsentClasses(len(others), *mean_and_covariance(W0[others]))
    for batch in batches(len(example_N), told.local, keyed(told.seed, "batches", 0, client)):
        model.grad_P.zero_()
        h, rows = model.embed(model.images(example_N[batch])), held.clone().requires_grad_()
        target = torch.from_numpy(np.searchsorted(own, labels[example_N[batch]]))
        moments_softmax(h, rows, target, sample, told.scoring, absent).mean().backward()
        model.theta_P.sub_(model.grad_P, alpha=told.local.lr)
        held -= told.local.row_lr * rows.grad
    assert (update.rows_delta_SD - (held - W0[own])).abs().max() < 1e-5
    assert (update.backbone_delta_P - (model.theta_P - state.backbone_P)).abs().max() < 1e-6


def test_rounds_with_moments_of_one_client_with_all_classes_are_full():
    """No class is absent: the same weights as the full softmax."""
    told = {name: plan(name, N) for name in ("moments", "full")}
    data = replace(DATA.train, clients=np.zeros(len(DATA.train), np.int64), client_names=["all"])
    after = []
    for one in told.values():
        where = replace(engine(MOMENTUM), clients=replace_index(data))
        state = start(MOMENTUM, one)
        for round in range(3):
            state, updates, _ = run_round(
                Server(MOMENTUM), where, state, replace(one, round=round), np.array([0])
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
def test_sums_are_those_of_all_rows_after_every_round(cover):
    told = plan("moments", cover=cover)
    state, where = start(MOMENTUM, told), engine(MOMENTUM)
    for round in range(6):
        before = whole(state.class_rows)
        now = replace(told, round=round)
        state, updates, _ = run_round(
            Server(MOMENTUM), where, state, now, draw_cohort(6, 2, 3, round)
        )
        rows = whole(state.class_rows)
        untouched = np.setdiff1d(np.arange(N), torch.cat([u.ids_S for u in updates]))
        assert torch.equal(rows[untouched], before[untouched])
        assert (rows.norm(dim=1) - 1).abs().max() < 1e-6
        moments = moments_of(state.class_rows.sums_EE)
        mean, covariance = mean_and_covariance(rows.double())
        assert (moments.mean_D - mean).abs().max() < 1e-6
        assert (moments.covariance_DD - covariance).abs().max() < 1e-6
        for u in updates:
            own = np.unique(DATA.train.labels[where.clients.examples(u.client)])
            assert len(u.ids_S) == min(N, len(own) + cover)


def test_a_cover_changes_what_is_asked_for_and_the_loss_only_for_the_better():
    """With all other classes as cover nothing is absent: the full softmax again."""
    told = plan("moments", size=N, cover=N)
    a, b = start(MOMENTUM, told), start(MOMENTUM)
    for round in range(3):
        cohort = draw_cohort(6, 3, 3, round)
        a, *_ = run_round(Server(MOMENTUM), engine(MOMENTUM), a, replace(told, round=round), cohort)
        b, *_ = run_round(
            Server(MOMENTUM), engine(MOMENTUM), b, replace(plan("full"), round=round), cohort
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


def updates_of(rows: list[tuple[list[int], torch.Tensor]]) -> list[ClientUpdate]:
    return [
        ClientUpdate(client, torch.zeros(2), torch.tensor(ids), delta_SD, 3, 0.0)
        for client, (ids, delta_SD) in enumerate(rows)
    ]


def test_own_rows_step_as_if_absent_rows_had_taken_their_push():
    """The full softmax's gradients sum up to zero over all rows; so do balanced steps, nearly."""
    g = generator(6)
    n, h = 40, F.normalize(torch.randn(6, 5, generator=g), dim=1)
    W, target = torch.randn(n, 5, generator=g).requires_grad_(), torch.arange(6)
    F.cross_entropy(h @ W.T, target).backward()
    assert W.grad.sum(dim=0).abs().max() < 1e-6
    own = -W.grad[:6]
    assert own.sum(dim=0).norm() > 0.5 * own.norm(dim=1).mean()  # all are drawn one way
    mean = aggregate(updates_of([([0, 1, 2], own[:3]), ([3, 4, 5], own[3:])]), "holders")
    assert mean.rows_held == 3
    # 6 of 40 rows move, of which a client holds 3: the others' part is missing.
    left = adjust_rows(METHODS["moments"], mean, n).rows_delta_UD * (1 + 37 / 40 * 6 / 40)
    kept = 1 - (37 / 40) * 6 / 7
    assert torch.allclose(left.sum(dim=0), kept * own.sum(dim=0), atol=1e-6)
    # Only what all have in common is taken off.
    assert torch.allclose(left[1:] - left[:1], own[1:] - own[:1], atol=1e-6)


def test_nothing_is_taken_off_where_all_rows_are_held_and_a_row_alone_still_moves():
    every = torch.randn(4, 3, generator=generator(7))
    mean = aggregate(updates_of([([0, 1, 2, 3], every), ([0, 1, 2, 3], every)]), "holders")
    method = METHODS["moments"]
    assert torch.equal(adjust_rows(method, mean, 4).rows_delta_UD, mean.rows_delta_UD)
    mean = aggregate(updates_of([([2], every[:1])]), "holders")
    (alone,) = adjust_rows(method, mean, 10**9).rows_delta_UD
    assert torch.allclose(alone, every[0] / 2)
