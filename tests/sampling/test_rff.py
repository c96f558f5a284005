import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fedss.sampling import rff
from tests import reference

BLOCK, SHARE = rff.BLOCK, rff.UNIFORM_SHARE


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def some_rows(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(3 * rng(seed).standard_normal((n, d), dtype=np.float32))


def small_index(n: int, d: int = 6, num_features: int = 8, nu: float = 4.0) -> rff.RffIndex:
    return rff.build_index(some_rows(n, d), rng(1), num_features, nu)


def test_features_estimate_the_gaussian_kernel():
    # The mean of 20,000 cosines, each of variance at most 1/2: 6 sigma is 0.03.
    rows, nu = some_rows(12, 5), 3.0
    index = rff.build_index(rows, rng(), 20_000, nu)
    phi = rff.features(index.frequencies_FD, rows)
    unit = F.normalize(rows, dim=1)
    kernel = torch.exp(-nu * torch.cdist(unit, unit).square() / 2)
    torch.testing.assert_close(phi @ phi.T, kernel, atol=0.03, rtol=0)
    torch.testing.assert_close(math.exp(-nu) * torch.exp(nu * unit @ unit.T), kernel)
    torch.testing.assert_close(phi.norm(dim=1), torch.ones(12))


@settings(max_examples=40)
@given(st.integers(1, 7 * BLOCK), st.integers(1, 4), st.integers(0, 1000))
def test_probabilities_sum_to_one_and_have_a_floor(n, num_queries, seed):
    index = rff.build_index(some_rows(n, 4, seed), rng(seed), 4, 8.0)
    p = rff.class_probability(index, some_rows(num_queries, 4, seed + 1), np.arange(n))
    assert p.dtype == np.float64
    assert p.sum() == pytest.approx(1, abs=1e-9)
    assert (p >= SHARE / n).all()


def slow_probabilities(index: rff.RffIndex, query_rows: torch.Tensor) -> list[float]:
    frequencies, n = index.frequencies_FD.tolist(), index.num_classes

    def phi(row: list[float]) -> list[float]:
        norm = math.sqrt(sum(x * x for x in row))
        angles = [sum(w * x for w, x in zip(ws, row, strict=True)) / norm for ws in frequencies]
        waves = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
        return [x / math.sqrt(len(frequencies)) for x in waves]

    queries = [phi(row) for row in query_rows.tolist()]
    classes = [phi(row) for row in index.rows_ND.tolist()]
    estimate = [
        sum(sum(a * b for a, b in zip(q, c, strict=True)) for q in queries) / len(queries)
        for c in classes
    ]
    kernel = [
        sum(math.exp(index.bandwidth * (reference.cosine(q, row) - 1)) for q in query_rows.tolist())
        for row in index.rows_ND.tolist()
    ]
    p = [0.0] * n

    def descend(lo: int, span: int, reach: float) -> None:
        if span == 1:
            p[lo] = SHARE / n + (1 - SHARE) * reach
            return
        step = 1 if span == BLOCK else span // 2
        parts = [i for i in range(lo, lo + span, step) if i < n]
        sizes = [min(step, n - i) for i in parts]
        value = kernel if step == 1 else estimate
        scores = [max(0.0, sum(value[i : i + step])) for i in parts]
        if sum(scores) == 0:
            scores = [float(size) for size in sizes]
        for i, score in zip(parts, scores, strict=True):
            descend(i, step, reach * score / sum(scores))

    span = BLOCK
    while span < n:
        span *= 2
    descend(0, span, 1.0)
    return p


@pytest.mark.parametrize("n", [1, 5, BLOCK, BLOCK + 1, 5 * BLOCK + 3])
@pytest.mark.parametrize("nu", [1.0, 30.0])
def test_probabilities_are_those_of_a_slow_descent(n, nu):
    index, queries = small_index(n, nu=nu), some_rows(3, 6, seed=7)
    p = rff.class_probability(index, queries, np.arange(n))
    np.testing.assert_allclose(p, slow_probabilities(index, queries), rtol=1e-3, atol=1e-6)


def test_where_nothing_is_positive_classes_share_alike():
    n = 3 * BLOCK + 5
    index = small_index(n)
    index.tree_V2F[:] = -rff.features(index.frequencies_FD, index.rows_ND[:1])
    p = rff.class_probability(index, index.rows_ND[:1], np.arange(n))
    tree = (p - SHARE / n) / (1 - SHARE)
    for start in range(0, n, BLOCK):
        block = tree[start : start + BLOCK]
        assert block.sum() == pytest.approx(len(block) / n)


def test_near_classes_are_likelier():
    index = rff.build_index(some_rows(100, 8), rng(), 512, 4.0)
    p = rff.class_probability(index, index.rows_ND[40:41], np.arange(100))
    assert p.argmax() == 40
    assert p[40] > 5 / 100


def test_classes_are_drawn_as_often_as_stated():
    n, num_draws, repeats = 5 * BLOCK + 7, 6, 1000
    index, queries, random = small_index(n, nu=30.0), some_rows(2, 6, seed=3), rng()
    p = rff.class_probability(index, queries, np.arange(n))
    assert (p == SHARE / n).any()  # some are out of the tree's reach
    seen = np.zeros(n)
    for _ in range(repeats):
        ids, pi = rff.draw(index, queries, num_draws, random)
        assert ids.dtype == np.int64
        assert 1 <= len(ids) <= num_draws
        assert (np.diff(ids) > 0).all()
        np.testing.assert_allclose(pi, 1 - (1 - p[ids]) ** num_draws, rtol=1e-9)
        seen[ids] += 1
    pi = 1 - (1 - p) ** num_draws
    assert (abs(seen - repeats * pi) <= 6 * np.sqrt(repeats * pi * (1 - pi))).all()


@pytest.mark.parametrize("num_draws", [1, 2, 3])
def test_the_partition_estimate_is_unbiased(num_draws):
    n, own = 5, 0
    index, random = small_index(n), rng()
    query = index.rows_ND[own : own + 1]
    unit = F.normalize(index.rows_ND.double(), dim=1)
    e = torch.exp(10 * unit[own] @ unit.T).numpy()
    p = rff.class_probability(index, query, np.arange(n))
    pi = np.zeros(n)
    while not pi.all():
        ids, pi_M = rff.draw(index, query, num_draws, random)
        pi[ids] = pi_M
    mean = 0.0
    for drawn in itertools.product(range(n), repeat=num_draws):
        estimate = e[own] + sum(e[i] / pi[i] for i in set(drawn) - {own})
        mean += math.prod(p[i] for i in drawn) * estimate
    assert mean == pytest.approx(e.sum(), rel=1e-9)


@settings(max_examples=25)
@given(st.integers(1, 6 * BLOCK), st.data())
def test_an_updated_index_is_a_new_one_bit_for_bit(n, data):
    index = small_index(n, d=7)
    rows = index.rows_ND.clone()
    for seed in range(3):
        ids = data.draw(st.lists(st.integers(0, n - 1), unique=True, max_size=40))
        ids_U, new_UD = torch.tensor(ids, dtype=torch.int64), some_rows(len(ids), 7, seed)
        rows[ids_U] = new_UD
        rff.update_index_(index, ids_U, new_UD)
    fresh = rff.build_index(rows, rng(1), 8, 4.0)
    assert torch.equal(index.rows_ND, rows)
    assert torch.equal(index.frequencies_FD, fresh.frequencies_FD)
    assert torch.equal(index.tree_V2F, fresh.tree_V2F)


def test_only_the_ways_to_the_drawn_classes_are_read():
    n, num_draws = 400 * BLOCK - 3, 4
    index, query = small_index(n, num_features=2), some_rows(1, 6, seed=9)
    ids, pi = rff.draw(index, query, num_draws, rng(5))
    block_of, first_leaf = np.arange(n) // BLOCK, len(index.tree_V2F) // 2
    read = set()
    for node in set((ids // BLOCK + first_leaf).tolist()):
        while node > 1:
            read |= {node, node ^ 1}
            node //= 2
    assert len(read) <= 2 * num_draws * math.ceil(math.log2(n / BLOCK))
    index.tree_V2F[[v for v in range(len(index.tree_V2F)) if v not in read]] = math.nan
    index.rows_ND[~np.isin(block_of, ids // BLOCK)] = math.nan
    again, pi_again = rff.draw(index, query, num_draws, rng(5))
    np.testing.assert_array_equal(again, ids)
    np.testing.assert_array_equal(pi_again, pi)


def test_the_index_is_its_own_copy_and_follows_its_seed():
    rows = some_rows(10, 6)
    before = rows.clone()
    index, same = rff.build_index(rows, rng(2)), rff.build_index(rows, rng(2))
    assert torch.equal(index.tree_V2F, same.tree_V2F)
    assert index.frequencies_FD.shape == (rff.NUM_FEATURES, 6)
    rows.zero_()
    assert torch.equal(index.rows_ND, before)
    rff.update_index_(index, torch.tensor([3]), torch.ones(1, 6))
    assert torch.equal(same.rows_ND, before)
    assert not rows.any()
    p = rff.class_probability(rff.build_index(rows, rng(2)), rows[:1], np.arange(10))
    np.testing.assert_allclose(p, 1 / 10)  # rows of zeros are all alike


def test_bad_input():
    index, none = small_index(5), torch.zeros(0, 6)
    for rows, *numbers in [(none, 8, 4.0), (index.rows_ND, 0, 4.0), (index.rows_ND, 8, 0.0)]:
        with pytest.raises(ValueError, match="class rows, num_features >= 1 and bandwidth > 0"):
            rff.build_index(rows, rng(), *numbers)
    with pytest.raises(ValueError, match="query row"):
        rff.draw(index, none, 3, rng())
    with pytest.raises(ValueError, match="query row"):
        rff.class_probability(index, none, np.arange(5))
    with pytest.raises(ValueError, match="num_draws must be at least 1, not 0"):
        rff.draw(index, index.rows_ND, 0, rng())
    for i in (-1, 5):
        with pytest.raises(ValueError, match="class ids go from 0 to 4"):
            rff.class_probability(index, index.rows_ND, np.array([i]))
        with pytest.raises(ValueError, match="class ids go from 0 to 4"):
            rff.update_index_(index, torch.tensor([i]), torch.zeros(1, 6))
