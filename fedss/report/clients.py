"""Who holds what: images and classes by client, clients by class, and a small matrix, as PNG."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from fedss.report.charts import Colors, as_png, style
from fedss.report.labels import FONT

_WIDTH, _HEIGHT = 880, 660
_MOST_BARS, _FEW_BARS = 28, 7
_SPREAD = 40  # from this ratio of largest to smallest on, an axis is logarithmic
_ROWS, _COLUMNS = 36, 90


Held = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Client, class and number of images of each pair of client and class that has any, [P]."""


def clients_png(held: Held, title: str, colors: Colors) -> bytes:
    """The image of `fedss.report.clients_figure`."""
    client_P, class_P, count_P = held
    figure = Figure(figsize=(_WIDTH / 72, _HEIGHT / 72), dpi=72)
    images_K = np.bincount(client_P, weights=count_P).astype(np.int64)
    classes_K, clients_n = np.bincount(client_P), np.bincount(class_P)
    for place, values, what, of in (
        ((0.07, 0.535), images_K, "Images per client", "clients"),
        ((0.57, 0.535), classes_K, "Classes per client", "clients"),
        ((0.07, 0.055), clients_n, "Clients per class", "classes"),
    ):
        ax = style(figure.add_axes((*place, 0.405, 0.345)), colors)
        _histogram(ax, values[values > 0], what, of, colors)
    ax = style(figure.add_axes((0.57, 0.055, 0.405, 0.345)), colors)
    _matrix(ax, held, images_K, colors)
    figure.text(
        0.07,
        1 - 18 / _HEIGHT,
        title,
        color=colors["ink"],
        fontsize=FONT + 3,
        va="top",
        parse_math=False,
    )
    return as_png(figure, colors)


def _histogram(ax: Axes, values: np.ndarray, what: str, of: str, colors: Colors) -> None:
    """How many clients (or classes) there are of each size."""
    low, high, middle = int(values.min()), int(values.max()), float(np.median(values))
    wide = high > _SPREAD * low
    step = -(-(high - low + 1) // _MOST_BARS)
    edges: np.ndarray = np.arange(low, high + 1 + step, step) - 0.5
    if wide:
        starts, ratio = [low], (high / low) ** (1 / (_MOST_BARS - 3))
        while starts[-1] <= high:
            starts.append(max(starts[-1] + 1, round(starts[-1] * ratio)))
        edges = np.array(starts) - 0.5
        ax.set_xscale("log")
    number, _ = np.histogram(values, edges)
    left, right = edges[:-1], edges[1:]
    # A gap of the same width everywhere, also on a logarithmic axis.
    gap = 0.06
    if wide:
        left, right = left * (right / left) ** gap, right / (right / left) ** gap
    else:
        left, right = left + gap * (right - left), right - gap * (right - left)
    ax.bar(left, number, right - left, align="edge", color=colors["accent"], linewidth=0)
    ax.xaxis.set_minor_locator(NullLocator())
    if high - low < _FEW_BARS:
        room = (_FEW_BARS - (high - low)) / 2
        ax.set_xlim(low - room, high + room)
        ax.set_xticks(range(low, high + 1))
    elif wide:
        ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0), numticks=12))
    else:
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter("{x:,.0f}")
    span = f"{low:,} each"
    if low < high:
        ax.axvline(middle, color=colors["ink"], linewidth=1.2, dashes=(4, 2.5))
        span = f"{low:,} to {high:,}{', log scale' if wide else ''}, median {middle:,g} (dashed)"
    _head(ax, what, f"{len(values):,} {of}: {span}", colors)
    ax.set_ylabel(of, loc="top")


def _matrix(ax: Axes, held: Held, images_K: np.ndarray, colors: Colors) -> None:
    """Some clients, from most images to fewest, and the classes that they hold."""
    client_P, class_P, count_P = held
    holders = np.flatnonzero(images_K)
    order = holders[np.argsort(-images_K[holders], kind="stable")]
    chosen = order[np.unique(np.linspace(0, len(order) - 1, _ROWS).round().astype(np.int64))]
    row_K = np.full(len(images_K), -1)
    row_K[chosen] = np.arange(len(chosen))
    row_P = row_K[client_P]
    row_P, class_P, count_P = (values[row_P >= 0] for values in (row_P, class_P, count_P))
    classes, column_P = np.unique(class_P, return_inverse=True)
    # Next to each other what the same clients hold.
    weight_n = np.bincount(column_P, weights=count_P)
    centre_n = np.bincount(column_P, weights=count_P * row_P) / weight_n
    rank_n = np.empty(len(classes), np.int64)
    rank_n[np.argsort(centre_n, kind="stable")] = np.arange(len(classes))
    columns = min(len(classes), _COLUMNS)
    matrix = np.zeros((len(chosen), columns))
    np.add.at(matrix, (row_P, rank_n[column_P] * columns // len(classes)), count_P)
    ramp = LinearSegmentedColormap.from_list("held", [colors["wash"], colors["accent"]])
    darkest = matrix.max()
    # Counts are skewed, so by their logarithms; and one image is to be told from none.
    shade = 1 - 0.75 * (1 - np.log(np.maximum(matrix, 1)) / max(np.log(darkest), 1e-9))
    shade = np.where(matrix > 0, shade if darkest > 1 else 1.0, 0.0)
    ax.imshow(shade, cmap=ramp, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    ax.grid(False)
    ax.spines["bottom"].set_visible(False)
    ax.set_xticks([])
    ax.set_yticks([])
    every = len(chosen) == len(order)
    of_them = f"all {len(order):,} clients" if every else f"{len(chosen)} of {len(order):,} clients"
    grouped = f", {len(classes) / columns:.2g} to a column" if columns < len(classes) else ""
    _head(ax, "Who holds what", f"{of_them}, their {len(classes):,} classes{grouped}", colors)
    scale = f"light to dark: 1 to {darkest:,.0f} images, log scale" if darkest > 1 else "1 image"
    ax.set_xlabel(f"classes; {scale}", loc="left")
    ax.set_ylabel("clients, most images on top", loc="top")


def _head(ax: Axes, title: str, text: str, colors: Colors) -> None:
    for words, height, color in ((title, 22, "ink"), (text, 6, "muted")):
        ax.annotate(
            words,
            (0, 1),
            (0, height),
            xycoords="axes fraction",
            textcoords="offset points",
            color=colors[color],
            fontsize=FONT if color == "ink" else FONT - 1,
            annotation_clip=False,
            parse_math=False,
        )
