"""``records.jsonl``: a line of JSON per round of a run, its one writer and its one reader."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from fedss.core.client import ClientUpdate, RoundPlan
from fedss.errors import RunFolderError
from fedss.runs.fields import damaged, parse_json, read_as, read_bytes, wrong
from fedss.text import printable
from fedss.wire.messages import PARTS

METRICS = ("map_at_10", "recall_at_1", "recall_at_5", "map_at_r")
WAYS = ("down", "up")
# Sums over a cohort's clients.
SUMS = (
    *(f"bytes_{way}" for way in WAYS),
    *(f"{part}_bytes_{way}" for part in PARTS for way in WAYS),
    "class_rows",
)


class FailedClient(TypedDict):
    """A client, by its name, without an update that could be used, and a word for the reason."""

    client: str
    reason: str


class Record(TypedDict):
    """One round of a run.

    Counts and rates that an earlier version did not record are None.
    """

    round: int  # from 1 on
    loss: float | None  # the mean over clients; None where noise is to hide them
    clients: int  # how many gave an update; where noise is to hide them, how many on average
    examples: int | None  # images that their updates stand for
    num_classes: int | None
    num_clients: int | None  # how many the cohort was drawn from
    # Of all messages of the cohort, as serialized; None where images are pooled, without messages.
    bytes_down: float | None
    bytes_up: float | None
    backbone_bytes_down: float | None
    backbone_bytes_up: float | None
    class_row_bytes_down: float | None
    class_row_bytes_up: float | None
    moment_bytes_down: float | None
    moment_bytes_up: float | None
    class_rows: float | None  # the sum of |S_k|; None likewise
    client_lr: float | None  # of the backbone, in this round
    class_row_lr: float | None
    seconds: Mapping[str, float]  # by phase
    metrics: Mapping[str, float] | None  # retrieval; ``sites``: how many sites could tell
    # Of differential privacy: what was spent up to here; and the largest norm of an update.
    epsilon: NotRequired[float]
    clip: NotRequired[float]
    # Where no client of the cohort failed, these are left out.
    failures: NotRequired[list[FailedClient]]
    attempts: NotRequired[int]  # how often the round was begun
    # In the first round alone, of messages before it: how many clients, bytes_down and bytes_up.
    warm_start: NotRequired[Mapping[str, int]]


class _Metrics(TypedDict):
    map_at_10: float
    recall_at_1: float
    recall_at_5: float
    map_at_r: float
    sites: NotRequired[int]


# What a record of an earlier version may lack.
_LATER: Mapping[str, Any] = {
    **dict.fromkeys(("examples", "num_classes", "num_clients", "client_lr", "class_row_lr")),
    **dict.fromkeys(SUMS[2:]),
    **{f"moment_bytes_{way}": 0.0 for way in WAYS},
}


def new_record(
    plan: RoundPlan,
    updates: Sequence[ClientUpdate],
    num_clients: int,
    seconds: Mapping[str, float],
    metrics: Mapping[str, float] | None,
    failures: Sequence[FailedClient] = (),
    attempts: int = 1,
) -> Record:
    """The record of a round, with one update or more; see :class:`Record`."""
    traffic = {name: sum(update.traffic[name] for update in updates) for name in updates[0].traffic}
    traffic["class_rows"] = sum(len(update.ids_S) for update in updates)
    told = {
        "loss": sum(update.loss for update in updates) / len(updates),
        "clients": len(updates),
        "examples": sum(update.num_examples for update in updates),
        **(dict.fromkeys(traffic) if plan.method.pooled else traffic),
    }
    if failures or attempts > 1:
        told |= {"failures": list(failures), "attempts": attempts}
    return _of_round(plan, num_clients, seconds, metrics, told)


def private_record(
    plan: RoundPlan,
    cohort_size: int,
    message_bytes: Mapping[str, int],
    num_clients: int,
    seconds: Mapping[str, float],
    metrics: Mapping[str, float] | None,
    epsilon: float,
) -> Record:
    """The record of a round whose clients are hidden in noise.

    Who and how many they were is part of what is hidden, and so are their losses and failures:
    counts are those of ``cohort_size`` clients, as many as there are on average, all of which have
    messages of ``message_bytes``.
    """
    told = {
        "loss": None,
        "clients": cohort_size,
        "examples": None,
        **{name: cohort_size * size for name, size in message_bytes.items()},
        "epsilon": epsilon,
    }
    return _of_round(plan, num_clients, seconds, metrics, told)


def _of_round(
    plan: RoundPlan,
    num_clients: int,
    seconds: Mapping[str, float],
    metrics: Mapping[str, float] | None,
    told: Mapping[str, Any],
) -> Record:
    """What every record has, and what its clients told."""
    record = {
        "round": plan.round + 1,
        **told,
        "num_classes": plan.num_classes,
        "num_clients": num_clients,
        "client_lr": plan.local.lr,
        "class_row_lr": plan.local.row_lr,
        "seconds": seconds,
        "metrics": metrics,
    }
    return cast(Record, record)


def scalars(record: Record, failures: bool = True) -> dict[str, float]:
    """A round's record as numbers by name, as TensorBoard and other trackers take them.

    What the record does not tell is left out, and so is what ``failures`` is about if it is False.
    """
    seconds, clients = record["seconds"], record["clients"]
    found: dict[str, float | None] = {
        "train/loss": record["loss"],
        "train/client_lr": record["client_lr"],
        "train/class_row_lr": record["class_row_lr"],
        "train/clients": clients,
        "train/examples": record["examples"],
        "privacy/epsilon": record.get("epsilon"),
        "privacy/clip": record.get("clip"),
        **{f"seconds/{phase}": took for phase, took in seconds.items()},
        "seconds/round": sum(seconds.values()),
    }
    for name, total in (
        ("bytes/down_per_client", record["bytes_down"]),
        ("bytes/up_per_client", record["bytes_up"]),
        ("train/class_rows_per_client", record["class_rows"]),
    ):
        found[name] = None if total is None else total / clients
    if failures:
        found["federation/failures"] = len(record.get("failures", ()))
        found["federation/attempts"] = record.get("attempts", 1)
    found |= {f"test/{name}": value for name, value in (record["metrics"] or {}).items()}
    return {name: value for name, value in found.items() if value is not None}


def bytes_moved(record: Record) -> float | None:
    """Bytes of a round and what came before it, both ways; None where there are none."""
    down, up, warm = record["bytes_down"], record["bytes_up"], record.get("warm_start", {})
    before = warm.get("bytes_down", 0) + warm.get("bytes_up", 0)
    return None if down is None or up is None else down + up + before


def num_sites(record: Record) -> int:
    """How many sites evaluated in a round; 0 where none did."""
    return int((record["metrics"] or {}).get("sites", 0))


def best_evaluated(records: Sequence[Record]) -> Record | None:
    """The record of the highest MAP@10, the first of several; None without an evaluation."""
    evaluated = [(r, r["metrics"]["map_at_10"]) for r in records if r["metrics"] is not None]
    return max(evaluated, key=lambda pair: pair[1])[0] if evaluated else None


def out_of_patience(records: Sequence[Record], patience: int | None) -> bool:
    """Whether so many evaluations came after the best one; never where ``patience`` is None."""
    best = best_evaluated(records)
    if best is None or patience is None:
        return False
    return sum(r["metrics"] is not None and r["round"] > best["round"] for r in records) >= patience


@contextmanager
def open_records(folder: Path, past: Sequence[Record]) -> Iterator[Callable[[Record, bool], None]]:
    """Open ``records.jsonl`` behind the ``past`` rounds.

    Gives ``add(record, to_disk)``; ``to_disk`` before a checkpoint, which needs its records.
    Another record of the last round takes the place of the first.

    Lines of rounds after the checkpoint are dropped: these rounds are run again.
    """
    path, begin = folder / "records.jsonl", 0
    last = past[-1]["round"] if past else 0
    if past or path.exists():
        with path.open("rb+") as old:
            for _ in past:
                begin = old.tell()
                old.readline()
            old.truncate()
    with path.open("a", encoding="utf-8") as file:

        def add(record: Record, to_disk: bool) -> None:
            nonlocal last, begin
            if record["round"] == last:
                file.truncate(begin)
            last, begin = record["round"], path.stat().st_size
            file.write(json.dumps(record) + "\n")
            file.flush()
            if to_disk:
                os.fsync(file.fileno())

        yield add


def records_to_disk(folder: Path) -> None:
    """Every record that was added is on the disk, as a checkpoint needs it."""
    with (folder / "records.jsonl").open("rb+") as file:
        os.fsync(file.fileno())


def read_records(path: Path, rounds: int) -> list[Record]:
    """The records of the first ``rounds`` rounds; later lines, also half a line, are left out.

    Raises:
        RunFolderError: a line of these rounds is missing or damaged.
    """
    lines = path.read_bytes().splitlines()[:rounds] if path.exists() else []
    records = _parse(lines, path, later={})
    numbers = [record["round"] for record in records]
    if numbers != list(range(1, rounds + 1)):
        raise RunFolderError(
            f"{path}: expected a line for each of the {rounds} rounds in the checkpoint, got "
            f"{len(records)}, up to round {numbers[-1] if numbers else 0}; start again in another "
            "folder"
        )
    return records


def read_all_records(path: Path, finished: bool) -> list[Record]:
    """All records, those of earlier versions too; unless ``finished``, the last line may still be
    half written.

    Raises:
        RunFolderError: the file cannot be read, or a line is damaged.
    """
    content = read_bytes(path)
    if not finished:
        content = content[: content.rfind(b"\n") + 1]
    return _parse(content.splitlines(), path, _LATER)


def _parse(lines: Sequence[bytes], path: Path, later: Mapping[str, Any]) -> list[Record]:
    """Records, checked; ``later``: what they may lack."""
    records: list[Record] = []
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        value = parse_json(line, where)
        if isinstance(value, dict):
            value = {**later, **value}
        record: Record = read_as(Record, value, where)
        if record["clients"] < 1:
            raise wrong(where, "clients", "1 or more", record["clients"])
        if record["metrics"] is not None:
            read_as(_Metrics, value["metrics"], where)
        # Sites have named these clients.
        for failure in record.get("failures", ()):
            failure["client"] = printable(failure["client"])
            failure["reason"] = printable(failure["reason"])
        if records and record["round"] <= records[-1]["round"]:
            last = records[-1]["round"]
            raise damaged(where, f"round {record['round']} after round {last}, expected a later")
        records.append(record)
    return records
