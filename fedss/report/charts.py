"""Charts as SVG text whose colours are CSS variables, so that a page decides on light or dark.

Matplotlib draws with stand-in colours that are replaced by ``var(--name)`` afterwards. One unit
of the drawing is one CSS pixel in a column of ``WIDTH`` pixels. A PNG is drawn by the same code,
with real colours in their place.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator

from fedss.losses.methods import METHODS
from fedss.report.labels import FONT, apart, text_height, text_width, wrap, wrapped
from fedss.text import human_bytes

WIDTH, HEIGHT, TALL = 420, 300, 390
FEW = 6  # more lines or marks need a taller chart
PNG_SIZE = 6.4 * 72, 4 * 72
LABEL_GAP = 16
# A method's slot (colour, dashes, marker) is that of its place among those that train on clients;
# a reference on pooled images has one of its own. All other names take turns at the rest.
_METHOD_SLOTS = tuple(f"method-{place}" for place in range(1, 10))
SLOTS = (*_METHOD_SLOTS, "pooled")
EXTRA_SLOTS = tuple(f"extra-{number}" for number in range(1, 13))
_FEDERATED = [method.name for method in METHODS.values() if not method.pooled]
SLOT_OF = {
    **dict(zip(_FEDERATED, _METHOD_SLOTS, strict=True)),
    **{method.name: "pooled" for method in METHODS.values() if method.pooled},
}
DASHES: Mapping[str, tuple[float, ...] | None] = {
    "muted": (1, 3),
    **{"method-1": None, "method-2": None, "method-3": (9, 2.5), "method-4": (5, 2)},
    **{"method-5": (2, 1.5), "method-6": (7, 2, 2, 2), "method-7": (4, 1.5, 1, 1.5)},
    "method-8": (6, 1.5, 1.5, 1.5),
    "method-9": (3, 3),
    "pooled": (1, 2),
    **{slot: (None, (5, 2), (2, 1.5))[i % 3] for i, slot in enumerate(EXTRA_SLOTS)},
}
# Four shapes and three patterns: no two of the twelve extra slots share both.
MARKERS: Mapping[str, str] = {
    "method-3": "D",
    **{slot: "s^vP"[i % 4] for i, slot in enumerate(EXTRA_SLOTS)},
}
_NAMES = ("ink", "muted", "rule", "paper", "neutral", *SLOTS, *EXTRA_SLOTS)
_TEXT: Mapping[str, Any] = {"va": "center", "fontsize": FONT, "parse_math": False}
STAND_IN = {name: f"#fe01{number:02x}" for number, name in enumerate(_NAMES)}

Colors = Mapping[str, str]
Point = tuple[float, float]
Level = tuple[str, str, float]
"""Label, slot and score of pooled training, which moves no bytes."""


@dataclass(frozen=True)
class Curve:
    """Mean, lowest and highest value at each x."""

    label: str
    slot: str
    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @classmethod
    def over_runs(cls, label: str, slot: str, x: np.ndarray, values: np.ndarray) -> "Curve":
        """The curve of ``values`` [R, X] of R runs."""
        return cls(label, slot, x, values.mean(axis=0), values.min(axis=0), values.max(axis=0))


@dataclass(frozen=True)
class Bar:
    """Bytes of one method, in two parts; ``text`` stands at its end."""

    label: str
    slot: str
    backbone: float
    class_rows: float
    text: str


def slots_of(labels: Sequence[str]) -> list[str]:
    """The slot of each label: its own if that is the name of a method."""
    others = sorted(set(labels) - set(SLOT_OF))
    extra = {name: EXTRA_SLOTS[i % len(EXTRA_SLOTS)] for i, name in enumerate(others)}
    return [extra.get(label) or SLOT_OF[label] for label in labels]


def rounds_chart(
    name: str,
    lines: Sequence[Curve],
    last_round: int,
    alt: str,
    level: tuple[str, float] | None = None,
) -> Markup:
    """Curves over rounds up to ``last_round``, each labelled at its end, as is a ``level``."""
    return as_svg(draw_rounds(lines, last_round, level), name, alt)


def draw_rounds(
    lines: Sequence[Curve],
    last_round: int,
    level: tuple[str, float] | None = None,
    colors: Colors = STAND_IN,
    title: str = "",
) -> Figure:
    """:func:`rounds_chart`; with a title it stands alone: 6.4 x 4 inches."""
    if level is not None:
        across = np.array([0.0, max(last_round, 1)])
        lines = [*lines, Curve.over_runs(level[0], "muted", across, np.full((1, 2), level[1]))]
    figure, ax = new_figure(PNG_SIZE if title else (WIDTH, tall(len(lines))), colors)
    for line in lines:
        draw_line(ax, line, colors, band=len(lines) <= FEW)
    ax.set_xlim(0, max(last_round, 1))
    top = max(float(line.high.max()) for line in lines)
    bottom = min(0.0, *(float(line.low.min()) for line in lines))
    # Room for a line that runs along the top.
    ax.set_ylim(bottom, top * 1.06 if top > 0 else max(top, bottom + 1))
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    ax.set_xlabel("round", loc="right")
    if title:
        ax.set_title(title, loc="left", color=colors["ink"], fontsize=FONT, pad=10)
    label_lines(ax, lines, _place(ax, lines, top=34 if title else 10), colors)
    return figure


def draw_bytes(
    lines: Sequence[Curve], level: Level | None, colors: Colors = STAND_IN, title: str = ""
) -> Figure:
    """Accuracy over cumulative bytes, with a ``level`` that moves none.

    With a title the figure stands alone: 6.4 x 4 inches.
    """
    size = PNG_SIZE if title else (WIDTH, tall(len(lines)))
    figure, ax = new_figure(size, colors)
    labelled = list(lines)
    ax.set_xscale("log")
    for line in lines:
        draw_line(ax, line, colors, end=True)
    first = min(float(line.x[0]) for line in lines)
    last = max(float(line.x[-1]) for line in lines)
    if last <= first:
        first, last = first / 2, last * 2
    ax.set_xlim(first / (last / first) ** 0.02, last * (last / first) ** 0.02)
    top = max(float(line.high.max()) for line in lines)
    if level is not None:
        label, slot, value = level
        top = max(top, value)
        ax.axhline(value, color=colors[slot], linewidth=1.6, dashes=dashes(slot))
        end = np.array([ax.get_xlim()[1]])
        labelled = [*lines, Curve.over_runs(label, slot, end, np.array([[value]]))]
    ax.set_ylim(0, top * 1.06 if top > 0 else 1)
    ax.set_xlabel("bytes moved, all clients, both ways (log)", loc="right")
    if title:
        ax.set_title(title, loc="left", color=colors["ink"], fontsize=FONT, pad=10)
    texts = _place(ax, labelled, top=34 if title else 10)
    bytes_ticks(ax, last / first)
    label_lines(ax, labelled, texts, colors)
    return figure


def bars_chart(name: str, bars: Sequence[Bar], rows: str, alt: str) -> Markup:
    """Bytes as stacked bars: backbone, then what is called ``rows``."""
    pitch, top = 40, 30
    height = top + pitch * len(bars) + 4
    figure, ax = new_figure((WIDTH, height))
    longest = max(bar.backbone + bar.class_rows for bar in bars)
    for row, bar in enumerate(bars):
        y = top + pitch * row
        ax.barh(y + 26, bar.backbone, 13, color=STAND_IN["neutral"], linewidth=0)
        ax.barh(
            y + 26, bar.class_rows, 13, left=bar.backbone, color=STAND_IN[bar.slot], linewidth=0
        )
        total = bar.backbone + bar.class_rows
        ax.text(0, y + 9, wrap(bar.label, 52, 1), color=STAND_IN["ink"], **_TEXT)
        ax.annotate(
            bar.text,
            (total, y + 26),
            (6, 0),
            textcoords="offset points",
            color=STAND_IN["muted"],
            **_TEXT,
        )
    for x, slot, text in ((0.0, "neutral", "backbone"), (0.29, bars[0].slot, rows)):
        ax.barh(9, longest * 0.028, 11, left=longest * x, color=STAND_IN[slot], linewidth=0)
        ax.text(longest * (x + 0.045), 9, text, color=STAND_IN["muted"], **_TEXT)
    ax.set_xlim(0, longest * 1.0)
    ax.set_ylim(height, 0)
    ax.set_axis_off()
    ax.set_position((2 / WIDTH, 0, (WIDTH - 90) / WIDTH, 1))
    return as_svg(figure, name, alt)


def write(
    ax: Axes, place: Point, text: str, color: str, size: float = FONT, side: str = "left"
) -> None:
    """A text at a place of the figure, in its points; ``side`` of the text stands there."""
    ax.annotate(
        text,
        place,
        xycoords="figure points",
        color=color,
        ha=side,
        linespacing=1.1,
        annotation_clip=False,
        **{**_TEXT, "fontsize": size},
    )


def tie(ax: Axes, mark: Point, text: Point, color: str, gap: float) -> None:
    """A thin line from a text to ``gap`` points before its mark; places in the figure's points."""
    line = {"arrowstyle": "-", "color": color, "linewidth": 0.8, "alpha": 0.6}
    ax.annotate(
        "",
        mark,
        text,
        xycoords="figure points",
        textcoords="figure points",
        arrowprops={**line, "shrinkA": 0, "shrinkB": gap},
    )


def place_axes(ax: Axes, left: float, bottom: float, right: float, top: float) -> None:
    """Put axes at these edges, in points of the figure."""
    width, height = ax.figure.bbox.size
    size = (right - left) / width, (top - bottom) / height
    ax.set_position((left / width, bottom / height, *size))


def tall(count: int) -> float:
    """The height of a chart that names ``count`` things."""
    return HEIGHT if count <= FEW else TALL


def bytes_ticks(ax: Axes, span: float) -> None:
    """Few and round ticks of a logarithmic axis of bytes whose last value is ``span`` firsts.

    The axis must be in its place: a tick whose text would touch the one before has to go.
    """
    decades = np.log10(span)
    if decades < 1:
        ax.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    else:
        subs = (1.0,) if decades > 2 else (1.0, 3.0) if decades > 1.3 else (1.0, 2.0, 5.0)
        ax.xaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
    low, high = ax.get_xlim()
    kept, end = [], -np.inf
    for value in (v for v in ax.xaxis.get_majorticklocs() if low <= v <= high):
        middle = float(ax.transData.transform((value, 0))[0])
        half = text_width(human_ticks(value)) / 2
        if middle - half > end:
            kept.append(float(value))
            end = middle + half + LABEL_GAP / 2
    ax.xaxis.set_major_locator(FixedLocator(kept))
    plain_ticks(ax, human_ticks)


def human_ticks(value: float) -> str:
    """``300 MB`` without needless decimals."""
    number, _, unit = human_bytes(value).partition(" ")
    return f"{float(number):g} {unit}" if unit else number


def plain_ticks(ax: Axes, text: Callable[[float], str]) -> None:
    """Major ticks of the x axis alone, with these texts."""
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(lambda value, _: text(value))


def new_figure(size: Point, colors: Colors = STAND_IN) -> tuple[Figure, Axes]:
    """An empty figure of that width and height, with axes in the look of all charts."""
    figure = Figure(figsize=(size[0] / 72, size[1] / 72), dpi=72)
    figure.patch.set_alpha(0)
    return figure, style(figure.add_subplot(), colors)


def style(ax: Axes, colors: Colors) -> Axes:
    """Give axes the look of all charts: rules for values, a line for the bottom, no frame."""
    ax.patch.set_alpha(0)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.spines["bottom"].set_color(colors["muted"])
    ax.grid(axis="y", color=colors["rule"], linewidth=1)
    ax.set_axisbelow(True)
    ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    for axis in (ax.xaxis, ax.yaxis):
        axis.label.set(color=colors["muted"], fontsize=FONT - 1)
    ax.tick_params(axis="both", labelcolor=colors["muted"], labelsize=FONT - 1, pad=5)
    ax.tick_params(axis="y", length=0)
    ax.tick_params(axis="x", length=4, color=colors["muted"])
    return ax


def dashes(slot: str) -> tuple[float, ...] | tuple[None, None]:
    """The dash pattern of a slot, as matplotlib takes it."""
    return DASHES.get(slot) or (None, None)


def _place(ax: Axes, lines: Sequence[Curve], top: float = 10) -> list[str]:
    """Set the axes' place, with a margin on the right for the labels; return these wrapped."""
    width, height = ax.figure.bbox.size
    left, bottom = 38, 46
    # Names that take up most of the height are hard to follow to their lines.
    texts = wrapped([line.label for line in lines], 0.6 * (height - top - bottom))
    right = LABEL_GAP + 2 + max(text_width(text) for text in texts)
    place_axes(ax, left, bottom, width - right, height - top)
    return texts


def draw_line(
    ax: Axes, line: Curve, colors: Colors = STAND_IN, end: bool = False, band: bool = True
) -> None:
    """Draw a curve in its slot's colour and pattern, with a mark at its ``end`` if wanted."""
    color = colors[line.slot]
    if band and np.any(line.high > line.low):
        ax.fill_between(line.x, line.low, line.high, color=color, alpha=0.16, linewidth=0)
    ours = line.slot == SLOT_OF["fedss"]
    ax.plot(
        line.x,
        line.mean,
        color=color,
        linewidth=2.6 if ours else 2.0,
        dashes=dashes(line.slot),
        solid_capstyle="round",
        zorder=3 if ours else 2,
    )
    if end or len(line.x) == 1:
        ax.plot(
            line.x[-1:],
            line.mean[-1:],
            MARKERS.get(line.slot, "o"),
            color=color,
            markersize=6,
            markeredgewidth=0,
            clip_on=False,
            zorder=4,
        )


def label_lines(
    ax: Axes, lines: Sequence[Curve], texts: Sequence[str], colors: Colors = STAND_IN, at: int = -1
) -> None:
    """Labels tied to the lines, none touching: right of their ends, or left of their starts (0)."""
    way = 1 if at else -1
    ends = [ax.transData.transform((line.x[at], line.mean[at])) for line in lines]
    x = max(way * float(end_x) for end_x, _ in ends) * way + way * LABEL_GAP
    heights = [text_height(text) + 3 for text in texts]
    places = apart([float(y) for _, y in ends], heights, ax.bbox.y0, ax.bbox.y1 + 8)
    for line, text, (end_x, end_y), y in zip(lines, texts, ends, places, strict=True):
        color = colors[line.slot]
        if abs(y - end_y) > 4 or abs(x - end_x) > LABEL_GAP + 12:
            tie(ax, (end_x, end_y), (x - 3 * way, y), color, gap=5)
        write(ax, (x, y), text, color, side="left" if way > 0 else "right")


def as_png(figure: Figure, colors: Colors) -> bytes:
    """The figure at 200 dpi on paper, with the halo that the page gives to texts."""
    for text in figure.findobj(Text):
        text.set_path_effects([withStroke(linewidth=3, foreground=colors["paper"])])
    figure.patch.set(alpha=1, facecolor=colors["paper"])
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=200, metadata={"Software": None})
    return out.getvalue()


def as_svg(figure: Figure, name: str, alt: str) -> Markup:
    """The figure as an inline element: no ids but those in use, no namespaces, no fixed size."""
    out = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": FONT}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    body = out.getvalue()
    box = re.findall(r'viewBox="([^"]+)"', body)[0]
    body = body[body.index("<defs>") if "<defs>" in body else body.index("<g") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r"<[^>]+>", lambda tag: _plain_tag(tag.group()), body)
    for slot, color in STAND_IN.items():
        body = body.replace(color, f"var(--{slot})")
    body = re.sub(r"\n\s*", "\n", body)
    return Markup('<svg class="chart" viewBox="{}" role="img" aria-label="{}">\n').format(
        box, alt
    ) + Markup(body)


def _plain_tag(tag: str) -> str:
    """A tag without group ids, font families (the page has its own) and needless digits."""
    tag = re.sub(r'^<g id="[^"]*"', "<g", tag).replace("xlink:href", "href")
    tag = re.sub(r"font: (\d+)px [^;\"]*", r"font-size: \1px", tag)
    tag = re.sub(r" font-family: [^;\"]*;", "", tag)
    return re.sub(r"\d+\.\d{3,}", lambda digits: f"{float(digits.group()):.2f}", tag)
