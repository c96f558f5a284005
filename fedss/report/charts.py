"""Charts as SVG text whose colours are CSS variables, so that a page decides on light or dark.

Matplotlib draws with stand-in colours that are replaced by ``var(--name)`` afterwards. One unit
of the drawing is one CSS pixel in a column of ``WIDTH`` pixels.
"""

import io
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from fedss.report.words import human_bytes

WIDTH, HEIGHT, FONT = 420, 300, 13
# Known methods have a colour of their own, all others take turns at the rest.
SLOTS = ("full", "fedss", "fedss-uncorrected", "pos-only", "neg-only", "fedaws", "central")
EXTRA_SLOTS = ("extra-1", "extra-2", "extra-3")
DASHES: Mapping[str, tuple[float, ...]] = {
    "fedss-uncorrected": (5, 2),
    "pos-only": (2, 1.5),
    "neg-only": (7, 2, 2, 2),
    "fedaws": (4, 1.5, 1, 1.5),
    "central": (1, 2),
    "extra-2": (5, 2),
    "extra-3": (2, 1.5),
}
_NAMES = ("ink", "muted", "rule", "paper", "neutral", *SLOTS, *EXTRA_SLOTS)
_STAND_IN = {name: f"#fe01{number:02x}" for number, name in enumerate(_NAMES)}


@dataclass(frozen=True)
class Line:
    """A curve: mean, lowest and highest value at each x."""

    label: str
    slot: str
    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True)
class Bar:
    """Bytes of one method, or of one direction, in two parts; ``text`` stands at its end."""

    label: str
    slot: str
    backbone: float
    class_rows: float
    text: str


def slots_of(methods: Sequence[str]) -> list[str]:
    """The colour slot of each method: its own if it is known."""
    unknown = sorted(set(methods) - set(SLOTS))
    extra = {name: EXTRA_SLOTS[i % len(EXTRA_SLOTS)] for i, name in enumerate(unknown)}
    return [extra.get(method, method) for method in methods]


def rounds_chart(name: str, lines: Sequence[Line], last_round: int, alt: str) -> Markup:
    """Curves over rounds up to ``last_round``, each labelled at its end."""
    figure, ax = _figure()
    for line in lines:
        _draw(ax, line)
    ax.set_xlim(0, max(last_round, 1))
    ax.set_ylim(bottom=min(0.0, *(float(line.low.min()) for line in lines)))
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    ax.set_xlabel("round", loc="right")
    complete = all(line.x[-1] >= 0.95 * last_round for line in lines)
    margin = max(_text_width(_wrapped(line.label)) for line in lines)
    _place(ax, right=14 + margin if complete else 14)
    (_label_margin if complete else _label_beside)(ax, lines)
    return _svg(figure, name, alt)


def bytes_chart(
    name: str, lines: Sequence[Line], level: tuple[str, str, float] | None, alt: str
) -> Markup:
    """Accuracy over cumulative bytes; ``level`` is a (label, slot, value) that moves no bytes."""
    figure, ax = _figure()
    ax.set_xscale("log")
    few = len(lines) <= 4
    for line in lines:
        _draw(ax, line, end=True)
    first = min(float(line.x[0]) for line in lines)
    last = max(float(line.x[-1]) for line in lines)
    if last <= first:
        first, last = first / 2, last * 2
    ax.set_xlim(first / (last / first) ** 0.02, last * (last / first) ** (0.06 if few else 0.0))
    top = max(float(line.high.max()) for line in lines)
    if level is not None:
        label, slot, value = level
        top = max(top, value)
        ax.axhline(value, color=_STAND_IN[slot], linewidth=1.6, dashes=DASHES[slot])
    ax.set_ylim(0, top * 1.16 if top > 0 else 1)
    decades = np.log10(last / first)
    subs = (1.0,) if decades > 2 else (1.0, 3.0) if decades > 1 else (1.0, 2.0, 5.0)
    ax.xaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: human_ticks(value)))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("bytes moved, all clients, both ways (log)", loc="right")
    _place(ax, right=14 if few else 14 + max(_text_width(_wrapped(line.label)) for line in lines))
    if level is not None:
        ax.annotate(
            label,
            (0, value),
            (4, 4),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            color=_STAND_IN[slot],
            fontsize=FONT,
            parse_math=False,
        )
    (_label_beside if few else _label_margin)(ax, lines)
    return _svg(figure, name, alt)


def bars_chart(name: str, bars: Sequence[Bar], alt: str) -> Markup:
    """Bytes as stacked bars: backbone, then class rows."""
    pitch, top = 40, 30
    height = top + pitch * len(bars) + 4
    figure, ax = _figure(height)
    longest = max(bar.backbone + bar.class_rows for bar in bars)
    for row, bar in enumerate(bars):
        y = top + pitch * row
        ax.barh(y + 26, bar.backbone, 13, color=_STAND_IN["neutral"], linewidth=0)
        ax.barh(
            y + 26, bar.class_rows, 13, left=bar.backbone, color=_STAND_IN[bar.slot], linewidth=0
        )
        total = bar.backbone + bar.class_rows
        ax.text(
            0,
            y + 9,
            bar.label,
            color=_STAND_IN["ink"],
            va="center",
            fontsize=FONT,
            parse_math=False,
        )
        ax.annotate(
            bar.text,
            (total, y + 26),
            (6, 0),
            textcoords="offset points",
            va="center",
            color=_STAND_IN["muted"],
            fontsize=FONT,
        )
    for x, slot, text in ((0.0, "neutral", "backbone"), (0.29, bars[0].slot, "class rows")):
        ax.barh(9, longest * 0.028, 11, left=longest * x, color=_STAND_IN[slot], linewidth=0)
        ax.text(
            longest * (x + 0.045), 9, text, color=_STAND_IN["muted"], va="center", fontsize=FONT
        )
    ax.set_xlim(0, longest * 1.0)
    ax.set_ylim(height, 0)
    ax.set_axis_off()
    ax.set_position((2 / WIDTH, 0, (WIDTH - 90) / WIDTH, 1))
    return _svg(figure, name, alt)


def human_ticks(value: float) -> str:
    """``300 MB`` without needless decimals."""
    number, _, unit = human_bytes(value).partition(" ")
    return f"{float(number):g} {unit}" if unit else number


def _figure(height: float = HEIGHT) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72)
    FigureCanvasSVG(figure)
    ax = figure.add_subplot()
    figure.patch.set_alpha(0)
    ax.patch.set_alpha(0)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.spines["bottom"].set_color(_STAND_IN["muted"])
    ax.grid(axis="y", color=_STAND_IN["rule"], linewidth=1)
    ax.set_axisbelow(True)
    ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    for axis in (ax.xaxis, ax.yaxis):
        axis.label.set(color=_STAND_IN["muted"], fontsize=FONT - 1)
    ax.tick_params(axis="both", labelcolor=_STAND_IN["muted"], labelsize=FONT - 1, pad=5)
    ax.tick_params(axis="y", length=0)
    ax.tick_params(axis="x", length=4, color=_STAND_IN["muted"])
    return figure, ax


def _place(ax: Axes, right: float, left: float = 38, top: float = 10, bottom: float = 46) -> None:
    height = HEIGHT - top - bottom
    ax.set_position(
        (left / WIDTH, bottom / HEIGHT, (WIDTH - left - right) / WIDTH, height / HEIGHT)
    )


def _draw(ax: Axes, line: Line, end: bool = False) -> None:
    color = _STAND_IN[line.slot]
    if np.any(line.high > line.low):
        ax.fill_between(line.x, line.low, line.high, color=color, alpha=0.16, linewidth=0)
    width = 2.6 if line.slot == "fedss" else 2.0
    ax.plot(
        line.x,
        line.mean,
        color=color,
        linewidth=width,
        dashes=DASHES.get(line.slot, (None, None)),
        solid_capstyle="round",
        zorder=3 if line.slot == "fedss" else 2,
    )
    if end or len(line.x) == 1:
        ax.plot(
            line.x[-1:],
            line.mean[-1:],
            "o",
            color=color,
            markersize=6,
            markeredgewidth=0,
            clip_on=False,
        )


def _wrapped(label: str) -> str:
    return "\n".join(textwrap.wrap(label, 12, max_lines=2, placeholder="…")) or label


def _text_width(text: str) -> float:
    return max(len(part) for part in text.split("\n")) * FONT * 0.56


def _text_height(text: str) -> float:
    return (text.count("\n") + 1) * FONT * 1.15


def _label_margin(ax: Axes, lines: Sequence[Line]) -> None:
    """Labels right of the axes, moved apart where they would touch, tied to their ends."""
    ends = [ax.transData.transform((line.x[-1], line.mean[-1])) for line in lines]
    texts = [_wrapped(line.label) for line in lines]
    heights = [_text_height(text) + 3 for text in texts]
    places = _apart([float(y) for _, y in ends], heights, ax.bbox.y0, ax.bbox.y1 + 8)
    x = ax.bbox.x1 + 12
    for line, text, (end_x, end_y), y in zip(lines, texts, ends, places, strict=True):
        color = _STAND_IN[line.slot]
        if abs(y - end_y) > 4 or end_x < x - 20:
            tie = {"arrowstyle": "-", "color": color, "linewidth": 0.8, "alpha": 0.6}
            ax.annotate(
                "",
                (end_x + 2, end_y),
                (x - 2, y),
                xycoords="figure pixels",
                textcoords="figure pixels",
                arrowprops={**tie, "shrinkA": 0, "shrinkB": 0},
            )
        _label(ax, text, (x, y), line.slot, va="center")


def _label(
    ax: Axes, text: str, place: tuple[float, float], slot: str, va: Literal["center", "bottom"]
) -> None:
    ax.annotate(
        text,
        place,
        xycoords="figure pixels",
        color=_STAND_IN[slot],
        va=va,
        annotation_clip=False,
        linespacing=1.1,
        fontsize=FONT,
        parse_math=False,
    )


def _apart(
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


def _label_beside(ax: Axes, lines: Sequence[Line]) -> None:
    """Labels beside the ends of the lines, each where it hides least of lines and labels."""
    curves = [ax.transData.transform(np.column_stack([line.x, line.mean])) for line in lines]
    steps = [np.linspace(0, len(curve) - 1, 400) for curve in curves]
    ink_x, ink_y = (
        np.concatenate(
            [np.interp(s, range(len(c)), c[:, axis]) for s, c in zip(steps, curves, strict=True)]
        )
        for axis in (0, 1)
    )
    boxes: list[tuple[float, float, float, float]] = []

    def cost(box: tuple[float, float, float, float]) -> float:
        x0, y0, x1, y1 = box
        hidden = (ink_x > x0) & (ink_x < x1) & (ink_y > y0) & (ink_y < y1)
        touched = sum(x0 < b[2] and b[0] < x1 and y0 < b[3] and b[1] < y1 for b in boxes)
        outside = max(0.0, ax.bbox.x0 - x0, x1 - WIDTH + 2, ax.bbox.y0 - y0, y1 - ax.bbox.y1 - 10)
        return float(hidden.sum() + 200 * touched + 50 * outside)

    for line, curve in zip(lines, curves, strict=True):
        text = _wrapped(line.label)
        width, height = _text_width(text), _text_height(text)
        corners = [
            (curve[-1, 0] + dx - share * width, curve[-1, 1] + dy + below * height)
            for dy, below in ((0, -0.5), (8, 0.0), (-8, -1.0), (24, 0.0), (-24, -1.0))
            for dx, share in ((10, 0.0), (0, 0.5), (-10, 1.0))
        ]
        box = min(((x, y, x + width, y + height) for x, y in corners), key=cost)
        boxes.append(box)
        _label(ax, text, box[:2], line.slot, va="bottom")


def _svg(figure: Figure, name: str, alt: str) -> Markup:
    """The figure as an inline element: no ids but those in use, no namespaces, no fixed size."""
    out = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": FONT}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    body = out.getvalue()
    box = re.search(r'viewBox="([^"]+)"', body)
    body = body[body.index("<defs>") if "<defs>" in body else body.index("<g") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r"<[^>]+>", lambda tag: _plain_tag(tag.group()), body)
    for slot, color in _STAND_IN.items():
        body = body.replace(color, f"var(--{slot})")
    body = re.sub(r"\n\s*", "\n", body)
    shape = box.group(1) if box else f"0 0 {WIDTH} {HEIGHT}"
    return Markup('<svg class="chart" viewBox="{}" role="img" aria-label="{}">\n').format(
        shape, alt
    ) + Markup(body)


def _plain_tag(tag: str) -> str:
    """A tag without group ids, font families (the page has its own) and needless digits."""
    tag = re.sub(r'^<g id="[^"]*"', "<g", tag).replace("xlink:href", "href")
    tag = re.sub(r"font: (\d+)px [^;\"]*", r"font-size: \1px", tag)
    tag = re.sub(r" font-family: [^;\"]*;", "", tag)
    return re.sub(r"\d+\.\d{3,}", lambda digits: f"{float(digits.group()):.2f}", tag)
