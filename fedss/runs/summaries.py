"""``summary.json``: a run in one object, its one writer and its one reader."""

import dataclasses
import reprlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from fedss.evaluation.intervals import Interval
from fedss.evaluation.retrieval import RetrievalMetrics
from fedss.files import write_json
from fedss.runs.fields import Share, damaged, parse_json, read_as, read_bytes, wrong
from fedss.runs.records import SUMS, WAYS, Record, num_sites

# A sum in a record -> its mean per client and round.
MEANS = {
    name: "class_rows_per_client" if name == "class_rows" else f"{name}_per_client_round"
    for name in SUMS
}
MOMENTS = tuple(mean for mean in MEANS.values() if mean.startswith("moment_"))


class Summary(TypedDict):
    """A run: what it was, how its model is judged, means per client and round."""

    # From where the file lies, and what a comparison calls the variant.
    folder: str
    label: NotRequired[str | None]
    # As its configuration says, but for the size of the class samples that clients got.
    method: str
    seed: int
    rounds: int
    sample_size: NotRequired[int | None]
    # As in RetrievalMetrics; None where nobody could judge the model. ``sites``: how many could.
    recall_at_1: float | None
    recall_at_5: float | None
    map_at_10: float | None
    map_at_r: float | None
    map_at_10_by_class: float | None
    queries: NotRequired[int | None]
    classes: NotRequired[int | None]
    skipped: NotRequired[int | None]
    sites: NotRequired[int]
    # None where images are pooled.
    bytes_down_per_client_round: float | None
    bytes_up_per_client_round: float | None
    backbone_bytes_down_per_client_round: float | None
    backbone_bytes_up_per_client_round: float | None
    class_row_bytes_down_per_client_round: float | None
    class_row_bytes_up_per_client_round: float | None
    moment_bytes_down_per_client_round: float | None
    moment_bytes_up_per_client_round: float | None
    class_rows_per_client: float | None
    # Of all messages before the first round, where features are whitened.
    warm_start_bytes_down: NotRequired[int]
    warm_start_bytes_up: NotRequired[int]
    # Over all rounds; the phases add up to ``seconds``. Failures by reason.
    seconds_by_phase: NotRequired[Mapping[str, float]]
    seconds: float
    failures: NotRequired[Mapping[str, int]]
    # Of differential privacy, where there is noise.
    noise: NotRequired[float]
    delta: NotRequired[float]
    epsilon: NotRequired[float]
    # What a query was searched in; MAP@10 by the name of the floor; the ends of the 95 % interval.
    gallery: NotRequired[str]
    floors: Mapping[str, Share]
    map_at_10_interval: Sequence[float] | None


# What a summary of an earlier version may lack.
_LATER: Mapping[str, Any] = {
    **dict.fromkeys(MOMENTS, 0.0),
    **dict.fromkeys(("map_at_10_by_class", "map_at_10_interval")),
    "floors": {},
}


def summarize(
    run: Mapping[str, Any],
    records: Sequence[Record],
    floors: Mapping[str, Share] | None = None,
    interval: Interval | None = None,
) -> Summary:
    """A run in one object, from what it was (method, seed, rounds, sample_size, folder) and did.

    Of the metrics the last round's count, of the model that is kept: figures of an earlier round
    would be another's. ``floors`` are MAP@10 by name, ``interval`` is that of MAP@10.
    """
    last = records[-1] if records else None
    clients = sum(record["clients"] for record in records)
    unknown = dict.fromkeys(field.name for field in dataclasses.fields(RetrievalMetrics))
    metrics = None if last is None else last["metrics"]
    summary: dict[str, Any] = {**run, **unknown, **(metrics or {})}
    for name, mean in MEANS.items():
        counts = [cast(Mapping[str, Any], record)[name] for record in records]
        summary[mean] = None if None in counts or not clients else sum(counts) / clients
    if records and (warm := records[0].get("warm_start")):
        summary |= {f"warm_start_bytes_{way}": warm[f"bytes_{way}"] for way in WAYS}
    if last is not None and "epsilon" in last:
        summary["epsilon"] = last["epsilon"]
    phases = dict.fromkeys(phase for record in records for phase in record["seconds"])
    by_phase = {p: sum(record["seconds"].get(p, 0.0) for record in records) for p in phases}
    failures = (failure for record in records for failure in record.get("failures", ()))
    at_sites = last is not None and num_sites(last)
    summary |= {
        "seconds_by_phase": by_phase,
        "seconds": sum(by_phase.values()),
        "failures": dict(Counter(failure["reason"] for failure in failures)),
        "gallery": "each site's own" if at_sites else "all test images",
        "floors": dict(floors or {}),
        "map_at_10_interval": interval and [interval.low, interval.high],
    }
    return cast(Summary, summary)


def write_summaries(folder: Path, summaries: Sequence[Mapping[str, Any]]) -> None:
    """Write ``folder/summary.json``, of a run or of a comparison."""
    write_json(folder / "summary.json", summaries)


def read_summaries(folder: Path) -> list[Summary]:
    """The summaries in ``folder/summary.json``, those of earlier versions too; none without it.

    Raises:
        RunFolderError: it is damaged.
    """
    path = folder / "summary.json"
    if not path.exists():
        return []
    entries = parse_json(read_bytes(path), path)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        got = reprlib.repr(entries)
        raise damaged(path, f"expected a list with one object per run, got {got}")
    summaries = []
    for entry in entries:
        summary: Summary = read_as(Summary, {**_LATER, **entry}, path)
        named, ends = summary["folder"], summary["map_at_10_interval"]
        if "\0" in named or named.encode("utf-8", "ignore").decode() != named:
            raise wrong(path, "folder", "a path", named)
        if ends is not None and len(ends) != 2:
            raise wrong(path, "map_at_10_interval", "two numbers", ends)
        summaries.append(summary)
    return summaries
