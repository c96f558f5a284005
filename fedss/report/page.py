"""Everything the page says, put together."""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup, escape

from fedss.errors import ConfigError, RunFolderError
from fedss.evaluation.intervals import FLOORS, weakness
from fedss.report import charts
from fedss.report.clients import clients_png
from fedss.report.frontier import (
    MOST_PANELS,
    Panel,
    Point,
    frontier_chart,
    frontier_png,
    on_frontier,
)
from fedss.report.labels import wrap
from fedss.report.panels import augmented, retrieval
from fedss.report.rounds import PHASES, failures, paces
from fedss.report.verification import number, verification
from fedss.runs import headlines
from fedss.runs.reading import METRICS, Group, Round, Run, group_runs, read_runs

METRIC_NAMES = dict(zip(METRICS, ("MAP@10", "R@1", "R@5", "MAP@R"), strict=True))


@dataclass(frozen=True)
class Cell:
    """A table cell: what it shows, a smaller addition, and the exact values on hovering."""

    text: str
    addition: str = ""
    exact: str = ""


@dataclass(frozen=True)
class Row:
    """A line of the table of methods."""

    label: str
    slot: str
    note: str
    cells: list[Cell]


@dataclass(frozen=True)
class Watched:
    """What a page says that is written while something is under way.

    Attributes:
        written: when, the time of day.
        last_round: when the last round ended; empty before the first.
        late: no round ended for far longer than one takes.
        refresh: seconds after which the page loads itself again.
    """

    written: str
    last_round: str
    late: bool
    refresh: int


@dataclass(frozen=True)
class Chart:
    """A chart with its title and what to know when reading it."""

    title: str
    caption: str
    svg: Markup


def render(runs: Sequence[Run], folder: Path, watched: Watched | None = None) -> str:
    """The page of the ``runs`` in a run's or a comparison's folder.

    Raises:
        RunFolderError: there are two of one method and seed.
    """
    groups = group_runs(runs, folder)
    slots = charts.slots_of([group.label for group in groups])
    full = headlines.full_softmax(groups)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "decimals": headlines.decimals,
        "percent": headlines.percent,
        "breakable": lambda name: _breakable(name, "/_"),
        "shortened": lambda name: wrap(name, 20, 1),
        "foldable": lambda text: _breakable(text, ":,"),
    }
    return environment.get_template("report.html").render(
        title=_title(groups),
        finding=headlines.finding(groups),
        second_finding=headlines.second_finding(groups),
        setup=_setup(groups),
        facts=_facts(groups),
        unfinished=[headlines.standing(run) for run in runs if not run.finished],
        watched=watched,
        unscored=headlines.unscored(groups),
        charts=_charts(groups, slots),
        rows=[_row(group, slot, full) for group, slot in zip(groups, slots, strict=True)],
        floors=_floors(groups),
        weakness=_weakness(groups),
        has_intervals=any(group.interval for group in groups),
        has_ratio=any(headlines.ratio(g, full) is not None for g in groups if g is not full),
        several_seeds=any(len(group.runs) > 1 for group in groups),
        seeds=[
            (group, slot, run)
            for group, slot in zip(groups, slots, strict=True)
            for run in group.runs
        ],
        metric_names=METRIC_NAMES,
        federated=any(run.data.get("name") == "federation" for run in runs),
        sites=max((r.sites or 0 for run in runs for r in run.rounds[-1:]), default=0),
        paces=paces(groups, slots),
        phases=PHASES,
        failures=failures(groups),
        retrieval=retrieval(groups, slots),
        verification=verification(groups, slots),
        number=number,
        augmented=augmented(groups),
        settings=_settings(groups),
        commands=_commands(groups),
        versions=_versions(runs),
        single=len(groups) == 1,
        things=_things(groups),
        has_moments=headlines.has_moments(groups),
        methods={group.method for group in groups},
        nearest=headlines.nearest,
        human_bytes=headlines.human_bytes,
        human_seconds=headlines.human_seconds,
        count=headlines.count,
        tally=headlines.tally,
    )


def _weakness(groups: Sequence[Group]) -> str:
    """What is to be said of a test of too few classes; empty if it has enough, or is not known."""
    classes = groups[0].runs[0].data.get("test_classes")
    said = weakness(classes) if classes else ""
    return f"{said[:1].upper()}{said[1:]}." if said else ""


def _breakable(text: str, after: str) -> Markup:
    """The text with leave to break lines after some signs."""
    return Markup(re.sub(f"([{after}])", r"\1<wbr>", str(escape(text))))


def render_bytes_picture(folder: Path) -> bytes:
    """MAP@10 against bytes moved, as PNG in the colours of the page's light theme.

    Raises:
        RunFolderError: records are missing or damaged, or no round has both score and bytes.
    """
    groups = group_runs(read_runs(folder), folder)
    slots = charts.slots_of([group.label for group in groups])
    lines, level = _over_bytes(list(zip(groups, slots, strict=True)))
    if not lines:
        raise RunFolderError(f"{folder}: expected an evaluated round with its bytes, found none")
    return charts.bytes_png(lines, level, _light())


def render_frontier_picture(folders: Mapping[str, Path]) -> bytes:
    """The frontiers of the comparisons in ``folders``, by their titles, as PNG.

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


def render_clients_picture(held: tuple[np.ndarray, np.ndarray, np.ndarray], title: str) -> bytes:
    """Who holds what, as PNG in the colours of the page's light theme."""
    return clients_png(held, title, _light())


def _light() -> dict[str, str]:
    """The colours of the page's light theme."""
    page = (Path(__file__).parent / "report.html").read_text(encoding="utf-8")
    light, _, _ = page.partition("@media")
    return dict(re.findall(r"--([\w-]+): (#\w+);", light))


def _things(groups: Sequence[Group]) -> str:
    return "variants" if headlines.has_variants(groups) else "methods"


def _title(groups: Sequence[Group]) -> str:
    data = groups[0].runs[0].data.get("name", "unnamed data")
    where = "in a federation" if data == "federation" else f"on {data}"
    if len(groups) == 1:
        return f"{groups[0].label} {where}"
    return f"{len(groups)} {_things(groups)} {where}"


def _setup(groups: Sequence[Group]) -> str:
    """What was compared, in a sentence or two."""
    run = groups[0].runs[0]
    seeds = [r.seed for g in groups for r in g.runs]
    what = headlines.listed([g.label for g in groups])
    if len(groups) > charts.FEW and headlines.has_variants(groups):
        what = f"{len(groups)} variants"
    times = "Trained" if len(groups) == 1 else f"{what}, trained"
    rounds = headlines.tally(run.planned_rounds, "round")
    if not all(r.finished for g in groups for r in g.runs):
        single = len(groups) == 1 and len(seeds) == 1
        rounds = f"{headlines.count(run.last_round)} of {rounds}" if single else f"up to {rounds}"
    parts = [f"{times} for {rounds}"]
    if clients := headlines.cohort(groups):
        parts.append(f"of {clients}")
    plural = "s" if len(set(seeds)) > 1 else ""
    parts.append(f"with seed{plural} {headlines.numbers(seeds)}.")
    return " ".join(parts)


def _facts(groups: Sequence[Group]) -> list[tuple[str, str, str]]:
    """(number, what it counts, addition) for the strip under the headline."""
    run = groups[0].runs[0]
    data, config = run.data, run.settings
    split = config.get("eval_split", "test")
    facts = []
    last = run.rounds[-1] if run.rounds else None
    for key, name, known in (
        ("train_images", "training picture", None),
        # A federation learns of these by and by.
        ("train_classes", "training class", last.num_classes if last else None),
        ("train_clients", "client", last.num_clients if last else None),
    ):
        number = data.get(key) if data.get(key) is not None else known
        if number is not None:
            facts.append((*_apart(number, name), ""))
    if isinstance(data.get("own_classes"), list) and len(data["own_classes"]) == 3:
        low, middle, high = (headlines.count(value) for value in data["own_classes"])
        facts.append((middle, "classes per client", f"median; {low} to {high}"))
    if data.get("test_queries"):
        gallery = data.get("test_gallery")
        against = (
            "each against all others" if gallery is None else f"against {headlines.count(gallery)}"
        )
        facts.append((*_apart(data["test_queries"], f"{split} query"), against))
    if data.get("test_classes"):
        seen = data.get("test_classes_seen")  # older records do not say
        trained = "" if seen is None else f"{headlines.count(seen)} of them trained on"
        addition = "never trained on" if seen == 0 else trained
        facts.append((*_apart(data["test_classes"], f"{split} class"), addition))
    if isinstance(data.get("image_shape"), list) and len(data["image_shape"]) == 3:
        channels, height, width = data["image_shape"]
        kind = {1: "grey", 3: "colour"}.get(channels, f"{channels} channels")
        facts.append((f"{width} × {height}", "pixels", kind))
    backbone = config.get("backbone")
    facts.append((headlines.count(run.parameters), "parameters", str(backbone) if backbone else ""))
    if config.get("embedding_size") is not None:
        facts.append((str(config["embedding_size"]), "embedding size", ""))
    return facts


def _apart(number: float, noun: str) -> tuple[str, str]:
    shown, _, name = headlines.tally(number, noun).partition(" ")
    return shown, name


def _charts(groups: Sequence[Group], slots: Sequence[str]) -> list[Chart]:
    paired = list(zip(groups, slots, strict=True))
    several = any(len(group.runs) > 1 for group in groups)
    band = " Lines: mean over seeds; bands: lowest to highest." if several else ""
    if several and len(groups) > charts.FEW:
        band = " Means over seeds."
    names = headlines.listed([group.label for group in groups])
    last = max(run.planned_rounds for group in groups for run in group.runs)
    made = []
    scores = _lines(paired, _map_at_10, start=True)
    if scores:
        floor = _highest_floor(groups)
        svg = charts.rounds_chart("rounds", scores, last, f"MAP@10 over rounds for {names}", floor)
        caption = f"The higher, the better.{band}"
        if floor is not None:
            caption += f" Dotted: {floor[0]}, to be had without training."
        made.append(Chart("MAP@10 over rounds", caption, svg))
    moved, level = _over_bytes(paired)
    if 0 < len(moved) <= charts.FEW:
        caption = "Further left: fewer bytes for the same accuracy."
        if level is not None:
            caption += " central, the pooled reference, moves pictures: only its end is shown."
        alt = f"MAP@10 against bytes moved for {names}"
        svg = charts.bytes_chart("bytes", moved, level, alt)
        made.append(Chart("MAP@10 against bytes moved", caption, svg))
    if len(_points(paired)) >= 3:
        panel = _panel(paired)
        svg = frontier_chart("frontier", panel, f"MAP@10 against bytes per round for {names}")
        made.append(Chart("The frontier", _frontier_caption(panel), svg))
    if bars := _bars(paired):
        rows = headlines.rows_sent(groups)
        alt = f"Bytes per client and round, backbone and {rows}, for {names}"
        caption = "Download and upload together." if len(groups) > 1 else f"Backbone and {rows}."
        svg = charts.bars_chart("bars", bars, rows, alt)
        made.append(Chart("Bytes per client and round", f"{caption} As serialised.", svg))
    losses = _lines(paired, lambda r: r.loss)
    if losses:
        caption = "Each method’s loss is over its own class sample"
        caption += "." if len(groups) == 1 else ": compare shapes, not heights."
        svg = charts.rounds_chart("loss", losses, last, f"Training loss over rounds for {names}")
        made.append(Chart("Training loss", caption, svg))
    return made


def _highest_floor(groups: Sequence[Group]) -> tuple[str, float] | None:
    """The best that is to be had without this network, whose own curve begins at round 0."""
    found = [
        (value, FLOORS[name])
        for group in groups
        for name in FLOORS
        if name != "untrained" and (value := group.floor(name)) is not None
    ]
    return max(found)[::-1] if found else None


def _over_bytes(
    paired: Sequence[tuple[Group, str]],
) -> tuple[list[charts.Line], tuple[str, str, float] | None]:
    """MAP@10 over the bytes moved, and the (label, slot, score) of pooled training."""
    return _lines(paired, _map_at_10, over_bytes=True), _level(paired)


def _map_at_10(r: Round) -> float | None:
    return None if r.metrics is None else r.metrics["map_at_10"]


def _level(paired: Sequence[tuple[Group, str]]) -> tuple[str, str, float] | None:
    """The (label, slot, score) of pooled training."""
    pooled = next((pair for pair in paired if pair[0].method == "central"), None)
    score = None if pooled is None else pooled[0].mean("map_at_10")
    if pooled is None or score is None or not np.isfinite(score):
        return None
    return pooled[0].label, pooled[1], score


def _points(paired: Sequence[tuple[Group, str]]) -> list[Point]:
    """What each finished group reaches in the end, and what it moves."""
    points = []
    for group, slot in paired:
        mean, moved = group.mean("map_at_10"), headlines.both_ways(group)
        known = [value for value in (mean, moved) if value is not None and np.isfinite(value)]
        if group.finished and len(known) == 2 and known[1] > 0:
            values = group.values("map_at_10")
            points.append(Point(group.label, slot, known[1], known[0], min(values), max(values)))
    return points


def _panel(
    paired: Sequence[tuple[Group, str]], title: str = "", reference: float | None = None
) -> Panel:
    """The variants for the frontier; all scores relative to the ``reference`` if there is one."""
    unit, level = reference or 1.0, _level(paired)
    points = [
        replace(p, mean=p.mean / unit, low=p.low / unit, high=p.high / unit)
        for p in _points(paired)
    ]
    level = None if level is None else (level[0], level[1], level[2] / unit)
    return Panel(title, tuple(points), level, relative=reference is not None)


def _frontier_caption(panel: Panel) -> str:
    """What to see: what nothing else beats, and what is beaten."""
    upright = any(point.high > point.low for point in panel.points)
    beaten = not all(on_frontier(panel.points))
    parts = ["Up and left is better: along the line nothing is both cheaper and better"]
    parts += ["hollow marks are beaten"] if beaten else []
    parts += ["uprights span the seeds"] if upright else []
    return f"{'; '.join(parts)}."


def _lines(
    paired: Sequence[tuple[Group, str]],
    value: Any,
    over_bytes: bool = False,
    start: bool = False,
) -> list[charts.Line]:
    """A line per method over the rounds that all of its runs have a finite ``value`` for; with
    ``start`` from round 0 on, the untrained network."""
    lines = []
    for group, slot in paired:
        values = [_finite(run.rounds, value) for run in group.runs]
        if not over_bytes and start:
            for run, of_run in zip(group.runs, values, strict=True):
                of_run.update({0: run.floors["untrained"]} if "untrained" in run.floors else {})
        positions = [_cumulative(run.rounds) if over_bytes else None for run in group.runs]
        common = sorted(set.intersection(*(set(of_run) for of_run in values)))
        if not common or (over_bytes and any(not of_run for of_run in positions)):
            continue
        table = np.array([[of_run[r] for r in common] for of_run in values])
        if over_bytes:
            x = np.array([[p[r] for r in common] for p in positions if p]).mean(axis=0)
        else:
            x = np.array(common, dtype=float)
        lines.append(
            charts.Line(
                group.label, slot, x, table.mean(axis=0), table.min(axis=0), table.max(axis=0)
            )
        )
    return lines


def _finite(rounds: Sequence[Round], value: Any) -> dict[int, float]:
    values = {r.number: value(r) for r in rounds}
    return {number: v for number, v in values.items() if v is not None and np.isfinite(v)}


def _cumulative(rounds: Sequence[Round]) -> dict[int, float]:
    """Bytes moved up to and with each round; empty if they are not known."""
    if any(r.bytes_moved is None for r in rounds):
        return {}
    sums = np.cumsum([r.bytes_moved for r in rounds])
    return {r.number: float(total) for r, total in zip(rounds, sums, strict=True) if total > 0}


def _bars(paired: Sequence[tuple[Group, str]]) -> list[charts.Bar]:
    """A bar per method, or one per direction if there is one method only."""
    full = headlines.full_softmax([group for group, _ in paired])
    reference = None if full is None else headlines.both_ways(full)
    bars = []
    for group, slot in paired:
        for way in ("both",) if len(paired) > 1 else ("down", "up"):
            total, backbone, class_rows = (
                headlines.both_ways(group, part)
                if way == "both"
                else group.mean(f"{part}bytes_{way}_per_client_round")
                for part in ("", "backbone_", "row_")
            )
            if total is None or backbone is None or class_rows is None:
                continue
            text = headlines.human_bytes(total)
            if way == "both" and reference and group is not full:
                text += f" · {headlines.percent(total / reference)}"
            label = group.label if way == "both" else way
            bars.append(charts.Bar(label, slot, backbone, class_rows, text))
    return bars


def _row(group: Group, slot: str, full: Group | None) -> Row:
    share = headlines.ratio(group, full)
    note = "" if group.finished else headlines.progress(group.runs[0])
    relative = "" if share is None or group is full else f"{share:.3f}"
    ends = group.interval
    cells = [
        _score(group, "map_at_10"),
        Cell(relative),
        Cell("" if ends is None else f"{ends.low:.3f}\u2060–\u2060{ends.high:.3f}"),
        _score(group, "map_at_10_by_class", spread=False),
        _score(group, "recall_at_1"),
    ]
    rows = group.mean("class_rows_per_client")
    cells.append(Cell(headlines.count(rows), exact="" if rows is None else f"{rows:.2f}"))
    for way in ("down", "up"):
        for part in ("backbone_", "row_"):
            mean = group.mean(f"{part}bytes_{way}_per_client_round")
            exact = "" if mean is None else f"{headlines.count(mean)} bytes"
            cells.append(Cell(headlines.human_bytes(mean), exact=exact))
    seconds = group.mean("seconds")
    cells.append(
        Cell(headlines.human_seconds(seconds), exact=f"{headlines.decimals(seconds, 1)} s")
    )
    return Row(group.label, slot, note, cells)


def _floors(groups: Sequence[Group]) -> list[tuple[str, Cell, Cell]]:
    """The floors' rows: name, MAP@10 and its mean over classes; means over groups."""
    rows = []
    for name, told in FLOORS.items():
        values = [v for group in groups if (v := group.floor(name)) is not None]
        if not values:
            continue
        exact = "; ".join(f"{g.label}: {headlines.decimals(g.floor(name), 4)}" for g in groups)
        by_class = [
            float(run.floor_classes[name].map_at_10_C.mean())
            for group in groups
            for run in group.runs
            if name in run.floor_classes
        ]
        mean = sum(by_class) / len(by_class) if by_class else None
        score = headlines.decimals(sum(values) / len(values))
        rows.append((told, Cell(score, exact=exact), Cell(headlines.decimals(mean))))
    return rows


def _score(group: Group, key: str, spread: bool = True) -> Cell:
    values = group.values(key)
    exact = "; ".join(
        f"seed {run.seed}: {headlines.decimals(run.results[key], 4)}" for run in group.runs
    )
    return Cell(
        headlines.decimals(group.mean(key)), headlines.spread(values) if spread else "", exact
    )


def _settings(groups: Sequence[Group]) -> dict[str, Any]:
    """Every setting: those all methods share, and a table of those that differ."""
    of_group = {group.label: dict(group.runs[0].settings) for group in groups}
    if any(len(group.runs) > 1 for group in groups):
        for group in groups:
            of_group[group.label]["seed"] = headlines.numbers([run.seed for run in group.runs])
    keys = sorted({key for settings in of_group.values() for key in settings})
    shared, differing = [], []
    for key in keys:
        values = [_shown(settings.get(key)) for settings in of_group.values()]
        if all(a == b for a, b in pairwise(values)):
            shared.append((key, values[0]))
        elif key != "method" or headlines.has_variants(groups):
            differing.append((key, values))
    return {"shared": shared, "differing": differing, "labels": list(of_group)}


def _shown(value: object) -> str:
    if value is None:
        return headlines.NOTHING
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _commands(groups: Sequence[Group]) -> list[str]:
    """One command for the run or the comparison; one per method if other settings differ too."""
    settings = [
        {k: v for k, v in group.runs[0].settings.items() if k not in ("method", "seed")}
        for group in groups
    ]
    if len(groups) > 1 and all(a == b for a, b in pairwise(settings)):
        seeds = sorted({run.seed for group in groups for run in group.runs})
        methods = list(dict.fromkeys(group.method for group in groups))
        chosen = {"methods": methods, "seeds": seeds}
        return [_command("compare", {**chosen, **settings[0]})]
    first = [group.runs[0] for group in groups]
    return [run.command or _again(run) for run in first]


def _again(run: Run) -> str:
    where = run.data.get("evaluated_at")
    if where is None:
        return _command("train", run.settings)
    app = _command("app", {**run.settings, "evaluate_at": where}, "again", out="/srv/again")
    return f"{app} && flwr run again"


def _command(name: str, settings: Mapping[str, Any], *arguments: str, out: str = "again") -> str:
    parts = ["fedss", name, *arguments]
    for key, value in settings.items():
        flag = key.replace("_", "-")
        if isinstance(value, bool):
            parts.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            several = value if isinstance(value, list) else [value]
            parts += [f"--{flag}", *(str(item) for item in several)]
    return shlex.join([*parts, "--out", out])


def _versions(runs: Sequence[Run]) -> list[tuple[str, str]]:
    names = list(dict.fromkeys(name for run in runs for name in run.versions))
    return [
        (name, ", ".join(dict.fromkeys(r.versions[name] for r in runs if name in r.versions)))
        for name in names
    ]
