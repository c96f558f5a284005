"""The records of a run or of a comparison, read from its folder and checked."""

import json
import math
import re
import reprlib
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fedss.errors import RunFolderError
from fedss.evaluation.intervals import ClassScores, Interval, difference, interval
from fedss.text import printable

METRICS = ("map_at_10", "recall_at_1", "recall_at_5", "map_at_r")
BYTES = tuple(
    f"{part}bytes_{way}_per_client_round"
    for part in ("", "class_row_", "backbone_")
    for way in ("down", "up")
)
MOMENTS = tuple(f"moment_bytes_{way}_per_client_round" for way in ("down", "up"))
# A count in a record -> its mean per client and round. Records may lack the parts of the bytes.
_COUNTED = {
    "class_rows": "class_rows_per_client",
    **{name.removesuffix("_per_client_round"): name for name in (*BYTES, *MOMENTS)},
}
# The order of the methods in every table and chart; unknown names come before `central`.
KNOWN_METHODS = (
    *("full", "fedss", "moments", "fedss-uncorrected"),
    *("pos-only", "neg-only", "fedaws"),
)
# What to do about a damaged file; for all others `_AGAIN`.
_ADVICE = {
    "summary.json": "delete it and start this folder's fedss command again, which writes it anew",
    "retrieval.npz": "delete it: the report is then written without pictures",
    "confusions.npz": "delete it: the report is then written without pictures",
    "verification.json": "delete it and run fedss evaluate on this run, which measures these "
    "figures again; without them the report is written, too",
    "floors.json": "delete it: the report is then written without floors",
    "by_class.json": "delete it: the report is then written without intervals",
    "augmentation.npz": "delete it: the report is then written without these pictures",
}
_AGAIN = "restore it from a copy, or run again in another folder"
_COUNTS = (
    "train_images",
    "train_classes",
    "train_clients",
    "test_queries",
    "test_gallery",
    "test_classes",
    "test_classes_seen",
)


@dataclass(frozen=True)
class Failure:
    """A client, by its name, without an update that could be used, and a word for the reason."""

    client: str
    reason: str


@dataclass(frozen=True)
class Round:
    """One line of records.jsonl; ``bytes_moved`` is down and up over the whole cohort.

    ``seconds`` are by phase; ``attempts`` is how often the round was begun; ``num_classes`` and
    ``num_clients`` are those of the whole federation then, ``sites`` how many of them evaluated.
    """

    number: int
    loss: float
    clients: float
    bytes_moved: float | None
    seconds: Mapping[str, float]
    metrics: Mapping[str, float] | None
    failures: tuple[Failure, ...]
    attempts: int
    num_classes: int | None
    num_clients: int | None
    sites: int | None


@dataclass(frozen=True)
class Neighbours:
    """Queries and what a run found for them: Q queries, each followed by its top K.

    Attributes:
        pixels: uint8 [Q, 1 + K, C, H, W], query first.
        labels: int64 [Q, 1 + K].
        class_names: str [Q, 1 + K].
        scores: float32 [Q, K].
        query_index: int64 [Q], the same for all runs on one data set.
    """

    pixels: np.ndarray
    labels: np.ndarray
    class_names: np.ndarray
    scores: np.ndarray
    query_index: np.ndarray

    @property
    def right(self) -> np.ndarray:
        """bool [Q, K]: whether a neighbour has the query's class."""
        return np.asarray(self.labels[:, 1:] == self.labels[:, :1])


@dataclass(frozen=True)
class Rate:
    """TAR at a FAR, and the threshold that gives it."""

    tar: float
    threshold: float
    supported: bool


@dataclass(frozen=True)
class Identified:
    """Open-set identification: DIR at a FPIR."""

    fpir: float
    dir: float
    threshold: float
    supported: bool
    draws: int
    enrolled: int


@dataclass(frozen=True)
class Verified:
    """What verification.json says; ``points`` by FAR, ``far`` rising and ``tar`` are the ROC."""

    eer: float
    eer_threshold: float
    points: Mapping[float, Rate]
    far: np.ndarray
    tar: np.ndarray
    genuine: int
    impostor: int
    smallest_far: float
    identification: Identified | None


@dataclass(frozen=True)
class Confused:
    """P pairs of classes that are taken for each other, the hardest first.

    Attributes:
        pixels: uint8 [P, 2, C, H, W], a query and its wrong nearest picture.
        shown: str [P, 2], the classes of these two.
        class_names: str [P, 2].
        confused: int64 [P, 2], queries of each class whose nearest is of the other.
        queries: int64 [P, 2], queries of each class.
        scores: float64 [P], cosines of the pictures.
    """

    pixels: np.ndarray
    shown: np.ndarray
    class_names: np.ndarray
    confused: np.ndarray
    queries: np.ndarray
    scores: np.ndarray


@dataclass(frozen=True)
class Run:
    """One variant of a method with one seed.

    ``results`` has the keys of a line of summary.json, and ``row_bytes_*``: class rows and moments
    together. Those of an unfinished run are those of its last evaluated round. ``label`` names the
    variant wherever it is shown. ``augmented``: uint8 [P, 1 + V, C, H, W], training pictures, each
    followed by what clients may make of it. ``floors`` is MAP@10 by the name of the floor,
    ``floor_classes`` that of each class, and ``by_class`` the trained model's.
    """

    method: str
    label: str
    seed: int
    finished: bool
    planned_rounds: int
    settings: Mapping[str, Any]
    data: Mapping[str, Any]
    parameters: int
    versions: Mapping[str, str]
    command: str | None
    rounds: tuple[Round, ...]
    results: Mapping[str, float | None]
    neighbours: Neighbours | None
    verified: Verified | None
    confused: Confused | None
    augmented: np.ndarray | None
    floors: Mapping[str, float]
    floor_classes: Mapping[str, ClassScores]
    by_class: ClassScores | None

    @property
    def at_sites(self) -> bool:
        """Whether retrieval is measured in the gallery of each site."""
        return any(r.sites for r in self.rounds[-1:])

    @property
    def last_round(self) -> int:
        """The number of the last recorded round, 0 if there is none."""
        return self.rounds[-1].number if self.rounds else 0


@dataclass(frozen=True)
class Group:
    """The runs of one label, over seeds: finished ones, or all of them while none is."""

    method: str
    label: str
    runs: tuple[Run, ...]

    @property
    def finished(self) -> bool:
        """Whether the figures are those of finished runs."""
        return self.runs[0].finished

    def values(self, key: str) -> list[float]:
        """The result ``key`` of each run that has it."""
        return [v for run in self.runs if (v := run.results[key]) is not None]

    def mean(self, key: str) -> float | None:
        """The mean of the result ``key`` over the runs; None if a run lacks it."""
        values = self.values(key)
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
        values = [run.floors[name] for run in self.runs if name in run.floors]
        return sum(values) / len(values) if len(values) == len(self.runs) else None

    def over(self, other: "Group") -> Interval | None:
        """What MAP@10 is better by than that of others, on the same classes; None if not known."""
        seeds = [[run.seed for run in group.runs] for group in (self, other)]
        if not self.by_class or not other.by_class:
            return None
        return difference(self.by_class, other.by_class, paired=seeds[0] == seeds[1])

    def over_floor(self, name: str) -> Interval | None:
        """What MAP@10 is better by than a floor; None if not known."""
        floors = [run.floor_classes[name] for run in self.runs if name in run.floor_classes]
        if not self.by_class or len(floors) < len(self.runs):
            return None
        return difference(self.by_class, floors, paired=True)


def read_runs(folder: Path) -> list[Run]:
    """Read every run that ``folder/summary.json`` names, and those beside it still under way."""
    summary = folder / "summary.json"
    exists = summary.is_file()
    entries = _json(summary) if exists else []
    is_list = isinstance(entries, list) and all(isinstance(e, dict) for e in entries)
    if not is_list or (exists and not entries):
        got = reprlib.repr(entries)
        raise _damaged(summary, f"expected a list with one object per run, got {got}")
    for entry in entries:
        read_summary(entry, summary)
    runs = [_run(folder / entry["folder"], entry, summary) for entry in entries]
    # A run's folder is named after it: the label, with some signs replaced, and the seed.
    names = {_plain(run.label): run.label for run in runs if run.label}
    seen = {(folder / entry["folder"]).resolve() for entry in entries}
    for candidate in [folder, *sorted(path for path in folder.glob("*") if path.is_dir())]:
        is_run = (candidate / "config.json").is_file() and (candidate / "records.jsonl").is_file()
        if is_run and candidate.resolve() not in seen:
            # Of a comparison under way, the runs that are done have a summary of their own.
            own = candidate / "summary.json"
            entry = None if candidate == folder or not own.is_file() else _only(own)
            run = _run(candidate, entry, own)
            name, dash, _ = candidate.name.rpartition(f"-seed{run.seed}")
            label = names.get(_plain(name), name) if dash and candidate != folder else ""
            runs.append(replace(run, label=label))
    if not runs:
        missing = [n for n in ("config.json", "records.jsonl") if not (folder / n).is_file()]
        raise RunFolderError(
            f"{folder}: expected the records of a run (config.json and records.jsonl) or of a "
            f"comparison (summary.json); {' and '.join(['summary.json', *missing])} not found"
        )
    return _label(runs)


def _only(summary: Path) -> Mapping[str, Any]:
    entries = _json(summary)
    if not (isinstance(entries, list) and len(entries) == 1 and isinstance(entries[0], dict)):
        got = reprlib.repr(entries)
        raise _damaged(summary, f"expected a list with the object of one run, got {got}")
    return entries[0]


def _plain(name: str) -> str:
    return re.sub("[^a-zA-Z0-9_.=-]+", "-", name)


def group_runs(runs: Sequence[Run], folder: Path) -> list[Group]:
    """Put the seeds of one label together, in the order of all tables and charts."""
    by_label: dict[str, list[Run]] = {}
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


def _label(runs: Sequence[Run]) -> list[Run]:
    """Name the runs that have no label: by the method, and by sample size if there are several."""
    sizes: dict[str, set[str]] = {}
    for run in runs:
        if not run.label:
            sizes.setdefault(run.method, set()).add(str(run.settings.get("sample_size")))
    return [
        run
        if run.label
        else replace(run, label=run.method)
        if len(sizes[run.method]) == 1
        else replace(run, label=f"{run.method} {run.settings.get('sample_size')}")
        for run in runs
    ]


def _rank(method: str) -> int:
    if method == "central":
        return len(KNOWN_METHODS) + 1
    return KNOWN_METHODS.index(method) if method in KNOWN_METHODS else len(KNOWN_METHODS)


def _run(folder: Path, entry: Mapping[str, Any] | None, summary: Path) -> Run:
    path = folder / "config.json"
    config = _json(path)
    settings = _get(config, "config", path)
    for name in ("clients_per_round", "eval_every", "checkpoint_every"):
        if settings is not None and _mapping(settings, path).get(name) is not None:
            _integer(settings, name, path)
    method = str(_get(settings, "method", path))
    seed = _integer(settings, "seed", path)
    rounds, means = _rounds(folder / "records.jsonl", finished=entry is not None)
    if entry is None:
        results = _results_so_far(rounds, means)
    else:
        results = read_summary(entry, summary)
        method, seed = str(_get(entry, "method", summary)), _integer(entry, "seed", summary)
    command = config.get("command")
    floors, floor_classes = _scores(folder / "floors.json")
    by_class = _scores(folder / "by_class.json")[1].get("trained") if entry is not None else None
    for way, moments in zip(("down", "up"), MOMENTS, strict=True):
        rows, more = results[f"class_row_bytes_{way}_per_client_round"], results[moments]
        together = None if rows is None or more is None else rows + more
        results[f"row_bytes_{way}_per_client_round"] = together
    return Run(
        method=method,
        label=_given_label(entry, summary),
        seed=seed,
        finished=entry is not None,
        planned_rounds=_integer(settings, "rounds", path),
        settings=settings,
        data=_data(config, path),
        parameters=_integer(_get(config, "model", path), "parameters", path),
        versions={
            k: str(config[k]) for k in ("fedss", "torch", "python", "platform") if k in config
        },
        command=command if isinstance(command, str) else None,
        rounds=rounds,
        results=results,
        neighbours=_neighbours(folder / "retrieval.npz"),
        verified=read_verified(folder / "verification.json"),
        confused=_confused(folder / "confusions.npz"),
        augmented=_augmented(folder / "augmentation.npz"),
        floors=floors,
        floor_classes=floor_classes,
        by_class=by_class,
    )


def read_summary(entry: Any, summary: Path) -> dict[str, float | None]:
    """The figures of a run in ``summary.json``, checked: every reader sees it through this.

    Raises:
        RunFolderError: something is missing, or of another type.
    """
    folder = _word(entry, "folder", summary)
    if "\0" in folder or folder.encode("utf-8", "ignore").decode() != folder:
        raise _damaged(summary, f"'folder': expected a path, got {reprlib.repr(folder)}")
    keys = ("class_rows_per_client", "seconds", *METRICS, *BYTES)
    nullable = ("class_rows_per_client", *METRICS, *BYTES)
    results = {key: _number(entry, key, summary, key in nullable) for key in keys}
    for key in MOMENTS:  # older records lack them
        results[key] = _number(entry, key, summary, True) if key in entry else 0.0
    _word(entry, "method", summary)
    for key in ("seed", "rounds"):
        _integer(entry, key, summary)
    _given_label(entry, summary)
    key = "map_at_10_by_class"
    results[key] = _number(entry, key, summary, True) if key in entry else None
    floors = _mapping(entry.get("floors", {}), summary)
    for name in floors:
        _share(floors, name, summary)
    ends = entry.get("map_at_10_interval")
    if ends is not None and not (
        isinstance(ends, list) and len(ends) == 2 and all(isinstance(v, float) for v in ends)
    ):
        raise _damaged(
            summary, f"'map_at_10_interval': expected two numbers, got {reprlib.repr(ends)}"
        )
    return results


def _given_label(entry: Mapping[str, Any] | None, summary: Path) -> str:
    label = None if entry is None else entry.get("label")
    if label is not None and not isinstance(label, str):
        raise _damaged(summary, f"'label': expected a string, got {reprlib.repr(label)}")
    return " ".join((label or "").split())


def _rounds(path: Path, finished: bool) -> tuple[tuple[Round, ...], Mapping[str, float | None]]:
    """Read records.jsonl; also what summary.json would say of its sums per client and round."""
    text = _text(path)
    if not finished and not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]  # a line that is still being written
    rounds: list[Round] = []
    clients = seconds = 0.0
    sums: dict[str, float | None] = dict.fromkeys(_COUNTED.values(), 0.0)
    for number, line in enumerate(text.splitlines(), start=1):
        where = f"{path}, line {number}"
        record = _parse(line, where)
        this_round = read_round(record, where)
        for name, key in _COUNTED.items():
            total = sums[key]
            lacking = 0.0 if key in MOMENTS else None  # older records have no moments
            value = _number(record, name, where, True) if name in record else lacking
            sums[key] = None if total is None or value is None else total + value
        clients += this_round.clients
        seconds += sum(this_round.seconds.values())
        if rounds and this_round.number <= rounds[-1].number:
            raise _damaged(
                where,
                f"round {this_round.number} after round {rounds[-1].number}, expected a later",
            )
        rounds.append(this_round)
    means = {k: None if v is None or not clients else v / clients for k, v in sums.items()}
    return tuple(rounds), {"seconds": seconds, **means}


def read_round(record: Any, where: str) -> Round:
    """A record, checked: every reader of ``records.jsonl`` sees it through this.

    Args:
        record: a line's value.
        where: file and line, for the error.

    Raises:
        RunFolderError: something is missing, or of another type.
    """
    down, up = (_number(record, f"bytes_{way}", where, True) for way in ("down", "up"))
    cohort = _number(record, "clients", where)
    if not cohort >= 1:
        raise _damaged(where, f"'clients': expected 1 or more, got {cohort:g}")
    timing = _mapping(_get(record, "seconds", where), where)
    metrics, sites = _get(record, "metrics", where), None
    if metrics is not None:
        sites = _whole(metrics, "sites", where)
        metrics = {key: _number(metrics, key, where) for key in METRICS}
    return Round(
        number=_integer(record, "round", where),
        loss=_number(record, "loss", where),
        clients=cohort,
        bytes_moved=None if down is None or up is None else down + up,
        seconds={phase: _number(timing, phase, where) for phase in timing},
        metrics=metrics,
        failures=_failures(record, where),
        attempts=_integer(record, "attempts", where) if "attempts" in record else 1,
        num_classes=_whole(record, "num_classes", where),
        num_clients=_whole(record, "num_clients", where),
        sites=sites,
    )


def check_counts(record: Any, names: Iterable[str], where: str) -> None:
    """Whether a record has these counts: numbers, or null where nothing was counted.

    Raises:
        RunFolderError: it has not.
    """
    for name in names:
        _number(record, name, where, nullable=True)


def _failures(record: Any, where: str) -> tuple[Failure, ...]:
    """The clients that failed in a round; none where the record does not speak of any."""
    failures = _mapping(record, where).get("failures", [])
    if not isinstance(failures, list):
        raise _damaged(where, f"'failures': expected a list, got {reprlib.repr(failures)}")
    # Sites have named these clients.
    return tuple(
        Failure(*(printable(_word(failure, key, where)) for key in ("client", "reason")))
        for failure in failures
    )


def _results_so_far(
    rounds: Sequence[Round], means: Mapping[str, float | None]
) -> dict[str, float | None]:
    evaluated = [r.metrics for r in rounds if r.metrics is not None]
    return {
        **dict.fromkeys((*METRICS, "map_at_10_by_class")),
        **(evaluated[-1] if evaluated else {}),
        **means,
    }


def _neighbours(path: Path) -> Neighbours | None:
    if not path.is_file():
        return None
    arrays = _arrays(path, Neighbours.__dataclass_fields__)
    scores, pixels = arrays["scores"], arrays["pixels"]
    if scores.ndim != 2 or scores.shape[1] < 1:
        raise _damaged(path, f"scores: expected [queries, neighbours], got {scores.shape}")
    count, depth = scores.shape
    with_query = (count, 1 + depth)
    expected = {"labels": with_query, "class_names": with_query, "query_index": (count,)}
    shapes_fit = all(arrays[name].shape == shape for name, shape in expected.items())
    if not shapes_fit or pixels.shape[:2] != with_query:
        raise _damaged(path, f"shapes do not fit {count} queries with {depth} neighbours each")
    if pixels.ndim != 5 or pixels.shape[2] not in (1, 3) or 0 in pixels.shape[3:]:
        raise _damaged(path, f"pixels: expected [Q, 1 + K, 1 or 3, H, W], got {pixels.shape}")
    _check_types(path, arrays, pixels="u", labels="iu", query_index="iu", scores="f")
    return Neighbours(**arrays)


def _confused(path: Path) -> Confused | None:
    if not path.is_file():
        return None
    arrays = _arrays(path, Confused.__dataclass_fields__)
    pixels, count = arrays["pixels"], len(np.atleast_1d(arrays["scores"]))
    names = ("shown", "class_names", "confused", "queries")
    if arrays["scores"].ndim != 1 or any(arrays[name].shape != (count, 2) for name in names):
        raise _damaged(path, f"shapes do not fit {count} pairs of classes")
    if pixels.ndim != 5 or pixels.shape[:2] != (count, 2) or pixels.shape[2] not in (1, 3):
        raise _damaged(path, f"pixels: expected [{count}, 2, 1 or 3, H, W], got {pixels.shape}")
    _check_types(path, arrays, pixels="u", confused="iu", queries="iu", scores="f")
    return Confused(**arrays)


def _augmented(path: Path) -> np.ndarray | None:
    if not path.is_file():
        return None
    pixels = _arrays(path, ["pixels"])["pixels"]
    fits = pixels.ndim == 5 and pixels.shape[2] in (1, 3) and pixels.shape[1] > 1
    if pixels.dtype != np.uint8 or not fits or 0 in pixels.shape:
        got = f"{pixels.dtype} {pixels.shape}"
        raise _damaged(path, f"pixels: expected uint8 [P, 1 + V, 1 or 3, H, W], got {got}")
    return pixels


def _arrays(path: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: np.asarray(file[name]) for name in names}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise _damaged(path, f"cannot be read ({error})") from error


def _check_types(path: Path, arrays: Mapping[str, np.ndarray], **kinds: str) -> None:
    for name, kind in kinds.items():
        array = arrays[name]
        if array.dtype.kind not in kind or (name == "pixels" and array.itemsize > 1):
            raise _damaged(path, f"{name}: unexpected type {array.dtype}")


def read_verified(path: Path) -> Verified | None:
    """What a ``verification.json`` says; None where there is none.

    Raises:
        RunFolderError: it is damaged.
    """
    if not path.exists():
        return None
    found = _json(path)
    points, roc = (_list(found, key, path) for key in ("points", "roc"))
    known = _get(found, "identification", path)
    fars, tars = ([_share(point, key, path) for point in roc] for key in ("far", "tar"))
    if not fars or min(fars) <= 0 or fars != sorted(fars):
        raise _damaged(path, "'roc': expected points whose 'far' is above 0 and rises")
    if known is not None:
        least, enrolled = _number(known, "threshold", path), _integer(known, "enrolled", path)
        if not least >= -1 or enrolled < 1:
            raise _damaged(
                path, f"expected a threshold from -1 on and classes, got {least} and {enrolled}"
            )
    return Verified(
        eer=_share(found, "eer", path),
        eer_threshold=_number(found, "eer_threshold", path),
        points={
            _share(point, "far", path): Rate(
                _share(point, "tar", path),
                _number(point, "threshold", path),
                bool(_get(point, "supported", path)),
            )
            for point in points
        },
        far=np.array(fars),
        tar=np.array(tars),
        genuine=_integer(found, "genuine", path),
        impostor=_integer(found, "impostor", path),
        smallest_far=_number(found, "smallest_far", path),
        identification=None
        if known is None
        else Identified(
            fpir=_share(known, "fpir", path),
            dir=_share(known, "dir", path),
            threshold=_number(known, "threshold", path),
            supported=bool(_get(known, "supported", path)),
            draws=_integer(known, "draws", path),
            enrolled=_integer(known, "enrolled", path),
        ),
    )


def _scores(path: Path) -> tuple[dict[str, float], dict[str, ClassScores]]:
    return read_scores(path) if path.exists() else ({}, {})


def read_scores(path: Path) -> tuple[dict[str, float], dict[str, ClassScores]]:
    """MAP@10 by name in a ``floors.json`` or ``by_class.json``, and that of each class.

    Raises:
        RunFolderError: it is damaged.
    """
    found = _json(path)
    told = _mapping(_get(found, "map_at_10", path), path)
    means = {name: _share(told, name, path) for name in told}
    names, queries = _list(found, "class_names", path), _list(found, "queries", path)
    counted = all(type(count) is int and count > 0 for count in queries)
    if not all(isinstance(name, str) for name in names) or not counted:
        raise _damaged(path, "expected names of classes and their numbers of queries")
    by_class = {}
    for name, values in _mapping(_get(found, "by_class", path), path).items():
        fits = isinstance(values, list) and len(values) == len(names) == len(queries) > 0
        if not fits or not all(isinstance(v, int | float) and 0 <= v <= 1 for v in values):
            raise _damaged(path, f"{name!r}: expected a share from 0 to 1 for each class")
        by_class[name] = ClassScores(
            tuple(names), np.array(queries, np.int64), np.array(values, np.float64)
        )
    return means, by_class


def _list(value: Any, key: str, where: Path) -> list[Any]:
    found = _get(value, key, where)
    if not isinstance(found, list):
        raise _damaged(where, f"{key!r}: expected a list, got {reprlib.repr(found)}")
    return found


def _share(value: Any, key: str, where: Path) -> float:
    share = _number(value, key, where)
    if not 0 <= share <= 1:
        raise _damaged(where, f"{key!r}: expected a share from 0 to 1, got {share}")
    return float(share)


def _data(config: Any, path: Path) -> Mapping[str, Any]:
    """What config.json says of the data; all of it may be missing, none of it damaged."""
    data = _mapping(_get(config, "data", path), path)
    for key in _COUNTS:
        if data.get(key) is not None:
            _integer(data, key, path)
    for key in ("own_classes", "image_shape"):
        values = data.get(key)
        if values is not None and not (
            isinstance(values, list) and all(isinstance(v, int | float) for v in values)
        ):
            raise _damaged(path, f"{key!r}: expected a list of numbers, got {reprlib.repr(values)}")
    return data


def _damaged(where: Path | str, what: str) -> RunFolderError:
    """The error that says what is wrong ``where`` (a file, or a line of it) and what to do."""
    advice = _ADVICE.get(Path(str(where)).name.partition(",")[0], _AGAIN)
    return RunFolderError(f"{where}: {what}; {advice}")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _damaged(path, f"cannot be read ({error})") from error


def _parse(text: str, where: Path | str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _damaged(where, f"damaged JSON ({error})") from error


def _json(path: Path) -> Any:
    return _parse(_text(path), path)


def _mapping(value: Any, where: Path | str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise _damaged(where, f"expected an object, got {reprlib.repr(value)}")
    return value


def _get(value: Any, key: str, where: Path | str) -> Any:
    mapping = _mapping(value, where)
    if key not in mapping:
        raise _damaged(where, f"{key!r} is missing")
    return mapping[key]


def _number(value: Any, key: str, where: Path | str, nullable: bool = False) -> Any:
    """The number under ``key``: a float, or None where ``nullable`` and it is null."""
    number = _get(value, key, where)
    if number is None and nullable:
        return None
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise _damaged(where, f"{key!r}: expected a number, got {reprlib.repr(number)}")
    try:
        return float(number) if math.isfinite(number) else math.nan
    except OverflowError as error:
        raise _damaged(where, f"{key!r}: expected a number, got {reprlib.repr(number)}") from error


def _word(value: Any, key: str, where: Path | str) -> str:
    word = _get(value, key, where)
    if not isinstance(word, str):
        raise _damaged(where, f"{key!r}: expected a string, got {reprlib.repr(word)}")
    return word


def _whole(value: Any, key: str, where: Path | str) -> int | None:
    """As ``_integer``, or None where an older record does not say."""
    return _integer(value, key, where) if key in _mapping(value, where) else None


def _integer(value: Any, key: str, where: Path | str) -> int:
    number = _get(value, key, where)
    if isinstance(number, bool) or not isinstance(number, int):
        raise _damaged(where, f"{key!r}: expected an integer, got {reprlib.repr(number)}")
    if abs(number) >= 2**53:
        raise _damaged(where, f"{key!r}: expected below 2^53, got {reprlib.repr(number)}")
    return number
