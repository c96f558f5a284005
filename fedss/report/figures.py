"""The charts of a page, from the records of its groups, and those that stand alone as PNG."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from markupsafe import Markup

from fedss.errors import ConfigError, RunFolderError
from fedss.evaluation.intervals import floor_words
from fedss.report import charts
from fedss.report.clients import Held, clients_png
from fedss.report.frontier import (
    MOST_PANELS,
    FrontierPanel,
    FrontierPoint,
    frontier_chart,
    frontier_png,
    on_frontier,
)
from fedss.runs import headlines
from fedss.runs.reading import Group, group_runs, read_runs
from fedss.runs.records import Record, bytes_moved
from fedss.text import human_bytes, listed

Value = Callable[[Record], float | None]


def page_charts(groups: Sequence[Group], slots: Sequence[str]) -> list[tuple[str, str, Markup]]:
    """The charts that these groups have anything to show in: title, what to know when reading it,
    and drawing."""
    paired = list(zip(groups, slots, strict=True))
    several = any(len(group.runs) > 1 for group in groups)
    band = " Lines: mean over seeds; bands: lowest to highest." if several else ""
    if several and len(groups) > charts.FEW:
        band = " Means over seeds."
    names = listed([group.label for group in groups])
    last = max(run.planned_rounds for group in groups for run in group.runs)
    made = []
    # The one picture of what is gained and what it costs; a single method has nothing to be beside.
    if len(_points(paired)) >= 2:
        panel = _panel(paired)
        svg = frontier_chart("bytes", panel, f"MAP@10 against all bytes for {names}")
        made.append(("MAP@10 against all bytes", _frontier_caption(groups, panel), svg))
    scores = evaluations(groups, slots)
    if scores:
        # Without the untrained network, where its own curve begins.
        best = headlines.best_floor(groups, without="untrained")
        floor = best and (floor_words(best[0]), best[1])
        svg = charts.rounds_chart("rounds", scores, last, f"MAP@10 over rounds for {names}", floor)
        caption = f"The higher, the better.{band}"
        if floor is not None:
            caption += f" Dotted: {floor[0]}, to be had without training."
        made.append(("MAP@10 over rounds", caption, svg))
    if len(groups) > 1 and (bars := _bars(paired)):
        rows = "class rows and moments" if headlines.has_moments(groups) else "class rows"
        alt = f"Bytes per client and round, backbone and {rows}, for {names}"
        svg = charts.bars_chart("bars", bars, rows, alt)
        made.append(
            ("Bytes per client and round", "Download and upload together. As serialized.", svg)
        )
    losses = _lines(paired, lambda record: record["loss"])
    if losses:
        caption = "Each method’s loss is over its own class sample"
        caption += "." if len(groups) == 1 else ": compare shapes, not heights."
        svg = charts.rounds_chart("loss", losses, last, f"Training loss over rounds for {names}")
        made.append(("Training loss", caption, svg))
    return made


def evaluations(groups: Sequence[Group], slots: Sequence[str]) -> list[charts.Curve]:
    """MAP@10 of each method over the rounds in which all of its runs were evaluated."""
    return _lines(list(zip(groups, slots, strict=True)), _map_at_10, start=True)


def _map_at_10(record: Record) -> float | None:
    return None if record["metrics"] is None else record["metrics"]["map_at_10"]


def _level(paired: Sequence[tuple[Group, str]]) -> charts.Level | None:
    """That of pooled training."""
    pooled = next((pair for pair in paired if pair[0].pooled), None)
    score = None if pooled is None else pooled[0].mean("map_at_10")
    if pooled is None or score is None or not np.isfinite(score):
        return None
    return pooled[0].label, pooled[1], score


def _points(paired: Sequence[tuple[Group, str]]) -> list[FrontierPoint]:
    """What each finished group reaches in the end, and what it moves."""
    points = []
    for group, slot in paired:
        mean, moved = group.mean("map_at_10"), headlines.both_ways(group)
        known = [value for value in (mean, moved) if value is not None and np.isfinite(value)]
        if group.finished and len(known) == 2 and known[1] > 0:
            values, interval = group.values("map_at_10"), group.interval
            ends = min(values), max(values)
            if interval is not None:
                ends = interval.low, interval.high
            points.append(FrontierPoint(group.label, slot, known[1], known[0], *ends))
    return points


def _panel(
    paired: Sequence[tuple[Group, str]], title: str = "", reference: float | None = None
) -> FrontierPanel:
    """The variants for the frontier; all scores relative to the ``reference`` if there is one."""
    unit, level = reference or 1.0, _level(paired)
    points = [
        replace(p, mean=p.mean / unit, low=p.low / unit, high=p.high / unit)
        for p in _points(paired)
    ]
    level = None if level is None else (level[0], level[1], level[2] / unit)
    return FrontierPanel(title, tuple(points), level, relative=reference is not None)


def _frontier_caption(groups: Sequence[Group], panel: FrontierPanel) -> str:
    """What to see: what nothing else beats, what is beaten, and how sure it is."""
    parts = ["Up and left is better: along the line nothing is both cheaper and better"]
    parts += [] if all(on_frontier(panel.points)) else ["hollow marks are beaten"]
    if any(group.interval for group in groups):
        parts.append("uprights: 95\u00a0% intervals")
    elif any(point.high > point.low for point in panel.points):
        parts.append("uprights span the seeds")
    return f"{'; '.join(parts)}."


def _lines(
    paired: Sequence[tuple[Group, str]], value: Value, over_bytes: bool = False, start: bool = False
) -> list[charts.Curve]:
    """A line per method over the rounds that all of its runs have a finite ``value`` for; with
    ``start`` from round 0 on, the untrained network."""
    lines = []
    for group, slot in paired:
        values = [
            {r["round"]: v for r in run.records if (v := value(r)) is not None and np.isfinite(v)}
            for run in group.runs
        ]
        if start:
            for run, of_run in zip(group.runs, values, strict=True):
                floors = run.floors.map_at_10
                of_run.update({0: floors["untrained"]} if "untrained" in floors else {})
        common = sorted(set.intersection(*(set(of_run) for of_run in values)))
        plain = {number: float(number) for number in common}
        positions = [_cumulative(run.records) if over_bytes else plain for run in group.runs]
        if not common or not all(positions):
            continue
        table = np.array([[of_run[r] for r in common] for of_run in values])
        x = np.array([[of_run[r] for r in common] for of_run in positions]).mean(axis=0)
        lines.append(charts.Curve.over_runs(group.label, slot, x, table))
    return lines


def _cumulative(records: Sequence[Record]) -> dict[int, float]:
    """Bytes moved up to and with each round; empty if they are not known."""
    moved = {record["round"]: bytes_moved(record) for record in records}
    if None in moved.values():
        return {}
    sums = np.cumsum(np.array([*moved.values()], np.float64))
    return {number: float(total) for number, total in zip(moved, sums, strict=True) if total > 0}


def _bars(paired: Sequence[tuple[Group, str]]) -> list[charts.Bar]:
    """A bar per method that moves bytes."""
    full = headlines.full_softmax([group for group, _ in paired])
    reference = None if full is None else headlines.both_ways(full)
    bars = []
    for group, slot in paired:
        total, backbone, class_rows = (
            headlines.both_ways(group, part) for part in ("", "backbone_", "row_")
        )
        if total is None or backbone is None or class_rows is None:
            continue
        text = human_bytes(total)
        if reference and group is not full:
            text += f" · {headlines.unbroken_percent(total / reference)}"
        bars.append(charts.Bar(group.label, slot, backbone, class_rows, text))
    return bars


def bytes_figure(folder: Path) -> bytes:
    """The report's chart of MAP@10 against bytes moved, as a PNG for a README or a talk.

    Args:
        folder: as for :func:`write_report`.

    Returns:
        A PNG of 6.4 x 4 inches at 200 dpi on white. The same records give the same bytes.

    Raises:
        RunFolderError: records are missing or damaged, or no round has both score and bytes.
    """
    groups = group_runs(read_runs(folder), folder)
    slots = charts.slots_of([group.label for group in groups])
    paired = list(zip(groups, slots, strict=True))
    lines = _lines(paired, _map_at_10, over_bytes=True)
    if not lines:
        raise RunFolderError(f"{folder}: expected an evaluated round with its bytes, found none")
    figure = charts.draw_bytes(lines, _level(paired), _light(), "MAP@10 against bytes moved")
    return charts.as_png(figure, _light())


def rounds_figure(folder: Path) -> bytes:
    """The report's chart of MAP@10 over rounds, or of the loss where nothing was evaluated.

    Args:
        folder: as for :func:`write_report`.

    Returns:
        A PNG of 6.4 x 4 inches at 200 dpi on white. The same records give the same bytes.

    Raises:
        RunFolderError: records are missing or damaged, or there is no round yet.
    """
    groups = group_runs(read_runs(folder), folder)
    slots = charts.slots_of([group.label for group in groups])
    lines, title, level = evaluations(groups, slots), "MAP@10 over rounds", None
    if lines and (best := headlines.best_floor(groups, without="untrained")):
        level = floor_words(best[0]), best[1]
    if not lines:
        paired = list(zip(groups, slots, strict=True))
        lines, title = _lines(paired, lambda record: record["loss"]), "Training loss over rounds"
    if not lines:
        raise RunFolderError(f"{folder}: expected a finished round to draw, found none")
    last = max(run.planned_rounds for group in groups for run in group.runs)
    return charts.as_png(charts.draw_rounds(lines, last, level, _light(), title), _light())


def frontier_figure(folders: Mapping[str, Path]) -> bytes:
    """The report's chart of the frontier, of one or several comparisons, as a PNG for a README.

    Each variant's final MAP@10 (mean over seeds) against the bytes it moves per client and round,
    both ways, with its 95 % interval, or where that is not known from the lowest to the highest
    seed. Where every comparison has a finished ``full``, scores are relative to it, and all panels
    share one axis.

    Args:
        folders: one to four: title -> folder of a comparison, as for :func:`write_report`. Runs
            not yet finished are left out. The images of several stand in two columns.

    Returns:
        A PNG at 200 dpi on white: 6.4 x 4 inches for one comparison, 5.8 x 4.4 inches for each
        of several. The same records give the same bytes.

    Raises:
        ConfigError: no folder, or more than four.
        RunFolderError: records are missing or damaged, or a comparison has no finished run with
            both score and bytes.
    """
    if not 1 <= len(folders) <= MOST_PANELS:
        raise ConfigError(f"folders: expected 1 to {MOST_PANELS} of them, got {len(folders)}")
    of_folder = {}
    for title, folder in folders.items():
        of_folder[title] = group_runs(read_runs(folder), folder)
        if not _points([(group, "") for group in of_folder[title]]):
            raise RunFolderError(
                f"{folder}: expected a finished run with its score and bytes, found none"
            )
    labels = list(dict.fromkeys(g.label for groups in of_folder.values() for g in groups))
    slots = dict(zip(labels, charts.slots_of(labels), strict=True))
    fulls = [headlines.full_softmax(groups) for groups in of_folder.values()]
    means = [None if g is None or not g.finished else g.mean("map_at_10") for g in fulls]
    relative = all(means)
    panels = []
    for (title, groups), mean in zip(of_folder.items(), means, strict=True):
        paired = [(group, slots[group.label]) for group in groups]
        panels.append(_panel(paired, title, mean if relative else None))
    return frontier_png(panels, _light())


def clients_figure(held: Held, title: str) -> bytes:
    """Images and classes per client, clients per class, and a client x class matrix, as a PNG.

    The matrix shows up to 36 clients, evenly spread from most images to fewest, and the classes
    that they hold; those held by the same clients stand next to each other.

    Args:
        held: client, class and number of images of each pair of client and class that has any,
            integers [P], as :func:`fedss.data.holdings` gives them.
        title: stands above.

    Returns:
        A PNG of 12.2 x 9.2 inches at 200 dpi on white. The same numbers give the same bytes.
    """
    return clients_png(held, title, _light())


def _light() -> dict[str, str]:
    """The colours of the page's light theme."""
    page = (Path(__file__).parent / "report.html").read_text(encoding="utf-8")
    light, _, _ = page.partition("@media")
    return dict(re.findall(r"--([\w-]+): (#\w+);", light))
