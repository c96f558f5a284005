"""The tables of a page: methods in figures, floors, settings, commands, versions."""

import json
import shlex
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from fedss.evaluation.intervals import floor_words
from fedss.report.charts import Curve
from fedss.runs import headlines
from fedss.runs.reading import Group, RecordedRun
from fedss.runs.records import METRICS
from fedss.text import DASH, decimals, human_bytes, human_seconds, spaced

_BYTES = tuple(
    f"{part}bytes_{way}_per_client_round"
    for way in ("down", "up")
    for part in ("backbone_", "row_")
)


class Cell(NamedTuple):
    """A table cell: what it shows, and a smaller addition."""

    text: str
    addition: str = ""


def method_row(group: Group, slot: str, full: Group | None) -> dict[str, Any]:
    """A group's line, in figures and relative to the full softmax."""
    share = headlines.ratio(group, full)
    note = "" if group.finished else headlines.rounds_done(group.runs[0])
    relative = "" if share is None or group is full else f"{share:.3f}"
    ends = group.interval
    cells = [
        _score(group, "map_at_10"),
        Cell(relative),
        Cell("" if ends is None else f"{ends.low:.3f}\u2060–\u2060{ends.high:.3f}"),
        _score(group, "map_at_10_by_class", spread=False),
        _score(group, "recall_at_1"),
    ]
    cells.append(Cell(spaced(group.mean("class_rows_per_client"))))
    cells += [Cell(human_bytes(group.mean(key))) for key in _BYTES]
    cells.append(Cell(human_seconds(group.mean("seconds"))))
    return {"label": group.label, "slot": slot, "note": note, "cells": cells}


def floor_rows(groups: Sequence[Group]) -> list[tuple[str, str, str, str]]:
    """The floors' rows: name, MAP@10, its mean over classes, and MAP@10 with four decimals; means
    over groups."""
    rows = []
    for name in headlines.floor_names(groups):
        values = [v for group in groups if (v := group.floor(name)) is not None]
        scores = [run.floors.by_class.get(name) for group in groups for run in group.runs]
        by_class = [float(s.map_at_10_C.mean()) for s in scores if s is not None]
        mean = sum(by_class) / len(by_class) if by_class else None
        score = sum(values) / len(values)
        rows.append((floor_words(name), decimals(score), decimals(mean), decimals(score, 4)))
    return rows


def _score(group: Group, key: str, spread: bool = True) -> Cell:
    return Cell(decimals(group.mean(key)), headlines.spread(group.values(key)) if spread else "")


def exact_row(run: RecordedRun) -> list[str]:
    """A run's figures in full: scores, class rows, bytes, seconds."""
    results = run.results
    return [
        *(decimals(results[key], 4) for key in METRICS),
        decimals(results["class_rows_per_client"], 2),
        *(spaced(results[key]) for key in _BYTES),
        decimals(results["seconds"], 1),
    ]


def evaluation_rows(curves: Sequence[Curve]) -> list[tuple[str, list[str]]]:
    """Round, and MAP@10 of each curve in it."""
    of_curve = [dict(zip(curve.x.tolist(), curve.mean.tolist(), strict=True)) for curve in curves]
    rounds = sorted({number for values in of_curve for number in values})
    return [(spaced(r), [decimals(values.get(r), 4) for values in of_curve]) for r in rounds]


def settings(groups: Sequence[Group]) -> dict[str, Any]:
    """Every setting: those all methods share, and a table of those that differ."""
    of_group = {group.label: dict(group.runs[0].settings) for group in groups}
    if any(len(group.runs) > 1 for group in groups):
        for group in groups:
            seeds = [run.seed for run in group.runs]
            of_group[group.label]["seed"] = headlines.listed_numbers(seeds)
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
        return DASH
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def commands(groups: Sequence[Group]) -> list[str]:
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
    return [group.runs[0].command or _again(group.runs[0]) for group in groups]


def _again(run: RecordedRun) -> str:
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


def versions(runs: Sequence[RecordedRun]) -> list[tuple[str, str]]:
    """What the runs were made with: name and version, or several of them."""
    names = list(dict.fromkeys(name for run in runs for name in run.versions))
    return [
        (name, ", ".join(dict.fromkeys(r.versions[name] for r in runs if name in r.versions)))
        for name in names
    ]
