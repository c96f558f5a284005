"""How sure a retrieval figure is, and what it is judged against: bootstrap over classes.

Images of one class resemble each other, so classes are drawn again, not queries, each with all of
its queries; the gallery stays as it is. Figures are compared on the same draws (paired). Several
training seeds are drawn again too, independently of classes (the pigeonhole bootstrap, Owen 2007,
Annals of Applied Statistics 1(2)).

Of few classes the plain percentiles of a bootstrap are too narrow: they lack Student's t and a
factor of C / (C - 1). Percentiles farther out make up for both (the expanded percentile interval,
Hesterberg 2015, The American Statistician 69(4)).

Shape suffixes: S seeds, C classes, B draws.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist

import numpy as np

from fedss.seeds import generator

FLOORS = {
    "chance": "chance",
    "pixels": "raw pixels",
    "untrained": "untrained network",
    "frozen": "frozen backbone",
    "frozen_centred": "centred backbone",
    "frozen_whitened": "whitened backbone",
}
"""What a figure is judged against, by its name for people; see `fedss.evaluation.baselines`. Those
of a frozen backbone are there at another image size, too: `frozen_at_224`."""

_AT_SIDE = re.compile(r"(frozen\w*?)_at_([1-9]\d{0,4})")

FEWEST_CLASSES = 6
"""Test classes below which nothing can be shown: of two methods that do equally well, one is better
in each of C classes with probability 2^(1 - C), more than 5 % where C < 6 (sign test)."""

ENOUGH_CLASSES = 25
"""Test classes from which on a test is not called weak. Half of a 95 % interval is about
1.96 s / sqrt(C), s the standard deviation over classes of a class's MAP@10: at most 0.5, and about
0.25 where most is to be told, which gives 0.1 at 25 classes and 0.05 at 100."""

DRAWS = 2000
_LEVEL = 0.95
_BLOCK = 2**22  # classes drawn at a time


def floor_order(names: Iterable[str]) -> list[str]:
    """Those of the names that are floors', each once, as :data:`FLOORS` lists them; then those at
    another image size."""
    kinds, kept = [*FLOORS], set(names)
    parts = {name: _kind_and_side(name) for name in kept}
    order = {n: (side, kinds.index(kind)) for n, (kind, side) in parts.items() if kind in kinds}
    return sorted(order, key=order.__getitem__)


def floor_words(name: str) -> str:
    """A floor's name for people: ``frozen backbone at 224 px``."""
    kind, side = _kind_and_side(name)
    return FLOORS[kind] + (f" at {side} px" if side else "")


def _kind_and_side(name: str) -> tuple[str, int]:
    at = _AT_SIDE.fullmatch(name)
    return (name, 0) if at is None else (at[1], int(at[2]))


@dataclass(frozen=True)
class ClassScores:
    """MAP@10 of each class of a test, for one model: of the C classes, in the order of their names,
    the number of queries, int64 [C], and their mean AP@10, float64 [C].
    """

    names: tuple[str, ...]
    queries_C: np.ndarray
    map_at_10_C: np.ndarray

    @property
    def map_at_10(self) -> float:
        """The mean over all queries."""
        return float(np.average(self.map_at_10_C, weights=self.queries_C))


@dataclass(frozen=True)
class Interval:
    """A figure, or a difference of two, and the ends of its 95 % interval; of how many classes."""

    value: float
    low: float
    high: float
    classes: int

    @property
    def shown(self) -> bool:
        """Whether a difference is: 0 lies outside, and there are classes enough to tell."""
        return self.classes >= FEWEST_CLASSES and (self.low > 0 or self.high < 0)


def interval(seeds: Sequence[ClassScores]) -> Interval | None:
    """The 95 % interval of the mean over queries, and over training seeds where there are several.

    None of one class: nothing tells how another one would have done.

    >>> scores = ClassScores(("a", "b"), np.array([2, 2]), np.array([0.5, 0.5]))
    >>> interval([scores])
    Interval(value=0.5, low=0.5, high=0.5, classes=2)
    """
    classes = len(seeds[0].names)
    if classes < 2:
        return None
    means_BS = _means(np.stack([s.map_at_10_C for s in seeds]), seeds[0].queries_C)
    value = sum(s.map_at_10 for s in seeds) / len(seeds)
    return _ends(value, _over_seeds(means_BS, 0), classes)


def difference(
    ours: Sequence[ClassScores], theirs: Sequence[ClassScores], paired: bool
) -> Interval | None:
    """The 95 % interval of what ours are better by, on the same draws of classes.

    Either side has one for each training seed; one that has no seed may be repeated. ``paired``:
    both are of the same seeds in the same order, which are then drawn together. None where they are
    not of the same test, or this is of one class.
    """
    names, queries_C, classes = ours[0].names, ours[0].queries_C, len(ours[0].names)
    if classes < 2:
        return None
    for scores in (*ours, *theirs):
        if scores.names != names or not np.array_equal(scores.queries_C, queries_C):
            return None
    sides = [np.stack([s.map_at_10_C for s in scores]) for scores in (ours, theirs)]
    value = float(np.average(sides[0].mean(0) - sides[1].mean(0), weights=queries_C))
    if paired:
        return _ends(value, _over_seeds(_means(sides[0] - sides[1], queries_C), 0), classes)
    ours_B, theirs_B = (
        _over_seeds(_means(values_SC, queries_C), side) for side, values_SC in enumerate(sides)
    )
    return _ends(value, ours_B - theirs_B, classes)


def weakness(classes: int) -> str:
    """What is to be said of a test of so many classes; empty if it has enough."""
    if classes < FEWEST_CLASSES:
        few = "one class" if classes == 1 else f"{classes} classes"
        return (
            f"a test of {few} tells nothing for sure: take {FEWEST_CLASSES}, better "
            f"{ENOUGH_CLASSES} or more"
        )
    if classes < ENOUGH_CLASSES:
        return (
            f"a test of {classes} classes is weak: with {ENOUGH_CLASSES} figures are good to about "
            "0.1"
        )
    return ""


def _means(values_SC: np.ndarray, queries_C: np.ndarray) -> np.ndarray:
    """Means over queries in each draw of classes, float64 [B, S]; the same draws for all of C."""
    classes, rng = len(queries_C), generator(0, "bootstrap classes")
    step = max(1, _BLOCK // classes)
    means = []
    for first in range(0, DRAWS, step):
        rows = min(step, DRAWS - first)
        drawn = rng.integers(classes, size=(rows, classes)) + classes * np.arange(rows)[:, None]
        times_BC = np.bincount(drawn.ravel(), minlength=rows * classes).reshape(rows, classes)
        weight_BC = times_BC * queries_C
        means.append(weight_BC @ values_SC.T / weight_BC.sum(1, keepdims=True))
    return np.concatenate(means)


def _over_seeds(means_BS: np.ndarray, stream: int) -> np.ndarray:
    """Means over seeds that each draw resamples with replacement, float64 [B]."""
    draws, seeds = means_BS.shape
    if seeds == 1:
        return means_BS[:, 0]
    chosen_BS = generator(0, "bootstrap seeds", stream).integers(seeds, size=(draws, seeds))
    return np.asarray(np.take_along_axis(means_BS, chosen_BS, 1).mean(1))


def _ends(value: float, means_B: np.ndarray, classes: int) -> Interval:
    wider = sqrt(classes / (classes - 1)) * student_t(1 - (1 - _LEVEL) / 2, classes - 1)
    rest = NormalDist().cdf(-wider)
    low, high = np.quantile(means_B, [rest, 1 - rest])
    return Interval(value, float(low), float(high), classes)


def student_t(share: float, freedom: int) -> float:
    """Student's t below which ``share`` lies, by its expansion about the normal distribution.

    (Abramowitz and Stegun 1964, 26.7.5. At 0.975 within 0.2 % from 5 degrees of freedom on.)
    """
    z, n = NormalDist().inv_cdf(share), freedom
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    )
