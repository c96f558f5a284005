"""Verification, open-set identification and the hardest confusions, as a page shows them."""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator

from fedss.evaluation.verification import OperatingPoint, Verification
from fedss.report import charts
from fedss.report.labels import FONT, beside, text_height, text_width, wrapped
from fedss.report.panels import data_uri, is_small
from fedss.runs import headlines
from fedss.runs.reading import Group
from fedss.text import decimals, listed

_SHOWN = (0.01, 0.001)  # FARs of a comparison's columns
_LEAST = 1e-4  # FAR at the left end of a chart: below, curves of many images say little
_SUPERSCRIPT = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
RocMark = tuple[float, float, str]
"""A point of an ROC and what to write beside it: FAR, TAR, text."""


def verification_section(groups: Sequence[Group], slots: Sequence[str]) -> dict[str, Any] | None:
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
    every = [run for group, _ in paired for run in measured[group.label]]
    first = every[0]
    # Those that all of the runs support.
    fars = [p.far for p in first.points if all(_point(run, p.far).supported for run in every)]
    known = all(run.identification is not None for run in every)
    if single := len(groups) == 1:
        headings: list[tuple[str, ...]] = [("figure",), ("rate",), ("threshold",)]
        lines = [
            (name, "", [_mean(rates, spread=True), _mean(thresholds)])
            for name, rates, thresholds in _figures(every, fars, known)
        ]
    else:
        fars = [far for far in _SHOWN if far in fars]
        names = [name for name, _, _ in _figures(every, fars, known)]
        # The first line of a heading ends with "at".
        headings = [("method",), *(tuple(re.split("(?<=at) ", name)) for name in names)]
        lines = []
        for group, slot in paired:
            figures = _figures(measured[group.label], fars, known)
            cells = [_mean(rates, spread=True) for _, rates, _ in figures]
            lines.append((group.label, slot, cells))
    curves = [_curve(group.label, slot, measured[group.label]) for group, slot in paired]
    drawn = [curve for curve in curves if curve is not None]
    marks = _marks(every, fars) if single else []
    svg = None
    if 0 < len(drawn) <= charts.FEW:
        labels = listed([curve.label for curve in drawn])
        svg = roc_chart("roc", drawn, marks, f"TAR against FAR for {labels}")
    identified = [run.identification for run in every if run.identification] if known else []
    return {
        "svg": svg,
        "headings": headings,
        "lines": lines,
        "genuine": first.genuine,
        "impostor": first.impostor,
        # The smallest FAR that the pairs support.
        "least": max(run.smallest_far for run in every),
        "enrolled": identified[0].enrolled if identified else 0,
        "draws": identified[0].draws if identified else 0,
        "weak": not all(run.supported for run in identified),
        "confusions": _confusions(paired),
    }


def number(rate: float) -> str:
    """``0.05``; a small one as ``10⁻³`` or ``5.8 · 10⁻⁷``."""
    if rate >= 0.0095:
        return f"{rate:.2g}"
    factor, _, exponent = f"{rate:.1e}".partition("e")
    power = f"10{int(exponent)}".replace("-", "⁻")
    power = power[:2] + power[2:].translate(_SUPERSCRIPT)
    return power if factor == "1.0" else f"{float(factor):g}\u00a0·\u00a0{power}"


def _point(run: Verification, far: float) -> OperatingPoint:
    return next(point for point in run.points if point.far == far)


def _figures(
    every: Sequence[Verification], fars: Sequence[float], known: bool
) -> list[tuple[str, list[float], list[float]]]:
    """Each figure's name, and its rate and threshold in every run; ``known``: identification."""
    figures = [("EER", [run.eer for run in every], [run.eer_threshold for run in every])]
    for far in fars:
        points = [_point(run, far) for run in every]
        rates, thresholds = [point.tar for point in points], [point.threshold for point in points]
        figures.append((f"TAR at FAR {number(far)}", rates, thresholds))
    if known:
        identifications = [run.identification for run in every if run.identification]
        name = f"DIR at FPIR {number(identifications[0].fpir)}"
        figures.append(
            (name, [run.dir for run in identifications], [run.threshold for run in identifications])
        )
    return figures


def _mean(values: Sequence[float], spread: bool = False) -> tuple[str, str]:
    """A cell of the table: its text and a smaller addition."""
    return decimals(float(np.mean(values))), headlines.spread(values) if spread else ""


def _curve(label: str, slot: str, every: Sequence[Verification]) -> charts.Curve | None:
    """TAR over FAR: mean, lowest and highest of the runs; none with less than two points."""
    rocs = [np.array([(point.far, point.tar) for point in run.roc]).T for run in every]
    far = max((fars for fars, _ in rocs), key=lambda fars: float(fars[0]))
    if far[0] < _LEAST:
        far = np.array([_LEAST, *far[far > _LEAST]])
    if len(far) < 2:
        return None
    tar = np.array([np.interp(np.log(far), np.log(fars), tars) for fars, tars in rocs])
    return charts.Curve.over_runs(label, slot, far, tar)


def _marks(every: Sequence[Verification], fars: Sequence[float]) -> list[RocMark]:
    eer = float(np.mean([run.eer for run in every]))
    marks = [(eer, 1 - eer, f"EER {decimals(eer)}")]
    for far in fars:
        tar = float(np.mean([_point(run, far).tar for run in every]))
        marks.append((far, tar, decimals(tar)))
    return [mark for mark in marks if mark[0] >= max(run.smallest_far for run in every)]


def _confusions(paired: Sequence[tuple[Group, str]]) -> dict[str, Any] | None:
    """The hardest confusions of the run, or of the best federated method.

    Of each pair of classes an image of both, and (text, share) of the queries of either that were
    taken for the other.
    """
    having = [
        (group, slot, group.runs[0].confused)
        for group, slot in paired
        if group.runs[0].confused is not None and (len(paired) == 1 or not group.pooled)
    ]
    if not having:
        return None
    group, slot, confusions = max(having, key=lambda of: of[0].mean("map_at_10") or 0.0)
    if confusions is None or not len(confusions.scores):
        return None
    pairs = []
    for i, names in enumerate(confusions.class_names.tolist()):
        # The query may be of either class.
        in_order = confusions.shown[i, 0] == names[0]
        pixels = confusions.pixels[i] if in_order else confusions.pixels[i, ::-1]
        pairs.append(
            {
                "thumbnails": [
                    {"uri": data_uri(image), "name": name}
                    for image, name in zip(pixels, names, strict=True)
                ],
                "taken": [
                    (f"{n} of {of}", headlines.unbroken_percent(n / of) if n else "")
                    for n, of in zip(confusions.confused[i], confusions.queries[i], strict=True)
                ],
                "score": float(confusions.scores[i]),
            }
        )
    small = is_small(confusions.pixels)
    return {"label": group.label, "slot": slot, "pairs": pairs, "small": small}


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
    charts.plain_ticks(ax, number)
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
        charts.label_lines(ax, lines, texts, at=0)
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
