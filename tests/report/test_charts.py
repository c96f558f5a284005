"""Charts: the frontier, labels, colours, and images of a comparison."""

import io
import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

import fedss
from fedss.errors import ConfigError, RunFolderError
from fedss.report import bytes_figure, charts, figures, frontier, frontier_figure, labels, rounds
from fedss.runs import reading
from tests.report.made import (
    METHODS,
    VARIANTS,
    fake_comparison,
    fake_run,
    fake_variants,
    measured,
    read,
    single,
)


@pytest.mark.parametrize(
    "ends",
    [
        [0.350, 0.352, 0.345, 0.339, 0.36],
        [0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1],
        [0.4, 0.0, 0.39, 0.38, 0.01, 0.2, 0.41, 0.37, 0.3, 0.02],
    ],
)
def test_labels_keep_the_order_of_the_ends_and_do_not_touch(ends: list[float]) -> None:
    low, high, height = 46.0, 298.0, 18.0
    wanted = [46 + 600 * end for end in ends]
    places = labels.apart(wanted, [height] * len(ends), low, high)
    order = sorted(range(len(ends)), key=lambda i: (ends[i], i))
    assert np.all(np.diff([places[i] for i in order]) > height - 0.5)
    assert min(places) >= low + height / 2 - 0.5
    assert max(places) <= high - height / 2 + 0.5


def test_every_line_of_a_chart_is_labelled_in_order(tmp_path: Path) -> None:
    methods = list(METHODS)
    summary = fake_comparison(tmp_path, methods, rounds=20)
    html, _ = read(tmp_path)
    chart = html[html.index("MAP@10 over rounds for") :].partition("</svg>")[0]
    of_slot = {charts.SLOT_OF[method]: method for method in methods}
    place: dict[str, float] = {}  # the last line of a wrapped label stands for it
    for slot, x, y in re.findall(r'fill: var\(--([\w-]+)\)".*?\((?:-0 )?(\S+) (\S+)\)">', chart):
        if slot in of_slot:
            place[of_slot[slot]] = float(y)
            assert float(x) > 300
    ends = sorted((entry["map_at_10"], entry["method"]) for entry in summary)
    heights = [place[method] for _, method in ends]
    assert np.all(np.diff(heights) < -13)  # downwards in SVG


def test_image_has_size_and_colours(comparison: tuple[Path, Any]) -> None:
    image = bytes_figure(comparison[0])
    with Image.open(io.BytesIO(image)) as image:
        assert image.format == "PNG"
        assert image.size == (1280, 800)
        assert image.info["dpi"] == pytest.approx((200, 200), abs=0.1)
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    assert (pixels == 255).all(axis=1).mean() > 0.8
    for color in ((0x1B, 0x1F, 0x24), (0x0B, 0x5F, 0xD0), (0x00, 0x79, 0x5C), (0x6A, 0x73, 0x7D)):
        assert (pixels == color).all(axis=1).sum() > 100


def test_image_needs_bytes(tmp_path: Path) -> None:
    single(tmp_path, method="central", rounds=5)
    with pytest.raises(RunFolderError, match="expected an evaluated round with its bytes"):
        bytes_figure(tmp_path)


def test_the_image_is_a_png_and_the_same_each_time(tmp_path: Path) -> None:
    folder = tmp_path / "four"
    fake_comparison(folder, ["full", "fedss", "pos-only", "central"])
    image = bytes_figure(folder)
    assert image.startswith(b"\x89PNG")
    assert image == bytes_figure(folder)


def test_charts_say_what_is_not_evaluated_yet(tmp_path: Path) -> None:
    fake_run(tmp_path, stop=1)
    assert "No round has been evaluated yet, so there is no accuracy to draw." in (
        read(tmp_path)[1].words.replace("\n", " ")
    )
    assert "fedss evaluate" not in read(tmp_path)[1].words


def point(label: str, moved: float, score: float) -> frontier.FrontierPoint:
    return frontier.FrontierPoint(label, "fedss", moved, score, score - 0.004, score + 0.004)


def test_frontier_is_what_nothing_beats() -> None:
    points = [
        *(point("a", 10, 0.30), point("b", 20, 0.35), point("c", 20, 0.34), point("d", 30, 0.35)),
        *(point("e", 40, 0.36), point("f", 5, 0.1), point("twin of b", 20, 0.35)),
    ]
    assert frontier.on_frontier(points) == [True, True, False, False, True, True, True]


@pytest.mark.parametrize(
    ("names", "before", "behind"),
    [
        (["full"], [], []),
        (["full", "central"], [], ["Bytes per client and round"]),
        (["full", "fedss deck"], ["MAP@10 against all bytes"], ["Bytes per client and round"]),
        (list(VARIANTS), ["MAP@10 against all bytes"], ["Bytes per client and round"]),
    ],
)
def test_methods_beside_each_other_have_one_picture_first(
    tmp_path: Path, names: list[str], before: list[str], behind: list[str]
) -> None:
    fake_variants(tmp_path, names)
    html, _ = read(tmp_path)
    titles = re.findall(r"<figcaption><h3>(.*?)</h3>", html)
    assert titles == [*before, "MAP@10 over rounds", *behind, "Training loss"]


@example(first=11e6, span=9.6)
@example(first=17e6, span=6.1)
@given(first=st.floats(1e3, 1e12), span=st.floats(1.02, 1e5))
def test_ticks_of_bytes_do_not_touch(first: float, span: float) -> None:
    figure, ax = charts.new_figure((charts.WIDTH, charts.HEIGHT))
    charts.place_axes(ax, 42, 46, 406, 290)
    ax.set_xscale("log")
    ax.set_xlim(first, first * span)
    charts.bytes_ticks(ax, span)
    ticks = [t for t in ax.xaxis.get_major_ticks() if first <= t.get_loc() <= first * span]
    figure.canvas.draw()
    boxes = [tick.label1.get_window_extent() for tick in ticks if tick.label1.get_text()]
    assert all(left.x1 + 4 < right.x0 for left, right in itertools.pairwise(boxes))


def test_the_picture_shows_intervals(tmp_path: Path) -> None:
    measured(tmp_path, {"full": 0.352, "fedss": 0.3}, classes=20)
    runs = reading.group_runs(reading.read_runs(tmp_path), tmp_path)
    points = figures._points([(group, "") for group in runs])
    assert [(p.low, p.high) for p in points] == [(g.interval.low, g.interval.high) for g in runs]
    assert all(point.low < point.mean < point.high for point in points)
    assert "uprights: 95\u00a0% intervals" in read(tmp_path)[1].words


def test_frontier_names_every_variant(variants: Path) -> None:
    html, page = read(variants)
    chart = html[html.index("MAP@10 against all bytes for") :].partition("</svg>")[0]
    texts = re.findall(r">([^<>\n]+)</text>", chart)
    for label in set(VARIANTS) - {"pos-only", "central"}:
        assert label in texts
    # Far from all others: their values are named at the edges.
    assert "pos-only 0.270↓" in texts
    assert "central 0.460↑" in texts
    assert "hollow marks are beaten; uprights span the seeds." in page.words


def test_unfinished_runs_are_not_on_the_frontier(tmp_path: Path) -> None:
    fake_variants(tmp_path, ["full", "fedss deck"])
    fake_run(tmp_path / "moments-seed0", "moments", rounds=10, stop=5)
    html, _ = read(tmp_path)
    chart = html[html.index("MAP@10 against all bytes for") :].partition("</svg>")[0]
    texts = re.findall(r">([^<>\n]+)</text>", chart)
    assert {"full", "fedss deck"} <= set(texts)
    assert "moments" not in texts


@pytest.mark.parametrize("width", [420, 460])
@pytest.mark.parametrize("count", [1, 3, 9, 12])
def test_names_beside_marks_do_not_touch(width: int, count: int) -> None:
    rng = np.random.default_rng(count)
    marks = np.stack(
        [rng.choice([90.0, 150.0, 290.0, 291.0], count), rng.uniform(80, 330, count)], axis=1
    )
    sizes = np.stack([rng.uniform(40, 120, count), np.full(count, 15.0)], axis=1)
    area = np.array([44.0, 50.0, width - 4.0, 364.0])
    places, tied = labels.beside(marks, sizes, np.empty((0, 4)), np.array([]), area)
    low, high = places - sizes / 2, places + sizes / 2
    for i in range(count):
        for j in range(i):
            assert np.any(low[i] >= high[j]) or np.any(low[j] >= high[i])
    inside = (marks[None] > low[:, None]) & (marks[None] < high[:, None])
    assert not inside.all(axis=2).any()
    assert np.all(low >= area[:2])
    assert np.all(high <= area[2:])
    assert len(tied) == count


def test_marks_that_would_hide_each_other_stand_side_by_side() -> None:
    marks = np.array([[100.0, 50.0], [100.0, 52.0], [101.0, 90.0], [200.0, 50.0]])
    moved = labels.side_by_side(marks)
    assert abs(moved[0, 0] - moved[1, 0]) == pytest.approx(9)
    assert np.array_equal(moved[2:], marks[2:])
    assert np.array_equal(moved[:, 1], marks[:, 1])


@pytest.mark.parametrize(
    ("label", "width", "most", "text"),
    [
        ("fedss deck int4", 12, 2, "fedss deck\nint4"),
        ("moments rank 16", 22, 2, "moments rank 16"),
        ("fedss-uncorrected", 12, 2, "fedss-\nuncorrected"),
        ("fedss:sampler=uniform", 15, 2, "fedss:\nsampler=uniform"),
        (
            "fedss:sampler=deck,rows_down=int4,rows_up=int8",
            22,
            2,
            "fedss:sampler=deck,…\nrows_up=int8",
        ),
        ("x" * 40, 12, 2, "x" * 12 + "…"),
        ("", 12, 2, ""),
    ],
)
def test_long_names_keep_both_ends(label: str, width: int, most: int, text: str) -> None:
    assert labels.wrap(label, width, most) == text


def test_names_at_line_ends_are_shown_in_full() -> None:
    names = list(VARIANTS)
    texts = labels.wrapped(names, 200)
    assert [text.replace("\n", " ") for text in texts] == names
    assert labels.stacked(texts) <= 200


def test_twelve_variants_look_different() -> None:
    slots = charts.slots_of([f"variant {i}" for i in range(12)])
    assert len(set(slots)) == 12
    assert len({(charts.DASHES[s], charts.MARKERS[s]) for s in slots}) == 12
    known = charts.SLOT_OF
    assert charts.slots_of(["fedss", "moments", "fedss deck"]) == [
        *(known["fedss"], known["moments"], "extra-1")
    ]
    assert charts.DASHES[known["moments"]]
    assert set(known) == set(fedss.METHODS)
    assert len(set(known.values())) == len(known)


# Machado et al. 2009: normal, protanopia, deuteranopia, tritanopia, on linear RGB.
SEEN_AS = np.array(
    [
        [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
        [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
        [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
        [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
    ]
)


def linear(color: str) -> np.ndarray:
    rgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


@pytest.mark.parametrize("theme", [0, 1])
def test_colours_can_be_read_and_told_apart(theme: int) -> None:
    style = (Path(charts.__file__).parent / "report.html").read_text()
    block = style.split(":root {")[1 + theme].split("}")[0]
    colors = dict(re.findall(r"--([\w-]+): (#\w{6});", block))
    luminance = {name: float(linear(c) @ [0.2126, 0.7152, 0.0722]) for name, c in colors.items()}
    for slot in (*charts.SLOTS, *charts.EXTRA_SLOTS):
        low, high = sorted((luminance[slot], luminance["paper"]))
        assert (high + 0.05) / (low + 0.05) >= 4.5
    assert len({colors[slot] for slot in charts.EXTRA_SLOTS}) == 12
    phases = [f"phase-{phase}" for phase in rounds.PHASES]
    timed = [np.cbrt((SEEN_AS @ linear(colors[name])).clip(0)) for name in phases]
    for i, name in enumerate(phases):
        low, high = sorted((luminance[name], luminance["paper"]))
        # Waiting is paler: it is no work.
        assert (high + 0.05) / (low + 0.05) >= (1.5 if name == "phase-pause" else 3)
        for j in range(i):
            assert np.linalg.norm(timed[i] - timed[j], axis=1).min() > 0.15
    of_method = {method: colors[slot] for method, slot in charts.SLOT_OF.items()}
    for other in ("full", "fedss"):
        pair = of_method["moments"], of_method[other]
        seen = [np.cbrt((SEEN_AS @ linear(c)).clip(0)) for c in pair]
        assert np.linalg.norm(seen[0] - seen[1], axis=1).min() > 0.3


def test_frontier_image_of_one_comparison(variants: Path) -> None:
    image = frontier_figure({"Omniglot": variants})
    assert image == frontier_figure({"Omniglot": variants})
    with Image.open(io.BytesIO(image)) as image:
        assert image.format == "PNG"
        assert image.size == (1280, 800)
        assert image.info["dpi"] == pytest.approx((200, 200), abs=0.1)
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    assert (pixels == 255).all(axis=1).mean() > 0.8
    for color in ((0x1B, 0x1F, 0x24), (0xD0, 0x10, 0x4C)):
        assert (pixels == color).all(axis=1).sum() > 100


@pytest.mark.parametrize(("count", "size"), [(2, (2320, 880)), (3, (2320, 1760))])
def test_frontier_image_of_several(
    variants: Path, tmp_path: Path, count: int, size: tuple[int, int]
) -> None:
    fake_variants(tmp_path, ["full", "fedss deck", "pos-only"])
    folders = {"one": variants, "two": tmp_path, "three": variants}
    image = frontier_figure(dict(list(folders.items())[:count]))
    with Image.open(io.BytesIO(image)) as image:
        assert image.size == size


def test_frontier_image_is_relative_where_every_comparison_has_full(
    variants: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_variants(tmp_path, ["fedss deck", "pos-only"])
    drawn: list[frontier.FrontierPanel] = []
    monkeypatch.setattr(figures, "frontier_png", lambda panels, _: drawn.extend(panels) or b"")
    frontier_figure({"with full": variants})
    frontier_figure({"with full": variants, "without": tmp_path})
    scores = [{p.label: p.mean for p in panel.points} for panel in drawn]
    assert [panel.relative for panel in drawn] == [True, False, False]
    assert scores[0]["full"] == 1
    assert scores[0]["fedss deck"] == pytest.approx(0.347 / 0.35)
    assert scores[1]["fedss deck"] == scores[2]["fedss deck"] == pytest.approx(0.347)
    assert drawn[0].level is not None
    assert drawn[0].level[2] == pytest.approx(0.46 / 0.35)
    slots = [{p.label: p.slot for p in panel.points} for panel in drawn]
    assert slots[1]["fedss deck"] == slots[2]["fedss deck"]


def test_frontier_image_needs_one_to_four_comparisons_with_bytes(
    variants: Path, tmp_path: Path
) -> None:
    for folders in ({}, {str(i): variants for i in range(5)}):
        with pytest.raises(ConfigError, match="folders: expected 1 to 4 of them, got"):
            frontier_figure(folders)
    single(tmp_path, method="central", rounds=5)
    with pytest.raises(RunFolderError, match="expected a finished run with its score and bytes"):
        frontier_figure({"pooled": tmp_path})
