"""Where the names in a chart stand: broken into lines, next to what they name, none touching."""

import re
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

FONT = 13
_SHAPES = ((12, 2), (15, 2), (18, 2), (22, 2), (22, 3))  # characters and lines
_WIDEST = (22, 2)
_REACH = 12  # pixels between a mark and its name up to which no line need tie them
_WIDTHS = {**dict.fromkeys("mwMW@", 0.95), **dict.fromkeys("fijlrt.,: ", 0.36)}  # of FONT
_HIDES = 9  # pixels from each other at which two marks can be told apart
_MARK = 6  # half the side of the square that a mark keeps free


def wrapped(labels: Sequence[str], room: float) -> list[str]:
    """Labels as narrow as shows them in full and fits ``room`` pixels below each other.

    If nothing does, two lines of each.
    """
    for width, lines in _SHAPES:
        texts = [wrap(label, width, lines) for label in labels]
        if not any("…" in text for text in texts) and stacked(texts) <= room:
            return texts
    return [wrap(label, *_WIDEST) for label in labels]


def wrap(label: str, width: int, most: int) -> str:
    """``most`` lines at most; of a longer label the end stays, which tells variants apart."""
    parts = _parts(label, width)
    lines = _fill(parts, width)
    for keep in range(len(parts) - 2, 0, -1):
        if len(lines) <= most:
            break
        lines = _fill([*parts[: keep - 1], parts[keep - 1].rstrip() + "…", parts[-1]], width)
    lines = lines if len(lines) <= most else [*lines[: most - 1], lines[most - 1] + "…"]
    return "\n".join(
        line if len(line) <= width + 1 else line[:width].rstrip("…") + "…" for line in lines
    )


def _parts(label: str, width: int) -> list[str]:
    """Where a label may be broken: after spaces and signs, in a long word also after _ and =."""
    parts = []
    for part in re.findall(r"[^\s:,/-]*[\s:,/-]|[^\s:,/-]+", " ".join(label.split())):
        parts += re.findall(r"[^=_]*[=_]|[^=_]+", part) if len(part) > width else [part]
    return parts


def _fill(parts: Sequence[str], width: int) -> list[str]:
    lines = [""]
    for part in parts:
        if lines[-1] and len(lines[-1]) + len(part.rstrip()) > width:
            lines.append("")
        lines[-1] += part
    return [line.rstrip() for line in lines]


def stacked(texts: Sequence[str]) -> float:
    """The height of all texts below each other."""
    return sum(text_height(text) + 3 for text in texts)


def text_width(text: str) -> float:
    """About as wide as the text is in any of the fonts that may draw it."""
    return max(sum(_WIDTHS.get(sign, 0.61) for sign in line) for line in text.split("\n")) * FONT


def text_height(text: str) -> float:
    """The height of all lines of the text."""
    return (text.count("\n") + 1) * FONT * 1.15


def apart(
    wanted: Sequence[float], heights: Sequence[float], low: float, high: float
) -> list[float]:
    """Centres as near to ``wanted`` as room allows, in the same order, without overlap."""
    order = sorted(range(len(wanted)), key=lambda i: (wanted[i], i))
    place = {i: wanted[i] for i in order}
    for _ in range(200):
        for below, above in pairwise(order):
            overlap = (heights[below] + heights[above]) / 2 - (place[above] - place[below])
            if overlap > 0:
                place[below] -= overlap / 2
                place[above] += overlap / 2
        for i in order:
            place[i] = min(max(place[i], low + heights[i] / 2), high - heights[i] / 2)
    return [place[i] for i in range(len(wanted))]


def side_by_side(marks: np.ndarray) -> np.ndarray:
    """Marks [N, 2] with those that would hide each other moved a few pixels to the sides."""
    moved = np.array(marks, dtype=float)
    order = np.lexsort((-moved[:, 1], moved[:, 0]))
    for _ in range(50):
        for at, i in enumerate(order):
            for j in order[at + 1 :]:
                gap = moved[j] - moved[i]
                if abs(gap[1]) < _HIDES and gap[0] < _HIDES:
                    moved[i, 0] -= (_HIDES - gap[0]) / 2
                    moved[j, 0] += (_HIDES - gap[0]) / 2
    return moved


def beside(
    marks: np.ndarray, sizes: np.ndarray, lines: np.ndarray, taken: np.ndarray, area: np.ndarray
) -> tuple[np.ndarray, list[bool]]:
    """Centres [N, 2] of the names of marks that may lie close together, and for each whether it
    needs a line that ties it to its mark.

    Boxes are (left, bottom, right, top). Names had better not cover ``lines`` [M, 4], must not
    cover what is ``taken`` [K, 4], and must not leave the ``area`` [4].
    """
    best: tuple[float, np.ndarray] = np.inf, marks
    for order in (np.argsort(k, kind="stable") for k in (marks[:, 1], -marks[:, 1], marks[:, 0])):
        solid = np.concatenate([_boxes(marks, 2 * _MARK), taken.reshape(-1, 4)])
        places, total = np.array(marks, float), 0.0
        for i in order:
            choices = _choices(marks[i], sizes[i])
            costs = _costs(choices, marks[i], sizes[i], i, solid, lines, area)
            places[i], total = choices[costs.argmin()], total + float(costs.min())
            tie = _ties(marks[i], places[i][None], sizes[i])[0]
            solid = np.concatenate([solid, _boxes(places[i][None], sizes[i] + 3), _boxes(tie, 2)])
        if total < best[0] - 1e-6:
            best = total, places
    places = best[1]
    ends = nearest_point(marks, places, sizes)
    return places, [bool(gap > _REACH) for gap in np.linalg.norm(ends - marks, axis=1)]


def nearest_point(marks: np.ndarray, places: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The point of each name's box that is nearest to its mark."""
    return np.asarray(np.clip(marks, places - sizes / 2, places + sizes / 2))


def _choices(mark: np.ndarray, size: np.ndarray) -> np.ndarray:
    """[C, 2] centres around a mark: on either side at some heights, above and below."""
    steps = np.arange(-21, 22) * 6.0
    sides = [
        (way * (gap + size[0] / 2), shift)
        for way in (1, -1)
        for gap in (9.0, 20.0, 34.0, 52.0)
        for shift in steps
    ]
    over = [
        (shift * size[0] / 4, way * (gap + size[1] / 2))
        for way in (1, -1)
        for gap in (7.0, 16.0, 28.0, 44.0, 64.0)
        for shift in (0, -1, 1, -2, 2)
    ]
    return np.asarray(mark + np.array([*sides, *over]))


def _boxes(centres: np.ndarray, sizes: np.ndarray | float) -> np.ndarray:
    return np.concatenate([centres - sizes / 2, centres + sizes / 2], axis=1)


def _overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[A, B] how much each box of ``a`` overlaps each of ``b``: 0, or 1 and more with the area."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    sides = np.clip(high - low, 0, None)
    touching = np.all(high > low, axis=2)
    return np.asarray(touching * (1 + sides.prod(axis=2) / 200))


def _ties(mark: np.ndarray, places: np.ndarray, size: np.ndarray) -> np.ndarray:
    """[C, 9, 2] points along the line from the mark to each place of its name."""
    ends = nearest_point(mark[None], places, size[None])
    along = np.linspace(0.1, 0.98, 9)[None, :, None]
    return np.asarray(mark + (ends - mark)[:, None] * along)


def _costs(
    places: np.ndarray,
    mark: np.ndarray,
    size: np.ndarray,
    own: int,
    solid: np.ndarray,
    lines: np.ndarray,
    area: np.ndarray,
) -> np.ndarray:
    """[C] how bad each place of a name is; ``solid`` is what stands there, its mark at ``own``."""
    boxes = _boxes(places, size)
    outside = np.clip(area[:2] - boxes[:, :2], 0, None) + np.clip(boxes[:, 2:] - area[2:], 0, None)
    ends = nearest_point(mark[None], places, size[None])
    gap = np.linalg.norm(ends - mark, axis=1)
    cost = 1000 * (outside.sum(axis=1) > 0) + 20 * outside.sum(axis=1)
    cost = cost + 600 * _overlap(boxes, solid).sum(axis=1)
    cost = cost + 30 * (_overlap(boxes, lines) > 0).sum(axis=1)
    ties, others = _ties(mark, places, size)[:, :, None], np.delete(solid, own, axis=0)
    # [C] how many of a tie's points lie in what stands there.
    hits = ((ties > others[:, :2]) & (ties < others[:, 2:])).all(axis=3).sum(axis=(1, 2))
    cost = cost + 40 * hits * (gap > _REACH)
    # Right of its mark, at its height, is where a reader looks for a name.
    cost = cost + gap + 0.25 * np.abs(places[:, 1] - mark[1]) + 14 * (gap > _REACH)
    return np.asarray(cost + 5 * (places[:, 0] < mark[0] - 1) + 2 * (places[:, 0] < mark[0] + 1))
