"""Verification and open-set identification against enumeration and scikit-learn."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_curve
from torch.nn import functional as F

from fedss.evaluation import verification as v
from fedss.evaluation.confusions import hardest_confusions
from fedss.seeds import generator


def grid(cosine: float) -> int:
    """The cell of a cosine."""
    return min(math.floor((cosine + 1) * 2**16), 2**17)


def clustered(rows: int, classes: int, d: int, seed: int = 0, noise: float = 1.0):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (rows,), generator=g)
    centres = torch.randn(classes, d, generator=g)
    return centres[labels] + noise * torch.randn(rows, d, generator=g), labels


def enumerated(rows, labels, gallery=None, gallery_labels=None):
    """Each pair by itself, in exact fractions of the rounded rows: cells of genuine, impostor."""

    def fractions(rows):
        unit = F.normalize(rows.double(), dim=1)
        return [[Fraction(round(float(x) * 2**24), 2**24) for x in row] for row in unit]

    alone = gallery is None
    left = fractions(rows)
    right = left if alone else fractions(gallery)
    right_labels = labels if alone else gallery_labels
    result = [], []
    for i, j in itertools.product(range(len(left)), range(len(right))):
        if alone and j <= i:
            continue
        cosine = sum((x * y for x, y in zip(left[i], right[j], strict=True)), Fraction(0))
        cell = min(max(math.floor((cosine + 1) * 2**16), 0), 2**17)
        result[int(labels[i] != right_labels[j])].append(cell)
    return result


def cells(counts_C: torch.Tensor) -> list[int]:
    return np.repeat(np.arange(len(counts_C)), counts_C.numpy()).tolist()


@pytest.mark.parametrize("sides", ["alone", "gallery"])
def test_each_pair_is_counted_once_in_its_cell(sides):
    rows, labels = clustered(40, 5, 3)
    rows[7], rows[8], rows[9] = rows[6], -rows[6], 0
    more = () if sides == "alone" else (*clustered(23, 7, 3, seed=1),)
    pairs = v.count_pairs(rows, labels, *more)
    genuine, impostor = enumerated(rows, labels, *more)
    assert cells(pairs.genuine_C) == sorted(genuine)
    assert cells(pairs.impostor_C) == sorted(impostor)


@pytest.mark.parametrize("sides", ["alone", "gallery"])
@pytest.mark.parametrize("classes", [2, 90])
def test_blocks_threads_and_order_change_nothing(monkeypatch, sides, classes):
    rows, labels = clustered(300, classes, 8)
    more = () if sides == "alone" else (*clustered(170, classes, 8, seed=1),)
    before = torch.get_num_threads()
    whole = v.count_pairs(rows, labels, *more)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    try:
        for tile, threads in (((7, 11), 3), ((64, 1), 1), ((1, 4096), 2)):
            monkeypatch.setattr(v, "_ROWS", tile[0])
            monkeypatch.setattr(v, "_COLUMNS", tile[1])
            torch.set_num_threads(threads)
            again = v.count_pairs(rows[order], labels[order], *more)
            assert torch.equal(again.genuine_C, whole.genuine_C)
            assert torch.equal(again.impostor_C, whole.impostor_C)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def counts(scores: list[int]) -> torch.Tensor:
    return torch.bincount(torch.tensor(scores), minlength=2**17 + 1)


def of_cells(genuine: list[int], impostor: list[int]) -> v.PairCounts:
    return v.PairCounts(counts(genuine), counts(impostor))


def by_sklearn(genuine, impostor):
    truth = [1] * len(genuine) + [0] * len(impostor)
    scores = [c / 2**16 - 1 for c in [*genuine, *impostor]]
    return roc_curve(truth, scores, drop_intermediate=False)


def test_tar_is_that_of_the_roc_curve_of_scikit_learn():
    rows, labels = clustered(120, 6, 4)
    pairs = v.count_pairs(rows, labels)
    genuine, impostor = cells(pairs.genuine_C), cells(pairs.impostor_C)
    fpr, tpr, thresholds = by_sklearn(genuine, impostor)
    fars = [0.5, 0.1, 0.02, 0.01, 0.001, 1 / len(impostor), 1e-9]
    result = v.verification(pairs, fars)
    for point in (*result.points, *result.roc):
        allowed = fpr <= point.far
        assert point.tar == tpr[allowed].max()
        # sklearn's thresholds are scores; ours is the lowest of the grid that does the same.
        assert point.threshold <= thresholds[allowed & (tpr == point.tar)].min()
        accepted = np.array([*impostor]) / 2**16 - 1 >= point.threshold
        assert accepted.mean() <= point.far < 1 or point.far == 1
        below = np.array([*impostor]) / 2**16 - 1 >= point.threshold - 2**-16
        assert below.mean() > point.far or point.threshold == -1
    assert (result.genuine, result.impostor) == (len(genuine), len(impostor))


def test_eer_is_where_scikit_learns_curve_crosses():
    rows, labels = clustered(120, 6, 4)
    pairs = v.count_pairs(rows, labels)
    result = v.verification(pairs)
    fpr, tpr, _ = by_sklearn(cells(pairs.genuine_C), cells(pairs.impostor_C))
    gap = fpr - (1 - tpr)  # rises along the curve
    k = int((gap >= 0).argmax())
    w = -gap[k - 1] / (gap[k] - gap[k - 1])
    assert result.eer == pytest.approx(fpr[k - 1] + w * (fpr[k] - fpr[k - 1]), abs=1e-12)
    assert 0.05 < result.eer < 0.45


def test_figures_by_hand():
    # FAR >= t: 0.1 -> 3/4, 0.2 -> 2/4, 0.4 -> 1/4; TAR: 0.2 -> 4/4, 0.3 -> 3/4, 0.5 -> 2/4
    at = lambda *scores: [round((s + 1) * 2**16) for s in scores]  # noqa: E731
    pairs = of_cells(at(0.25, 0.375, 0.5, 0.75), at(0.0, 0.125, 0.25, 0.4375))
    result = v.verification(pairs, (0.5, 0.25, 0.2))
    assert [p.tar for p in result.points] == [1.0, 0.75, 0.5]
    assert [p.threshold for p in result.points] == [0.125 + 2**-16, 0.25 + 2**-16, 0.4375 + 2**-16]
    # Between (FAR, FRR) = (1/2, 0) at 0.25 and (1/4, 1/4) a cell above.
    assert result.eer == 0.25
    assert result.eer_threshold == 0.25 + 2**-16
    assert result.smallest_far == 30 / 4
    assert not any(p.supported for p in result.points)
    assert [p.far for p in result.roc] == [1.0]
    perfect = v.verification(of_cells(at(0.5, 0.6), at(0.1, 0.2)), (0.0001,))
    assert (perfect.eer, perfect.points[0].tar) == (0.0, 1.0)
    # The only impostor pair is of equal images: nothing may be accepted.
    twins = v.verification(of_cells(at(0.5), at(1.0)), (0.1,))
    assert (twins.points[0].tar, twins.points[0].threshold) == (0.0, 1 + 2**-16)
    assert twins.eer == 1.0


def test_a_rate_is_supported_from_thirty_false_accepts_on():
    scores = list(range(60_000, 60_300))
    result = v.verification(of_cells(scores, scores), (0.1, 0.0999))
    assert [p.supported for p in result.points] == [True, False]
    assert result.roc[0].far == result.smallest_far == 0.1
    assert all(p.supported for p in result.roc)


scores = st.lists(st.integers(0, 2**17), min_size=1, max_size=30)


@settings(max_examples=25)
@given(scores, scores)
def test_a_stricter_threshold_accepts_less(genuine, impostor):
    result = v.verification(of_cells(genuine, impostor), (0.001, 0.1, 0.5, 1.0))
    rising = [p.tar for p in (*result.points,)]
    falling = [p.threshold for p in (*result.points,)]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    assert rising[-1] == 1.0
    assert falling[-1] == -1.0
    assert 0 <= result.eer <= 1


@settings(max_examples=25)
@given(scores, scores)
def test_eer_is_the_same_when_the_two_kinds_and_the_sign_are_swapped(genuine, impostor):
    # FAR and FRR trade places.
    mirrored = ([2**17 - c for c in kind] for kind in (impostor, genuine))
    left, right = (v.verification(of_cells(*kinds)) for kinds in ((genuine, impostor), mirrored))
    assert left.eer == pytest.approx(right.eer, abs=1e-12)


@settings(max_examples=10)
@given(st.integers(0, 2**32 - 1))
def test_names_of_classes_do_not_matter(seed):
    rows, labels = clustered(50, 6, 5, seed=seed % 1000)
    renamed = torch.randperm(6, generator=torch.Generator().manual_seed(seed))[labels] - 3
    pairs, again = v.count_pairs(rows, labels), v.count_pairs(rows, renamed)
    assert torch.equal(pairs.genuine_C, again.genuine_C)
    assert torch.equal(pairs.impostor_C, again.impostor_C)
    swapped = v.count_pairs(rows[:20], labels[:20], rows[20:], labels[20:])
    other = v.count_pairs(rows[20:], labels[20:], rows[:20], labels[:20])
    assert torch.equal(swapped.genuine_C, other.genuine_C)
    assert torch.equal(swapped.impostor_C, other.impostor_C)


def slow_identification(rows, labels, gallery, gallery_labels, fpir, draws, seed):
    """Search by search, with the classes and images that were drawn for enrolment."""
    alone = gallery is None
    store, store_labels = (rows, labels) if alone else (gallery, gallery_labels)
    unit, stored = (F.normalize(t.double(), dim=1) for t in (rows, store))
    mated, nonmated = [], []
    for draw in range(draws):
        rng = generator(seed, "open set", draw)
        classes, chosen = v._enrol(store_labels.numpy(), alone, rng)
        of_class = {c: [i for i in chosen.tolist() if store_labels[i] == c] for c in classes}
        means = {c: F.normalize(stored[i].mean(0), dim=0) for c, i in of_class.items()}
        for i, label in enumerate(labels.tolist()):
            if alone and i in chosen:
                continue
            score, best = max((float(unit[i] @ mean), c) for c, mean in means.items())
            if label in means:
                mated.append((grid(score), best == label))
            else:
                nonmated.append(grid(score))
    for t in sorted({0, *(c + 1 for c in nonmated)}):
        if sum(c >= t for c in nonmated) <= fpir * len(nonmated):
            break
    hits = sum(right and c >= t for c, right in mated)
    return hits / len(mated), t / 2**16 - 1, len(mated), len(nonmated)


@pytest.mark.parametrize("sides", ["alone", "gallery"])
def test_identification_is_that_of_each_search_by_itself(sides):
    rows, labels = clustered(90, 9, 4, noise=0.8)
    more = (None, None)
    if sides == "gallery":
        more = rows[40:], labels[40:]
        rows, labels = rows[:40], labels[:40]
    result = v.identification(rows, labels, *more, fpir=0.1, draws=3, seed=5)
    slow = slow_identification(rows, labels, *more, 0.1, 3, 5)
    assert (result.dir, result.threshold, result.mated, result.nonmated) == pytest.approx(slow)
    assert result.dir_low <= result.dir <= result.dir_high
    assert result.dir_low < result.dir_high
    assert result.enrolled == 4
    assert not result.supported
    assert 0 < result.dir < 1


@pytest.mark.parametrize("draws", [1, 4])
def test_a_rate_of_strangers_needs_thirty_of_them_in_a_draw(draws):
    """Six classes of 20, of which three are enrolled: 60 strangers in each draw."""
    labels = torch.arange(6).repeat_interleave(20)
    rows = torch.randn(120, 4, generator=torch.Generator().manual_seed(0))
    for fpir, supported in ((0.5, True), (0.49, False)):
        result = v.identification(rows, labels, fpir=fpir, draws=draws)
        assert result.nonmated == 60 * draws
        assert result.supported == supported


def test_a_gallery_of_one_class_can_be_searched():
    """That one is enrolled: its own queries are to be found, all others refused."""
    one, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    rows, labels = torch.cat([one.repeat(4, 1), other.repeat(6, 1)]), [7] * 4 + [8] * 6
    result = v.identification(rows, torch.tensor(labels), one, torch.tensor([7]), draws=2)
    assert (result.dir, result.enrolled, result.mated, result.nonmated) == (1.0, 1, 8, 12)


def test_half_of_the_images_of_half_of_the_classes_are_enrolled():
    labels = np.repeat(np.arange(10), [1, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    drawn = set()
    for draw in range(30):
        classes, rows = v._enrol(labels, True, generator(0, "open set", draw))
        assert len(classes) == 5
        assert min(classes) >= 2
        sizes = {c: int((labels == c).sum()) for c in classes.tolist()}
        assert {c: int((labels[rows] == c).sum()) for c in sizes} == {
            c: size // 2 for c, size in sizes.items()
        }
        assert len(set(rows.tolist())) == len(rows)
        drawn |= set(classes.tolist())
    assert drawn == set(range(2, 10))


def test_more_enrolled_classes_more_false_positives():
    """At the threshold found with few classes, more than the limit pass with many."""
    rows, labels = clustered(4000, 400, 8)
    few = v.identification(rows[labels < 40], labels[labels < 40], fpir=0.05)
    many = v.identification(rows, labels, fpir=0.05)
    assert (few.enrolled, many.enrolled) == (20, 200)
    assert many.threshold > few.threshold


def test_what_cannot_be_measured_is_refused():
    rows, labels = clustered(20, 3, 4)
    with pytest.raises(ValueError, match="pairs of one class and pairs of two, got 190 and 0"):
        v.verification(v.count_pairs(rows, torch.zeros(20, dtype=torch.int64)))
    with pytest.raises(ValueError, match="got 0 and 190"):
        v.verification(v.count_pairs(rows, torch.arange(20)))
    with pytest.raises(ValueError, match="above 0 and at most 1, but is 0"):
        v.verification(v.count_pairs(rows, labels), (0.1, 0))
    for wrong in ({"fpir": 0.0}, {"draws": 0}):
        with pytest.raises(ValueError, match="FPIR above 0"):
            v.identification(rows, labels, **wrong)
    for alone in (torch.zeros(20, dtype=torch.int64), torch.arange(20)):
        assert v.identification(rows, alone) is None
    for function in (v.count_pairs, v.identification):
        with pytest.raises(ValueError, match="together, or neither"):
            function(rows, labels, rows)
        with pytest.raises(ValueError, match="labels must be integers"):
            function(rows, labels.float())


@pytest.mark.parametrize("sides", ["alone", "gallery"])
def test_confusions_are_those_of_a_count_by_hand(sides):
    rows, labels = clustered(60, 6, 3, noise=0.7)
    store, store_labels = rows, labels
    if sides == "gallery":
        store, store_labels = clustered(50, 6, 3, noise=0.7)
        store_labels[store_labels == 5] = 4  # queries of class 5 have nothing to find
    else:
        labels[7] = 9  # nor has the only image of a class
    cosine = F.normalize(rows.double(), dim=1) @ F.normalize(store.double(), dim=1).T
    more = (store, store_labels)
    if sides == "alone":
        cosine.fill_diagonal_(-2)
        more = ()  # type: ignore[assignment]
    best = cosine.argmax(1)
    result = hardest_confusions(rows, labels, *more, most=100)
    used = torch.isin(labels, store_labels) & (labels != 9)
    assert not used.all()
    lowers = []
    for c in result:
        (a, b), n = c.classes, sum(c.queries)
        for i, (own, other) in enumerate(((a, b), (b, a))):
            mine = used & (labels == own)
            assert c.queries[i] == int(mine.sum())
            assert c.confused[i] == int((mine & (store_labels[best] == other)).sum())
        share, back = (k / max(q, 1) for k, q in zip(c.confused, c.queries, strict=True))
        assert share >= back
        assert {int(labels[c.query]), int(store_labels[c.neighbour])} == {a, b}
        assert c.neighbour == int(best[c.query])
        of_pair = [
            float(cosine[q, best[q]])
            for q in range(60)
            if used[q] and {int(labels[q]), int(store_labels[best[q]])} == {a, b}
        ]
        assert c.score == pytest.approx(max(of_pair), abs=1e-6)
        # The ends p of Wilson's interval solve (x - p)^2 = z^2 p (1 - p) / n.
        x, zz = sum(c.confused) / n, 1.959964**2 / n
        lowers.append(min(np.roots([1 + zz, -2 * x - zz, x * x])))
    assert all(one >= other - 1e-9 for one, other in itertools.pairwise(lowers))
    wrong = int((used & (store_labels[best] != labels)).sum())
    assert sum(sum(c.confused) for c in result) == wrong > 0
    assert hardest_confusions(rows, labels, *more, most=3) == result[:3]


def test_a_share_of_many_queries_counts_for_more():
    """9 of 20 + 20 before 1 of 2 + 2; a pair that is never confused is not there."""
    angle = torch.tensor
    at = lambda degrees: torch.stack(  # noqa: E731
        [torch.cos(torch.deg2rad(degrees)), torch.sin(torch.deg2rad(degrees))], 1
    )
    # Classes 0, 1: 20 images each, 9 of class 1 lie singly among pairs of class 0.
    many = torch.arange(20) * 1.0
    inside = torch.arange(9) * 2 + 0.3
    apart = 80 + torch.arange(11) * 0.5
    few = angle([200.0, 203.0, 206.0, 201.6])
    rows = at(torch.cat([many, inside, apart, few]))
    labels = torch.tensor([0] * 20 + [1] * 20 + [2, 2, 3, 3])
    first, second = hardest_confusions(rows, labels)
    assert set(first.classes) == {0, 1}
    assert set(second.classes) == {2, 3}
    assert sum(second.confused) / 4 > sum(first.confused) / 40
