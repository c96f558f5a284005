"""What a run writes down: a line of JSON per round, and a summary."""

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedss.core.client import ClientUpdate
from fedss.errors import RunFolderError
from fedss.evaluation.retrieval import RetrievalMetrics
from fedss.runs.reading import check_counts, read_round
from fedss.wire.messages import PARTS

Record = dict[str, Any]
"""One round: ``round`` (1-based), mean ``loss``, ``clients``, ``examples``, ``num_classes`` (n),
``num_clients`` (that the cohort was drawn from), ``class_rows`` (sum of |S_k|), bytes over the
cohort as serialised (``bytes_down``, ``bytes_up`` and their parts ``backbone_bytes_*``,
``class_row_bytes_*``, ``moment_bytes_*``), ``seconds`` by phase, ``metrics`` or None (in every
round, where nobody can evaluate), the round's learning rates ``client_lr`` and ``class_row_lr``.
Where clients may fail also ``failures``, a list of ``{"client": name, "reason": word}``, and
``attempts``: how often the round was begun. Without them none failed, and it was begun once."""


_PER_CLIENT = (
    "bytes_down",
    "bytes_up",
    *(f"{part}_bytes_{way}" for part in PARTS for way in ("down", "up")),
)
_COUNTED = (*_PER_CLIENT, "class_rows")
_NEEDED = ("examples", "num_classes", "num_clients", "client_lr", "class_row_lr")


def round_traffic(updates: Sequence[ClientUpdate]) -> dict[str, int]:
    """Bytes of all messages of a round, as the engine counted them, and |S_k| summed up."""
    counted = {name: sum(update.traffic[name] for update in updates) for name in updates[0].traffic}
    return {**counted, "class_rows": sum(len(update.ids_S) for update in updates)}


def read_records(path: Path, rounds: int) -> list[Record]:
    """The records of the first ``rounds`` rounds; later lines, also half a line, are left out.

    Raises:
        RunFolderError: a line of these rounds is missing or damaged.
    """
    lines = path.read_bytes().splitlines()[:rounds] if path.exists() else []
    records = []
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RunFolderError(
                f"{where} is damaged ({error}); start again in another folder"
            ) from error
        if read_round(record, where).number != number:
            raise RunFolderError(
                f"{where}: expected round {number}, got {record['round']}; start again in another "
                "folder"
            )
        check_counts(record, (*_COUNTED, *_NEEDED), where)
        records.append(record)
    if len(records) != rounds:
        raise RunFolderError(
            f"{path}: expected a line for each of the {rounds} rounds in the checkpoint, got "
            f"{len(records)}; start again in another folder"
        )
    return records


@contextmanager
def open_records(folder: Path, past: Sequence[Record]) -> Iterator[Callable[[Record, bool], None]]:
    """Open ``records.jsonl`` behind the ``past`` rounds.

    Gives ``add(record, to_disk)``; ``to_disk`` before a checkpoint, which needs its records.

    Lines of rounds after the checkpoint are dropped: these rounds are run again.
    """
    path = folder / "records.jsonl"
    if past or path.exists():
        with path.open("rb+") as old:
            for _ in past:
                old.readline()
            old.truncate()
    with path.open("a", encoding="utf-8") as file:

        def add(record: Record, to_disk: bool) -> None:
            file.write(json.dumps(record) + "\n")
            file.flush()
            if to_disk:
                os.fsync(file.fileno())

        yield add


def records_to_disk(folder: Path) -> None:
    """Every record that was added is on the disk, as a checkpoint needs it."""
    with (folder / "records.jsonl").open("rb+") as file:
        os.fsync(file.fileno())


def summarise(run: Mapping[str, Any], records: Sequence[Record]) -> dict[str, Any]:
    """A run in one object: what it was, how the model is judged, means per client and round.

    Retrieval figures are None where nobody could judge it, byte figures where pictures are
    pooled: no federated message exists. ``failures`` counts those of all rounds by reason, and
    ``seconds_by_phase`` adds up to ``seconds``.
    """
    clients = sum(record["clients"] for record in records)
    unknown = dict.fromkeys(field.name for field in dataclasses.fields(RetrievalMetrics))
    # Of the model that is kept: figures of an earlier round would be another's.
    summary = {**run, **(records[-1]["metrics"] or unknown)}
    for name in _COUNTED:
        counts = [record[name] for record in records]
        mean = None if None in counts else sum(counts) / clients
        shown = "class_rows_per_client" if name == "class_rows" else f"{name}_per_client_round"
        summary[shown] = mean
    phases = dict.fromkeys(phase for record in records for phase in record["seconds"])
    summary["seconds_by_phase"] = {
        phase: sum(record["seconds"].get(phase, 0.0) for record in records) for phase in phases
    }
    summary["seconds"] = sum(summary["seconds_by_phase"].values())
    failures = (failure for record in records for failure in record.get("failures", ()))
    summary["failures"] = dict(Counter(failure["reason"] for failure in failures))
    return summary
