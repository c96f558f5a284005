"""Intervals against their definition, a classical formula and simulation."""

import numpy as np
import pytest
from scipy import stats

from fedss.evaluation.intervals import (
    DRAWS,
    ENOUGH_CLASSES,
    FEWEST_CLASSES,
    ClassScores,
    Interval,
    difference,
    floor_order,
    floor_words,
    interval,
    student_t,
    weakness,
)
from fedss.seeds import generator


def test_floors_at_another_size_come_last_and_those_of_a_backbone_alone():
    names = ("frozen_whitened_at_224", "frozen_at_224", "frozen", "chance", "frozen_at_64")
    ordered = ["chance", "frozen", "frozen_at_64", "frozen_at_224", "frozen_whitened_at_224"]
    assert floor_order([*names, *names]) == ordered
    assert floor_words("chance") == "chance"
    assert floor_words("frozen_whitened_at_224") == "whitened backbone at 224 px"
    others = ("pixels_at_224", "frozen_at_0", "frozen_at_", "frozen_at_1e3", "frozenly_at_9", "x")
    assert floor_order(others) == []


def scores(values: np.ndarray, queries: np.ndarray | None = None) -> ClassScores:
    queries = np.full(len(values), 4) if queries is None else queries
    return ClassScores(tuple(f"{i:05d}" for i in range(len(values))), queries, values)


def draw(classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.beta(1, 2, classes), rng.integers(1, 20, classes)


def test_classes_are_drawn_with_all_of_their_queries():
    values, queries = draw(7, 0)
    rng, means = generator(0, "bootstrap classes"), []
    for chosen in rng.integers(7, size=(DRAWS, 7)):
        own = np.concatenate([np.full(queries[c], values[c]) for c in chosen])
        means.append(own.mean())
    ends = interval([scores(values, queries)])
    assert ends.value == pytest.approx(np.repeat(values, queries).mean())
    rest = stats.norm.cdf(-np.sqrt(7 / 6) * stats.t.ppf(0.975, 6))
    assert [ends.low, ends.high] == pytest.approx(np.quantile(means, [rest, 1 - rest]), abs=2e-4)


def test_many_classes_give_the_normal_interval():
    values, _ = draw(20_000, 1)
    ends = interval([scores(values)])
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert [ends.low, ends.high] == pytest.approx(
        [values.mean() - half, values.mean() + half], abs=0.1 * half
    )


def test_the_truth_lies_within_nineteen_times_in_twenty():
    hits = 0
    for seed in range(400):
        values, queries = draw(40, seed)
        ends = interval([scores(values, queries)])
        hits += ends.low <= 1 / 3 <= ends.high
    assert 0.90 < hits / 400 < 0.98


def test_a_difference_is_taken_class_by_class():
    values, queries = draw(50, 2)
    better = scores(values + 0.01, queries)
    ends = difference([better], [scores(values, queries)], paired=True)
    # The classes differ by far more, but not this.
    assert [ends.low, ends.high] == pytest.approx([0.01, 0.01])
    assert ends.shown
    noise = np.random.default_rng(0).normal(0, 0.1, 50)
    alike = difference([scores(values + noise, queries)], [scores(values, queries)], paired=True)
    assert alike.low < 0 < alike.high
    assert not alike.shown


def test_seeds_that_disagree_show_no_difference():
    values, queries = draw(2000, 3)
    ours = [scores(values + d, queries) for d in (0.05, -0.04, 0.03)]
    theirs = [scores(values, queries)] * 3
    ends = difference(ours, theirs, paired=True)
    assert ends.value == pytest.approx(0.04 / 3)
    assert ends.low < 0 < ends.high
    assert not ends.shown
    agreed = [scores(values + d, queries) for d in (0.05, 0.04, 0.03)]
    assert difference(agreed, theirs, paired=True).shown
    # Seeds that went well for both say nothing of the difference, where they are the same seeds.
    moved = [scores(values + d + 0.01, queries) for d in (0.05, -0.04, 0.03)]
    assert difference(moved, ours, paired=True).low == pytest.approx(0.01)
    assert difference(moved, ours, paired=False).low < 0


def test_other_classes_cannot_be_compared():
    values, queries = draw(10, 4)
    ours = scores(values, queries)
    renamed = ClassScores(tuple(f"other {n}" for n in ours.names), queries, values)
    assert difference([ours], [renamed], paired=True) is None
    assert difference([ours], [scores(values, queries + 1)], paired=True) is None


def test_a_difference_is_shown_where_nought_lies_outside():
    assert Interval(0.2, 0.1, 0.3, 6).shown
    assert Interval(-0.2, -0.3, -0.1, 6).shown
    assert not Interval(0.1, -0.01, 0.3, 6).shown
    assert not Interval(0.2, 0.1, 0.3, FEWEST_CLASSES - 1).shown


def test_how_many_classes_a_test_needs():
    # Better in every class, by chance: below 5 % from so many classes on.
    assert 2 ** (1 - FEWEST_CLASSES) < 0.05 <= 2 ** (2 - FEWEST_CLASSES)
    assert 1.96 * 0.25 / np.sqrt(ENOUGH_CLASSES) < 0.1 < 1.96 * 0.25 / np.sqrt(ENOUGH_CLASSES - 2)
    assert weakness(ENOUGH_CLASSES) == ""
    assert "weak" in weakness(ENOUGH_CLASSES - 1)
    assert "tells nothing" in weakness(FEWEST_CLASSES - 1)
    assert "one class" in weakness(1)


@pytest.mark.parametrize("freedom", [5, 9, 24, 99])
def test_students_t(freedom):
    for share in (0.9, 0.975):
        assert student_t(share, freedom) == pytest.approx(stats.t.ppf(share, freedom), rel=2e-3)


@pytest.mark.parametrize("classes", [2, 3, 5, 6, 10])
def test_equal_methods_are_seldom_shown_to_differ_however_few_the_classes(classes):
    shown, hits = 0, 0
    for seed in range(400):
        one, other = np.random.default_rng(seed).normal(0.5, 0.15, (2, classes))
        shown += difference([scores(one)], [scores(other)], paired=True).shown
        ends = interval([scores(one)])
        hits += ends.low <= 0.5 <= ends.high
    assert shown == 0 if classes < FEWEST_CLASSES else shown / 400 < 0.1
    # The mean of 2 classes lies between its own ends alone: nothing is farther out.
    assert hits / 400 > {2: 0.45, 3: 0.7, 5: 0.88}.get(classes, 0.91)


def test_one_class_has_no_interval():
    alone = [scores(np.array([0.7]))]
    assert interval(alone) is None
    assert difference(alone, alone, paired=True) is None
