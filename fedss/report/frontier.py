"""The frontier: how well each variant does against the bytes it moves, as a page's chart or a PNG.

A variant is on the frontier if no other is at least as cheap and at least as good, and better in
one of the two. Marks that would hide each other are drawn side by side, a few pixels off.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedss.report import charts
from fedss.report.charts import Colors, Level, Point
from fedss.report.labels import (
    FONT,
    beside,
    nearest_point,
    side_by_side,
    text_height,
    text_width,
    wrap,
)

MOST_PANELS = 4
PANEL_SIZE = 5.8 * 72, 4.4 * 72  # of several: two beside each other stay readable at 800 pixels
_SHAPE = 24, 2  # most characters and lines of a name beside its mark
Box = tuple[float, float, float, float]
"""Left, bottom, right and top, in units of the figure."""


@dataclass(frozen=True)
class FrontierPoint:
    """A variant: bytes per client and round, its score, and the ends of the score's interval."""

    label: str
    slot: str
    moved: float
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class FrontierPanel:
    """The variants on one data set."""

    title: str
    points: tuple[FrontierPoint, ...]
    level: Level | None
    relative: bool = False  # all scores to the full softmax


def on_frontier(points: Sequence[FrontierPoint]) -> list[bool]:
    """For each variant whether no other is as cheap and as good, and better in one of the two."""
    return [
        not any(
            other.moved <= point.moved
            and other.mean >= point.mean
            and (other.moved < point.moved or other.mean > point.mean)
            for other in points
        )
        for point in points
    ]


def frontier_chart(name: str, panel: FrontierPanel, alt: str) -> Markup:
    """The chart of a page."""
    size = charts.WIDTH, charts.tall(len(panel.points))
    figure, ax = charts.new_figure(size)
    _draw_panel(ax, panel, (0, 0, *size), _score_range([panel]), charts.STAND_IN)
    return charts.as_svg(figure, name, alt)


def frontier_png(panels: Sequence[FrontierPanel], colors: Colors) -> bytes:
    """One panel of 6.4 x 4 inches, or up to four in two columns, at 200 dpi."""
    wide, high = charts.PNG_SIZE if len(panels) == 1 else PANEL_SIZE
    columns, rows = min(len(panels), 2), (len(panels) + 1) // 2
    figure = Figure(figsize=(columns * wide / 72, rows * high / 72), dpi=72)
    shared = _score_range(panels) if all(panel.relative for panel in panels) else None
    for i, panel in enumerate(panels):
        ax = charts.style(figure.add_subplot(rows, columns, i + 1), colors)
        left, bottom = wide * (i % 2), high * (rows - 1 - i // 2)
        area = (left, bottom, left + wide, bottom + high)
        _draw_panel(ax, panel, area, shared or _score_range([panel]), colors)
    return charts.as_png(figure, colors)


def _score_range(panels: Sequence[FrontierPanel]) -> Point:
    """The lowest and highest score on the axis.

    What lies far from the frontiers would press all else together: its value is named at the edge.
    """
    points = [point for panel in panels for point in panel.points]
    best = [is_on for panel in panels for is_on in on_frontier(panel.points)]
    low = min(point.low for point, is_on in zip(points, best, strict=True) if is_on)
    high = max(point.high for point in points)
    far = max(high - low, 0.08 * abs(high))
    low = min([low, *(point.low for point in points if point.mean >= low - far)])
    levels = [panel.level[2] for panel in panels if panel.level is not None]
    high = max([high, *(level for level in levels if level <= high + 0.4 * far)])
    room = (high - low) or 0.1 * abs(high) or 1.0
    return low - 0.12 * room, high + 0.1 * room


def _draw_panel(ax: Axes, panel: FrontierPanel, area: Box, scores: Point, colors: Colors) -> None:
    """Draw within ``area``."""
    left, bottom = area[0] + 42, area[1] + 46
    right, top = area[2] - 14, area[3] - (54 if panel.title else 30)
    charts.place_axes(ax, left, bottom, right, top)
    moved = np.array([point.moved for point in panel.points])
    span = max(moved.max() / moved.min(), 1.5)
    ax.set_xscale("log")
    beside = span ** (0.12 if len(moved) > charts.FEW else 0.25)  # of few, names fit at the sides
    ax.set_xlim(moved.min() / beside, moved.max() * beside)
    ax.set_ylim(*scores)
    charts.bytes_ticks(ax, moved.max() / moved.min())
    ax.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    ax.set_xlabel("bytes per client and round, both ways (log)", loc="right")
    axis = "MAP@10 ÷ full" if panel.relative else "MAP@10"
    charts.write(ax, (area[0] + 8, top + 16), axis, colors["muted"], FONT - 1)
    if panel.title:
        charts.write(ax, (area[0] + 8, area[3] - 18), panel.title, colors["ink"], FONT + 1)
    taken = []
    if panel.relative:
        ax.axhline(1.0, color=colors["ink"], linewidth=1, alpha=0.45, zorder=1)
    if panel.level is not None:
        taken.append(_draw_level(ax, panel, (right, top), colors))
    best = on_frontier(panel.points)
    edge = sorted({(p.moved, p.mean) for p, is_on in zip(panel.points, best, strict=True) if is_on})
    ax.step(
        *zip(*edge, strict=True),
        where="post",
        color=colors["muted"],
        linewidth=1.2,
        alpha=0.75,
        zorder=1.5,
    )
    lowest = scores[0] + 0.04 * (scores[1] - scores[0])  # of a mark, if its score is below
    marks = side_by_side(_pixels(ax, [(p.moved, max(p.mean, lowest)) for p in panel.points]))
    for point, mark, is_on in zip(panel.points, marks, best, strict=True):
        _draw_point(ax, point, mark, is_on, colors)
    _name_points(ax, panel, marks, best, _pixels(ax, edge), taken, area[2] - 4, colors)


def _draw_level(ax: Axes, panel: FrontierPanel, corner: Point, colors: Colors) -> Box:
    """Draw pooled training at its height, or name it at the top edge; the box of its name."""
    assert panel.level is not None
    label, slot, score = panel.level
    right, y = corner[0], corner[1] + 16
    text = f"{label} {_number(panel, score)}↑"
    if score <= ax.get_ylim()[1]:
        ax.axhline(score, color=colors[slot], linewidth=1.6, dashes=charts.dashes(slot))
        text, y = label, float(_pixels(ax, [(1.0, score)])[0, 1]) + 10
    charts.write(ax, (right, y), text, colors[slot], FONT, "right")
    return right - text_width(text), y - 9, right, y + 9


def _number(panel: FrontierPanel, score: float) -> str:
    return f"{score:.{2 if panel.relative else 3}f}"


def _draw_point(
    ax: Axes, point: FrontierPoint, mark: np.ndarray, is_on: bool, colors: Colors
) -> None:
    color = colors[point.slot]
    x, y = ax.transData.inverted().transform(mark)
    if point.high > point.low:
        ax.plot(
            [x, x],
            [point.low, point.high],
            color=color,
            linewidth=1.4,
            alpha=0.6 if is_on else 0.35,
            zorder=2,
        )
    ax.plot(
        [x],
        [y],
        charts.MARKERS.get(point.slot, "o"),
        markersize=8 if is_on else 6.5,
        markerfacecolor=color if is_on else colors["paper"],
        markeredgecolor=colors["paper"] if is_on else color,
        markeredgewidth=1 if is_on else 1.4,
        zorder=4 if is_on else 3,
    )


def _name_points(
    ax: Axes,
    panel: FrontierPanel,
    marks: np.ndarray,
    best: Sequence[bool],
    edges: np.ndarray,
    taken: Sequence[Box],
    right: float,
    colors: Colors,
) -> None:
    """Write each name beside its mark; what is beaten is written in a quieter colour."""
    points, lowest = panel.points, ax.get_ylim()[0]
    low = _pixels(ax, [(p.moved, p.low) for p in points])
    high = _pixels(ax, [(p.moved, p.high) for p in points])
    below = [f" {_number(panel, p.mean)}↓" if p.mean < lowest else "" for p in points]
    texts = [wrap(p.label + extra, *_SHAPE) for p, extra in zip(points, below, strict=True)]
    sizes = np.array([(text_width(text), text_height(text)) for text in texts])
    lines = [
        (mark[0] - 1, a[1], mark[0] + 1, b[1]) for mark, a, b in zip(marks, low, high, strict=True)
    ]
    for a, b in pairwise(edges):
        lines += [(a[0], a[1] - 1, b[0], a[1] + 1), (b[0] - 1, a[1], b[0] + 1, b[1])]
    if panel.relative:
        y = float(_pixels(ax, [(1.0, 1.0)])[0, 1])
        lines.append((ax.bbox.x0, y - 1, ax.bbox.x1, y + 1))
    area = np.array([ax.bbox.x0 + 2, ax.bbox.y0 + 4, right, ax.bbox.y1 + 4])
    places, tied = beside(marks, sizes, np.array(lines), np.array(taken), area)
    ends = nearest_point(marks, places, sizes)
    for i, point in enumerate(points):
        if tied[i]:
            charts.tie(ax, tuple(marks[i]), tuple(ends[i]), colors[point.slot], gap=4)
        color = colors[point.slot] if best[i] else colors["muted"]
        # Held where it is nearest to its mark: only the far end depends on the reader's font.
        way = int(np.sign(ends[i, 0] - marks[i, 0]))
        x = places[i, 0] - way * sizes[i, 0] / 2
        side = {1: "left", 0: "center", -1: "right"}[way]
        charts.write(ax, (x, places[i, 1]), texts[i], color, FONT, side)


def _pixels(ax: Axes, values: Sequence[Point]) -> np.ndarray:
    return np.asarray(ax.transData.transform(np.array(values)))
