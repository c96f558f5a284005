"""Every sampler keeps one law: the q that it states is the probability of being drawn."""

import dataclasses
import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from examples.hard_negatives import HARD
from fedss.errors import ConfigError
from fedss.sampling.samplers import (
    SAMPLERS,
    Negatives,
    ServerRows,
    check_negatives,
    class_sample,
    deal_deck,
    draw_common,
    draw_first,
    draw_uniform,
    limit,
    own_budget,
    rest_of_common,
    whole_sample,
)
from tests import reference

Hand = Callable[[np.ndarray, int, int, int], Negatives]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def at_server(rows_ND: torch.Tensor) -> ServerRows:
    return ServerRows(len(rows_ND), rows_ND.__getitem__)


def unit_rows(n: int, dim: int = 5) -> torch.Tensor:
    g = torch.Generator().manual_seed(n)
    return F.normalize(torch.randn(n, dim, generator=g), dim=1)


ALL = {**SAMPLERS, "hard": HARD}


def negatives(name: str, own: np.ndarray, n: int, m: int, seed: int) -> Negatives:
    """What the second of three clients gets; each of the three has the same own classes."""
    sampler = ALL[name]
    if sampler.draw:
        return sampler.draw(own, n, m, rng(seed))
    return sampler.deal([own] * 3, [m] * 3, at_server(unit_rows(n)), rng(seed))[1]


@st.composite
def requests(draw: st.DrawFn) -> tuple[np.ndarray, int, int]:
    n = draw(st.integers(2, 60))
    own = draw(st.sets(st.integers(0, n - 1), min_size=1, max_size=n))
    return np.array(sorted(own)), n, draw(st.integers(0, n - len(own)))


@pytest.mark.parametrize("name", ALL)
@given(requests(), st.integers(0, 1000))
def test_a_hand_keeps_its_promises(name, request_, seed):
    own, n, m = request_
    ids, q = negatives(name, own, n, m, seed)
    assert ids.dtype == np.int64
    assert len(ids) == len(q) <= m
    assert (np.diff(ids) > 0).all()
    assert not set(ids) & set(own)
    assert all(0 <= i < n for i in ids)
    assert ((q > 0) & (q <= 1)).all()
    if m == n - len(own):
        assert len(ids) == m
        assert (q == 1).all()
    if name in ("uniform", "sticky", "hard"):
        assert len(ids) == m


@pytest.mark.parametrize("name", ALL)
def test_q_is_the_probability_of_being_drawn(name):
    """Horvitz and Thompson: each class counts 1 on average, and so the partition is unbiased."""
    own, n, m, draws = np.array([1, 4, 5]), 12, 5, 1200
    logits = rng(7).normal(size=n) * 2
    logits[own] = -math.inf
    weight, square, estimates = np.zeros(n), np.zeros(n), []
    for seed in range(draws):
        ids, q = negatives(name, own, n, m, seed)
        weight[ids] += 1 / q
        square[ids] += 1 / q**2
        estimates.append((np.exp(logits[ids]) / q).sum())
    others = np.setdiff1d(np.arange(n), own)
    deviation = np.sqrt(np.maximum(square / draws - (weight / draws) ** 2, 0) / draws)
    # Six standard deviations.
    assert (np.abs(weight / draws - 1) <= 6 * deviation + 1e-12)[others].all()
    error = np.std(estimates) / math.sqrt(draws)
    assert abs(np.mean(estimates) - np.exp(logits).sum()) < 6 * error
    # The logarithm is not unbiased: Jensen. Nobody may claim otherwise.
    assert np.mean(np.log(np.maximum(estimates, 1e-9))) < math.log(np.exp(logits).sum())


@pytest.mark.parametrize(("n", "own", "m"), [(7, (2, 5), 3), (6, (0,), 2), (6, (1, 2, 3, 4), 1)])
@pytest.mark.parametrize("draw", [draw_uniform, draw_first])
def test_the_partition_estimate_is_unbiased(draw, n, own, m):
    """Exhaustive enumeration of all samples, each as likely as any other: E[Z^] = Z."""
    logits = rng(n).normal(size=n) * 3
    sets = list(reference.all_negative_sets(own, n, m))
    hands = [draw(np.array(own), n, m, rng(seed)) for seed in range(400)]
    assert {tuple(ids.tolist()) for ids, _ in hands} == set(sets)
    estimates = [
        sum(math.exp(logits[i]) for i in own)
        + sum(math.exp(logits[i]) / hands[0][1][0] for i in negative)
        for negative in sets
    ]
    assert np.mean(estimates) == pytest.approx(np.exp(logits).sum(), rel=1e-12)


@pytest.mark.parametrize(("n", "own", "m"), [(7, (2, 5), 4), (6, (0,), 2), (6, (1, 2, 3), 4)])
def test_a_common_set_is_unbiased_over_all_sets(n, own, m):
    """Whichever own classes it has: E[Z^] is Z without own classes outside the set. And given one
    class of the set, as where a label must be in it, each class that is not own weighs 1."""
    e, owned_P = np.exp(rng(n).normal(size=n) * 3), np.array(own)
    sets = list(itertools.combinations(range(n), m))
    drawn = [tuple(draw_common(n, m, rng(seed)).tolist()) for seed in range(600)]
    assert set(drawn) == set(sets)
    estimates: dict[tuple[int, ...], list[float]] = {}
    weights = np.zeros((n, n))
    for ids_C in sets:
        rest_M, q_M = rest_of_common(owned_P, n, np.array(ids_C))
        present = tuple(i for i in ids_C if i in own)
        assert sorted([*present, *rest_M.tolist()]) == [*ids_C]
        assert ((q_M > 0) & (q_M <= 1)).all()
        estimates.setdefault(present, []).append(e[[*present]].sum() + (e[rest_M] / q_M).sum())
        for i in ids_C:
            weights[i, rest_M] += 1 / q_M
    others = np.setdiff1d(np.arange(n), owned_P)
    for present, found in estimates.items():
        assert np.mean(found) == pytest.approx(e[[*present]].sum() + e[others].sum(), rel=1e-12)
    held = math.comb(n - 1, m - 1)
    for i in own:
        assert weights[i, others] / held == pytest.approx(np.ones(len(others)), rel=1e-12)


@given(requests())
def test_a_common_set_of_all_classes_is_the_whole_sample(request_):
    own, n, _ = request_
    made = class_sample(own, *rest_of_common(own, n, draw_common(n, n, rng())))
    whole = whole_sample(own, n)
    for one, other in zip(dataclasses.astuple(made), dataclasses.astuple(whole), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


class Shuffled:
    """In the place of a generator: an order of the deck that the test has chosen."""

    def __init__(self, order: tuple[int, ...]) -> None:
        self.order = order

    def choice(self, n: int, count: int, replace: bool, shuffle: bool) -> np.ndarray:
        assert (n, replace, shuffle) == (len(self.order), False, True)
        return np.array(self.order[:count])


@pytest.mark.parametrize("counts", [(2, 2, 1), (3, 3, 3), (1, 0, 4)])
def test_a_deck_is_unbiased_for_each_client_over_all_orders(counts):
    n, owns = 6, [np.array([0]), np.array([1, 2]), np.array([5])]
    e = np.exp(rng(3).normal(size=n))
    rows, total = at_server(unit_rows(n)), np.zeros(3)
    orders = list(itertools.permutations(range(n)))
    for order in orders:
        hands = deal_deck(owns, counts, rows, Shuffled(order))
        total += [(e[ids] / q).sum() for ids, q in hands]
    for own, count, mean in zip(owns, counts, total / len(orders), strict=True):
        others = e.sum() - e[own].sum()
        assert mean == pytest.approx(others if count else 0.0, rel=1e-12)


def test_a_deck_deals_no_class_twice_before_all_were_dealt_once():
    rows, owns = at_server(unit_rows(50)), [np.array([k]) for k in range(4)]
    hands = deal_deck(owns, [12] * 4, rows, rng())
    dealt = np.concatenate([ids for ids, _ in hands])
    assert len(dealt) == len(np.unique(dealt)) > 40
    hands = deal_deck(owns, [30] * 4, rows, rng())  # 120 cards of 50 classes
    times = np.bincount(np.concatenate([ids for ids, _ in hands]), minlength=50)
    assert times.max() <= 3
    assert times.min() >= 1


def test_hard_takes_the_nearest_and_is_sure_of_them():
    rows, own = unit_rows(40), np.array([3, 17])
    ((ids, q),) = HARD.deal([own], [10], at_server(rows), rng())
    cos = (rows[own] @ rows.T).max(dim=0).values.numpy()
    cos[own] = -2
    assert set(np.argsort(-cos)[:5]) == set(ids[q == 1])
    assert q[q < 1].tolist() == [5 / (40 - 2 - 5)] * 5


def test_sampling_does_not_touch_n_things():
    """10^12 classes: any array of size n would need terabytes."""
    own = np.array([3, 10**11])
    for draw in (draw_uniform, draw_first):
        assert len(draw(own, 10**12, 254, rng())[0]) == 254
    ids_C = draw_common(10**12, 254, rng())
    assert len(rest_of_common(own, 10**12, ids_C)[0]) == len(np.unique(ids_C)) == 254


def test_a_fixed_cover_stays_when_only_the_round_changes():
    """The same generator, other own classes kept: most of the cover is the same."""
    one, _ = draw_first(np.array([1, 2, 3]), 1000, 20, rng(5))
    other, _ = draw_first(np.array([1, 2, 9]), 1000, 20, rng(5))
    assert len(np.intersect1d(one, other)) >= 19


@given(st.sets(st.integers(0, 11), min_size=1))
def test_the_whole_sample_is_own_classes_and_all_others(own):
    own_P, n = np.array(sorted(own)), 12
    drawn = draw_uniform(own_P, n, n - len(own_P), np.random.default_rng(0))
    for whole, expected in zip(
        dataclasses.astuple(whole_sample(own_P, n)),
        dataclasses.astuple(class_sample(own_P, *drawn)),
        strict=True,
    ):
        assert whole.dtype == expected.dtype
        assert torch.equal(whole, expected)


def test_a_class_sample_is_sorted_and_tells_own_from_negative():
    sample = class_sample(np.array([2, 9]), np.array([1, 5]), np.array([0.5, 1.0]))
    assert sample.ids_S.tolist() == [1, 2, 5, 9]
    assert sample.own_S.tolist() == [False, True, False, True]
    assert sample.log_q_S.exp().tolist() == [0.5, 1.0, 1.0, 1.0]


@given(st.integers(2, 200), st.integers(1, 200))
def test_an_eighth_is_left_for_negatives(size, n):
    budget = own_budget(size, n)
    assert budget == n if size >= n else size - budget >= max(1, size / 8)


@pytest.mark.parametrize(
    ("ids", "q", "fault"),
    [
        ([0, 3, 9], [1.0, 1e-9, 1.0], None),
        ([], [], None),
        ([0, 3, 5, 9], [0.5] * 4, "at most 3 negatives, got 4"),
        ([0, 3, 3], [0.5] * 3, "sorted ids, each once"),
        ([3, 0], [0.5] * 2, "sorted ids, each once"),
        ([-1, 3], [0.5] * 2, "ids from 0 to 9"),
        ([3, 10], [0.5] * 2, "ids from 0 to 9"),
        ([3, 4], [0.5] * 2, "no own class"),
        ([3], [0.0], "q above 0 and at most 1"),
        ([3], [1 + 1e-9], "q above 0 and at most 1"),
        ([3], [math.nan], "q above 0 and at most 1"),
        ([3, 5], [0.5], "as many q as ids"),
        ([0.0, 3.0], [0.5] * 2, "ids of int64, got float64"),
    ],
)
def test_what_a_sampler_may_return(ids, q, fault):
    negatives = np.array(ids, None if ids else np.int64), np.array(q)
    check = lambda: check_negatives("own", np.array([4, 7]), 10, 3, negatives)  # noqa: E731
    if fault is None:
        assert [part.tolist() for part in check()] == [ids, q]
        return
    with pytest.raises(ConfigError, match=f"sampler 'own': expected {fault}"):
        check()


def test_every_part_of_own_classes_can_be_kept():
    seen = {tuple(limit(np.arange(6), 3, rng(seed)).tolist()) for seed in range(500)}
    assert seen == set(itertools.combinations(range(6), 3))
    assert limit(np.arange(6), 6, rng()).tolist() == list(range(6))
