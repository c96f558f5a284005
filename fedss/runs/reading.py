"""The runs of a folder, read and checked: one run, or those of a comparison."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np

from fedss.errors import RunFolderError
from fedss.evaluation.baselines import Floors
from fedss.evaluation.intervals import ClassScores, Interval, difference, interval
from fedss.evaluation.task import ConfusedClasses, Neighbours
from fedss.evaluation.verification import Verification
from fedss.losses.methods import METHODS
from fedss.runs.about import DataFacts, RunSettings, read_run_config
from fedss.runs.audits import Audit, read_audit
from fedss.runs.fields import damaged
from fedss.runs.findings import (
    read_augmented,
    read_confused,
    read_neighbours,
    read_scores,
    read_verification,
)
from fedss.runs.records import METRICS, WAYS, Record, num_sites, read_all_records
from fedss.runs.summaries import MEANS, Summary, read_summaries, summarize

# What a run is compared by: figures of its summary.
_FIGURES = (*METRICS, "map_at_10_by_class", *MEANS.values(), "seconds")


@dataclass(frozen=True)
class RecordedRun:
    """One variant of a method with one seed, as its folder tells it.

    ``results`` are figures by their name in :class:`fedss.runs.summaries.Summary`, and
    ``row_bytes_*``: class rows and moments together. Those of an unfinished run are those of its
    last evaluated round.
    ``label`` names the variant wherever it is shown. ``augmented``: uint8 [P, 1 + V, C, H, W],
    training images, each followed by what clients may make of it. ``by_class`` is the trained
    model's MAP@10.
    """

    method: str
    label: str
    seed: int
    finished: bool
    planned_rounds: int
    settings: RunSettings
    data: DataFacts
    parameters: int
    versions: Mapping[str, str]
    command: str | None
    records: tuple[Record, ...]
    results: Mapping[str, float | None]
    neighbours: Neighbours | None
    verification: Verification | None
    confused: ConfusedClasses | None
    augmented: np.ndarray | None
    floors: Floors
    by_class: ClassScores | None
    audit: Audit | None

    @property
    def at_sites(self) -> bool:
        """Whether retrieval is measured in the gallery of each site."""
        return any(num_sites(record) for record in self.records[-1:])

    @property
    def last_round(self) -> int:
        """The number of the last recorded round, 0 if there is none."""
        return self.records[-1]["round"] if self.records else 0


@dataclass(frozen=True)
class Group:
    """The runs of one label, over seeds: finished ones, or all of them while none is."""

    method: str
    label: str
    runs: tuple[RecordedRun, ...]

    @property
    def pooled(self) -> bool:
        """Whether it is a reference on pooled images, no federated learning."""
        return self.method in METHODS and METHODS[self.method].pooled

    @property
    def finished(self) -> bool:
        """Whether the figures are those of finished runs."""
        return self.runs[0].finished

    def values(self, key: str) -> list[float]:
        """The result ``key`` of each run that has it."""
        return [v for run in self.runs if (v := run.results[key]) is not None]

    def mean(self, key: str) -> float | None:
        """The mean of the result ``key`` over the runs; None if a run lacks it."""
        return self._mean(self.values(key))

    def _mean(self, values: Sequence[float]) -> float | None:
        return sum(values) / len(values) if len(values) == len(self.runs) else None

    @cached_property
    def interval(self) -> Interval | None:
        """MAP@10 with its 95 % interval, where each class's is known of every run."""
        known = self.by_class and self.mean("map_at_10") is not None
        return interval(self.by_class) if known else None

    @property
    def by_class(self) -> list[ClassScores]:
        """MAP@10 of each class, run by run; empty if a run lacks it."""
        found = [run.by_class for run in self.runs if run.by_class is not None]
        return found if len(found) == len(self.runs) else []

    def floor(self, name: str) -> float | None:
        """The mean of a floor over the runs; None if a run lacks it."""
        floors = [run.floors.map_at_10 for run in self.runs]
        return self._mean([of_run[name] for of_run in floors if name in of_run])

    def over(self, other: "Group") -> Interval | None:
        """What MAP@10 is better by than that of others, on the same classes; None if not known."""
        seeds = [[run.seed for run in group.runs] for group in (self, other)]
        if not self.by_class or not other.by_class:
            return None
        return difference(self.by_class, other.by_class, paired=seeds[0] == seeds[1])

    def over_floor(self, name: str) -> Interval | None:
        """What MAP@10 is better by than a floor; None if not known."""
        by_class = [run.floors.by_class for run in self.runs]
        floors = [of_run[name] for of_run in by_class if name in of_run]
        if not self.by_class or len(floors) < len(self.runs):
            return None
        return difference(self.by_class, floors, paired=True)


def read_runs(folder: Path) -> list[RecordedRun]:
    """Read every run that ``folder/summary.json`` names, and those beside it still under way.

    Raises:
        RunFolderError: records are missing or damaged.
    """
    summary = folder / "summary.json"
    entries = read_summaries(folder)
    if summary.is_file() and not entries:
        raise damaged(summary, "expected a list with one object per run, got []")
    runs = [_run(folder / entry["folder"], entry) for entry in entries]
    # A run's folder is named after it: the label, with some signs replaced, and the seed.
    names = {_plain(run.label): run.label for run in runs if run.label}
    seen = {(folder / entry["folder"]).resolve() for entry in entries}
    for candidate in [folder, *sorted(path for path in folder.glob("*") if path.is_dir())]:
        is_run = (candidate / "config.json").is_file() and (candidate / "records.jsonl").is_file()
        if is_run and candidate.resolve() not in seen:
            # Of a comparison under way, the runs that are done have a summary of their own.
            own = [] if candidate == folder else read_summaries(candidate)
            if len(own) > 1:
                where = candidate / "summary.json"
                raise damaged(where, f"expected a list with the object of one run, got {len(own)}")
            run = _run(candidate, own[0] if own else None)
            name, dash, _ = candidate.name.rpartition(f"-seed{run.seed}")
            label = names.get(_plain(name), name) if dash and candidate != folder else ""
            runs.append(replace(run, label=label))
    if not runs:
        missing = [n for n in ("config.json", "records.jsonl") if not (folder / n).is_file()]
        lack = f"no {' and no '.join(['summary.json', *missing])}"
        raise RunFolderError(
            f"{folder}: expected the records of a run (config.json and records.jsonl) or of a "
            f"comparison (summary.json), found {lack if folder.is_dir() else 'no such folder'}"
        )
    return _label(runs)


def _plain(name: str) -> str:
    return re.sub("[^a-zA-Z0-9_.=-]+", "-", name)


def group_runs(runs: Sequence[RecordedRun], folder: Path) -> list[Group]:
    """Put the seeds of one label together, in the order of all tables and charts."""
    by_label: dict[str, list[RecordedRun]] = {}
    for run in runs:
        members = by_label.setdefault(run.label, [])
        if run.seed in [other.seed for other in members]:
            raise RunFolderError(
                f"{folder}: two runs of {run.label} with seed {run.seed}; "
                "a comparison has one run per method and seed"
            )
        members.append(run)
    groups = []
    for label, members in by_label.items():
        shown = [run for run in members if run.finished] or members
        seeds = tuple(sorted(shown, key=lambda run: run.seed))
        groups.append(Group(members[0].method, label, seeds))
    return sorted(groups, key=lambda group: _rank(group.method))


def _label(runs: Sequence[RecordedRun]) -> list[RecordedRun]:
    """Name the runs that have no label: by the method, and by sample size if there are several."""
    sizes: dict[str, set[str]] = {}
    for run in runs:
        if not run.label:
            sizes.setdefault(run.method, set()).add(str(run.settings.get("sample_size")))
    named = []
    for run in runs:
        size = f" {run.settings.get('sample_size')}" if len(sizes.get(run.method, ())) > 1 else ""
        named.append(run if run.label else replace(run, label=f"{run.method}{size}"))
    return named


def _rank(method: str) -> tuple[bool, int]:
    """The place of a method in all tables and charts: references come last, behind unknown ones."""
    if method not in METHODS:
        return False, len(METHODS)
    return METHODS[method].pooled, list(METHODS).index(method)


def _run(folder: Path, summary: Summary | None) -> RecordedRun:
    """A run, with its summary if it is finished."""
    config = read_run_config(folder)
    settings = cast(RunSettings, {**config["config"], **config.get("resolved", {})})
    finished = summary is not None
    records = tuple(read_all_records(folder / "records.jsonl", finished))
    by_class = read_scores(folder / "by_class.json").by_class if finished else {}
    named = settings if summary is None else summary
    return RecordedRun(
        method=named["method"],
        label=" ".join(((summary and summary.get("label")) or "").split()),
        seed=named["seed"],
        finished=finished,
        planned_rounds=named["rounds"],
        settings=settings,
        data=config["data"],
        parameters=config["model"]["parameters"],
        versions=_versions(config),
        command=config.get("command"),
        records=records,
        results=_results(_summary_so_far(records) if summary is None else summary),
        neighbours=read_neighbours(folder / "retrieval.npz"),
        verification=read_verification(folder),
        confused=read_confused(folder / "confusions.npz"),
        augmented=read_augmented(folder / "augmentation.npz"),
        floors=read_scores(folder / "floors.json"),
        by_class=by_class.get("trained"),
        audit=read_audit(folder),
    )


def _versions(config: Mapping[str, Any]) -> dict[str, str]:
    names = ("fedss", "torch", "python", "platform")
    return {name: str(config[name]) for name in names if name in config}


def _results(summary: Mapping[str, Any]) -> dict[str, float | None]:
    results = {name: summary[name] for name in _FIGURES}
    for way in WAYS:
        names = [f"{part}_bytes_{way}_per_client_round" for part in ("class_row", "moment")]
        parts = [results[name] for name in names]
        results[f"row_bytes_{way}_per_client_round"] = None if None in parts else sum(parts)
    return results


def _summary_so_far(records: Sequence[Record]) -> dict[str, Any]:
    """What the summary would say, but for figures of the last evaluated round."""
    evaluated = [record["metrics"] for record in records if record["metrics"] is not None]
    last = evaluated[-1] if evaluated else {}
    return {**summarize({}, records), **{name: last[name] for name in METRICS if name in last}}
