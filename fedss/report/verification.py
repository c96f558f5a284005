"""Verification, open-set identification and the hardest confusions, as a page shows them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from fedss.evaluation.verification import OperatingPoint, Verification
from fedss.report import charts
from fedss.report.labels import FONT, beside, text_height, text_width, wrapped
from fedss.report.panels import SMALL_SIDE, Thumbnail, data_uri
from fedss.runs import headlines
from fedss.runs.reading import Group
from fedss.text import decimals

_SHOWN = (0.01, 0.001)  # FARs of a comparison's columns
_LEAST = 1e-4  # FAR at the left end of a chart: below, curves of many images say little
_SUPERSCRIPT = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
RocMark = tuple[float, float, str]
"""A point of an ROC and what to write beside it: FAR, TAR, text."""


@dataclass(frozen=True)
class RateRow:
    """A line of the table: what it is about, and (text, smaller addition) of each cell."""

    label: str
    slot: str
    cells: list[tuple[str, str]]


@dataclass(frozen=True)
class ConfusedPair:
    """Two classes with an image of each, and how often the one was taken for the other.

    ``taken`` has (text, share) of the queries of the first and of the second.
    """

    thumbnails: tuple[Thumbnail, Thumbnail]
    taken: tuple[tuple[str, str], tuple[str, str]]
    score: float


@dataclass(frozen=True)
class Confusions:
    """The hardest confusions of one method."""

    label: str
    slot: str
    pairs: list[ConfusedPair]
    small: bool


@dataclass(frozen=True)
class VerificationSection:
    """What a page says on pairs: figures of all methods that have any; ``headings`` in lines.

    ``least`` is the smallest FAR that the pairs support, ``enrolled`` the number of classes behind
    the figures of identification, 0 if there are none.
    """

    svg: Markup | None
    headings: list[tuple[str, ...]]
    lines: list[RateRow]
    genuine: int
    impostor: int
    least: float
    enrolled: int
    draws: int
    weak: bool
    confusions: Confusions | None


def verification_section(
    groups: Sequence[Group], slots: Sequence[str]
) -> VerificationSection | None:
    """Figures of the groups all of whose runs have them; None if there are none."""
    measured = {
        group.label: [run.verification for run in group.runs if run.verification is not None]
        for group in groups
    }
    paired = [
        (group, slot)
        for group, slot in zip(groups, slots, strict=True)
        if len(measured[group.label]) == len(group.runs)
    ]
    if not paired:
        return None
    every = [found for group, _ in paired for found in measured[group.label]]
    fars = [p.far for p in every[0].points if all(_supported(found, p.far) for found in every)]
    known = all(found.identification is not None for found in every)
    single = len(groups) == 1
    if single:
        headings: list[tuple[str, ...]] = [("",), ("rate",), ("threshold",)]
        lines = _single(every, fars, known)
    else:
        fars = [far for far in _SHOWN if far in fars]
        headings = [("method",), ("EER",), *(("TAR at", f"FAR {number(far)}") for far in fars)]
        if known and every[0].identification:
            headings.append(("DIR at", f"FPIR {number(every[0].identification.fpir)}"))
        lines = [
            RateRow(group.label, slot, _cells(measured[group.label], fars, known))
            for group, slot in paired
        ]
    curves = [
        curve
        for group, slot in paired
        if (curve := _curve(group.label, slot, measured[group.label])) is not None
    ]
    names = headlines.listed([curve.label for curve in curves]) if curves else ""
    marks = _marks(every, fars) if single else []
    shown = 0 < len(curves) <= charts.FEW
    first = every[0].identification
    return VerificationSection(
        svg=roc_chart("roc", curves, marks, f"TAR against FAR for {names}") if shown else None,
        headings=headings,
        lines=lines,
        genuine=every[0].genuine,
        impostor=every[0].impostor,
        least=max(found.smallest_far for found in every),
        enrolled=first.enrolled if known and first else 0,
        draws=first.draws if known and first else 0,
        weak=known and not all(f.identification and f.identification.supported for f in every),
        confusions=_confusions(paired),
    )


def number(rate: float) -> str:
    """``0.05``; a small one as ``10⁻³`` or ``5.8 · 10⁻⁷``."""
    if rate >= 0.0095:
        return f"{rate:.2g}"
    factor, _, exponent = f"{rate:.1e}".partition("e")
    power = f"10{int(exponent)}".replace("-", "⁻")
    power = power[:2] + power[2:].translate(_SUPERSCRIPT)
    return power if factor == "1.0" else f"{float(factor):g}\u00a0·\u00a0{power}"


def _supported(found: Verification, far: float) -> bool:
    return any(point.far == far and point.supported for point in found.points)


def _point(found: Verification, far: float) -> OperatingPoint:
    return next(point for point in found.points if point.far == far)


def _single(every: Sequence[Verification], fars: Sequence[float], known: bool) -> list[RateRow]:
    cells = _cells(every, fars, known)
    names = ["EER", *(f"TAR at FAR {number(far)}" for far in fars)]
    thresholds = [[found.eer_threshold for found in every]]
    thresholds += [[_point(found, far).threshold for found in every] for far in fars]
    if known:
        names.append(_dir_name(every))
        thresholds.append([f.identification.threshold for f in every if f.identification])
    return [
        RateRow(name, "", [cell, (decimals(float(np.mean(at))), "")])
        for name, cell, at in zip(names, cells, thresholds, strict=True)
    ]


def _dir_name(every: Sequence[Verification]) -> str:
    first = every[0].identification
    return "" if first is None else f"DIR at FPIR {number(first.fpir)}"


def _cells(
    every: Sequence[Verification], fars: Sequence[float], known: bool
) -> list[tuple[str, str]]:
    columns = [[found.eer for found in every]]
    columns += [[_point(found, far).tar for found in every] for far in fars]
    if known:
        columns.append([f.identification.dir for f in every if f.identification])
    return [(decimals(float(np.mean(c))), headlines.spread(c)) for c in columns]


def _curve(label: str, slot: str, every: Sequence[Verification]) -> charts.Curve | None:
    """TAR over FAR: mean, lowest and highest of the runs; none with less than two points."""
    rocs = [np.array([(point.far, point.tar) for point in found.roc]).T for found in every]
    far = max((fars for fars, _ in rocs), key=lambda fars: float(fars[0]))
    if far[0] < _LEAST:
        far = np.array([_LEAST, *far[far > _LEAST]])
    if len(far) < 2:
        return None
    tar = np.array([np.interp(np.log(far), np.log(fars), tars) for fars, tars in rocs])
    return charts.Curve(label, slot, far, tar.mean(axis=0), tar.min(axis=0), tar.max(axis=0))


def _marks(every: Sequence[Verification], fars: Sequence[float]) -> list[RocMark]:
    eer = float(np.mean([found.eer for found in every]))
    marks = [(eer, 1 - eer, f"EER {decimals(eer)}")]
    for far in fars:
        tar = float(np.mean([_point(found, far).tar for found in every]))
        marks.append((far, tar, decimals(tar)))
    return [mark for mark in marks if mark[0] >= max(found.smallest_far for found in every)]


def _confusions(paired: Sequence[tuple[Group, str]]) -> Confusions | None:
    """Those of the run, or of the best federated method."""
    having = [
        (group, slot, group.runs[0].confused)
        for group, slot in paired
        if group.runs[0].confused is not None and (len(paired) == 1 or not group.pooled)
    ]
    if not having:
        return None
    group, slot, found = max(having, key=lambda of: of[0].mean("map_at_10") or 0.0)
    if found is None or not len(found.scores):
        return None
    pairs = []
    for i in range(len(found.scores)):
        # The query may be of either class.
        own = int(found.shown[i, 0] != found.class_names[i, 0])
        order = (own, 1 - own)
        thumbnails = [
            Thumbnail(data_uri(found.pixels[i, order[k]]), str(found.class_names[i, k]))
            for k in (0, 1)
        ]
        taken = [
            (f"{n} of {of}", headlines.percent(n / of) if n else "")
            for n, of in zip(found.confused[i].tolist(), found.queries[i].tolist(), strict=True)
        ]
        both, score = (thumbnails[0], thumbnails[1]), float(found.scores[i])
        pairs.append(ConfusedPair(both, (taken[0], taken[1]), score))
    small = max(found.pixels.shape[-2:]) <= SMALL_SIDE
    return Confusions(group.label, slot, pairs, small)


def roc_chart(
    name: str, lines: Sequence[charts.Curve], marks: Sequence[RocMark], alt: str
) -> Markup:
    """TAR over FAR: one line with marks, or several with their names where they part, at the left.

    The end at the right is common to all lines, so that names there would tell nothing.
    """
    size = charts.WIDTH, charts.HEIGHT
    figure, ax = charts.new_figure(size)
    ax.set_xscale("log")
    ax.set_xlim(min(float(line.x[0]) for line in lines), 1)
    ax.set_ylim(0, 1)
    for line in lines:
        charts.draw_line(ax, line)
    ax.xaxis.set_major_locator(LogLocator(numticks=12))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda far, _: number(far)))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("FAR: pairs of two classes that are accepted (log)", loc="right")
    texts = [] if marks else wrapped([line.label for line in lines], 0.6 * (size[1] - 76))
    wide = 0.0 if marks else charts.LABEL_GAP + max(text_width(text) for text in texts)
    left, right, bottom, top = (38, 14, 46, 30) if marks else (wide, 38, 46, 30)
    charts.place_axes(ax, left, bottom, size[0] - right, size[1] - top)
    place, side = (8, "left") if marks else (size[0] - 8, "right")
    charts.write(ax, (place, size[1] - 12), "TAR", charts.STAND_IN["muted"], FONT - 1, side)
    if marks:
        _write_marks(ax, lines[0], marks)
    else:
        ax.yaxis.tick_right()
        ax.tick_params(axis="y", length=0)
        charts.label_starts(ax, lines, texts)
    return charts.as_svg(figure, name, alt)


def _write_marks(ax: Axes, line: charts.Curve, marks: Sequence[RocMark]) -> None:
    color = charts.STAND_IN[line.slot]
    points = np.asarray(ax.transData.transform(np.array([mark[:2] for mark in marks])))
    curve = np.asarray(ax.transData.transform(np.stack([line.x, line.mean], axis=1)))
    boxes = [
        (a[0], min(a[1], b[1]) - 2, b[0], max(a[1], b[1]) + 2) for a, b in pairwise(curve[::4])
    ]
    sizes = np.array([(text_width(mark[2]), text_height(mark[2])) for mark in marks])
    area = np.array([ax.bbox.x0 + 2, ax.bbox.y0 + 2, ax.bbox.x1 + 12, ax.bbox.y1 + 12])
    places, _ = beside(points, sizes, np.array(boxes), np.empty((0, 4)), area)
    for (far, tar, text), place in zip(marks, places, strict=True):
        is_eer = text.startswith("EER")
        ax.plot(
            [far],
            [tar],
            "D" if is_eer else "o",
            markersize=7,
            markerfacecolor=charts.STAND_IN["paper"] if is_eer else color,
            markeredgecolor=color,
            markeredgewidth=1.6,
            clip_on=False,
            zorder=4,
        )
        charts.write(ax, tuple(place), text, charts.STAND_IN["ink"], side="center")
