"""Atomic checkpoints: safetensors and JSON, whole or not there at all.

A checkpoint is a folder ``round-000120``. It is written under another name, flushed to the disk
and renamed, so that a process killed at any moment leaves the previous one in place.

Class rows lie beside it, in files ``rows-000120.safetensors`` of the rows that were written since
an earlier checkpoint; ``checkpoint.json`` lists those that together give the whole table, later
ones on top, and rows in none of them are as before training. A new file takes in the last one
before it while that has at most twice as many rows: so a row is copied O(log) times, there are
O(log) files, and a checkpoint costs what was touched, not n. (Ours; the rule is that of a
log-structured merge tree, O'Neil et al. 1996.)

Two things that training does not change lie there from the start: ``first``, the model with its
first weights, whose frozen part no checkpoint has, and ``classes.json``, the names of the rows.
"""

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load, save
from torch import Tensor

from fedss.core.class_rows import ClassRows
from fedss.core.state import ServerState
from fedss.errors import RunFolderError
from fedss.files import atomic, write_file, write_json

KEPT = 2
_STATE, _RECORD = "state.safetensors", "checkpoint.json"
_NAME = re.compile(r"round-[0-9]{6,}")


def save_checkpoint(folder: Path, state: ServerState) -> None:
    """Write ``folder/round-<round>`` and remove all but the newest two.

    The rows written since the newest checkpoint there are ``state.class_rows.changed``, which is
    emptied. O(their number), up to a logarithm, on average.

    Raises:
        OSError: the disk is full or the place cannot be written; earlier checkpoints are whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"backbone": state.backbone_P}
    tensors |= {f"backbone.{name}": slot for name, slot in state.backbone_slots.items()}
    if state.class_rows.sums_EE is not None:
        tensors["row_sums"] = state.class_rows.sums_EE
    if state.clip is not None:
        tensors["clip"] = torch.tensor(state.clip, dtype=torch.float64)
    content = save(tensors)
    temporary, final = folder / ".unfinished", folder / f"round-{state.round:06d}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    write_file(temporary / _STATE, content)
    record = {
        "round": state.round,
        "sha256": hashlib.sha256(content).hexdigest(),
        "rows": _save_rows(folder, state),
        "norms": state.norms,
    }
    write_json(temporary / _RECORD, record)
    shutil.rmtree(final, ignore_errors=True)
    temporary.replace(final)
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    state.class_rows.changed.clear()
    for old in _checkpoints(folder)[:-KEPT]:
        shutil.rmtree(old)
    needed = {part["file"] for kept in _checkpoints(folder) for part in _row_files(kept)}
    for file in folder.glob("rows-*.safetensors"):
        if file.name not in needed:
            file.unlink()


def newest_round(folder: Path) -> int:
    """The round of the newest checkpoint in ``folder``; 0 if there is none."""
    checkpoints = _checkpoints(folder)
    return _round(checkpoints[-1]) if checkpoints else 0


def load_checkpoint(folder: Path, rows: ClassRows) -> ServerState | None:
    """The newest checkpoint in ``folder``, bit for bit as it was saved; None if there is none.

    ``rows`` is a new table, which gets the saved rows.

    Raises:
        RunFolderError: a file of the newest checkpoint is missing or damaged.
    """
    checkpoints = _checkpoints(folder)
    if not checkpoints:
        return None
    with _damage_told(checkpoints):
        record, tensors = _read_state(checkpoints[-1])
        for part in record["rows"]:
            with safe_open(_checked(folder / part["file"], part["sha256"]), "pt") as saved:
                ids_U = saved.get_tensor("ids")
                for name, table_N in _tables(rows).items():
                    values = saved.get_slice(name)
                    for block in _blocks(len(ids_U)):
                        table_N[ids_U[block]] = values[block]
    if "row_sums" in tensors:
        rows = replace(rows, sums_EE=tensors.pop("row_sums"))
    clip = float(tensors.pop("clip")) if "clip" in tensors else None
    backbone_P = tensors.pop("backbone")
    slots = {name.removeprefix("backbone."): slot for name, slot in tensors.items()}
    # An earlier version had none.
    norms = tuple(((*backbone,), (*of_rows,)) for backbone, of_rows in record.get("norms", ()))
    return ServerState(backbone_P, slots, rows, record["round"], norms, clip)


def load_backbone(folder: Path) -> Tensor:
    """The backbone parameters of the newest checkpoint in ``folder``, which has one.

    Raises:
        RunFolderError: it is damaged.
    """
    checkpoints = _checkpoints(folder)
    with _damage_told(checkpoints):
        return _read_state(checkpoints[-1])[1]["backbone"]


@contextmanager
def _damage_told(checkpoints: Sequence[Path]) -> Iterator[None]:
    """What goes wrong with the last of these is told, and what to do."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError) as error:
        back_to = (
            f"go on from {checkpoints[-2].name}"
            if len(checkpoints) > 1
            else "start again from round 0"
        )
        raise RunFolderError(
            f"checkpoint {checkpoints[-1]} is damaged ({error}); delete that folder to {back_to}"
        ) from error


def _read_state(checkpoint: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    record = json.loads((checkpoint / _RECORD).read_bytes())
    if "rows" not in record:
        raise RunFolderError(
            f"checkpoint {checkpoint} was written by fedss 0.1; go on with that version, or start "
            "again in another folder"
        )
    return record, load(_checked(checkpoint / _STATE, record["sha256"]).read_bytes())


def _save_rows(folder: Path, state: ServerState) -> list[dict[str, Any]]:
    """The files of the whole table, one of them new, as ``checkpoint.json`` lists them."""
    before = _checkpoints(folder)
    parts = _row_files(before[-1]) if before else []
    ids_U = torch.unique(torch.cat([torch.empty(0, dtype=torch.int64), *state.class_rows.changed]))
    while parts and parts[-1]["count"] <= 2 * len(ids_U):
        with safe_open(folder / parts[-1]["file"], "pt") as merged:
            ids_U = torch.unique(torch.cat([ids_U, merged.get_tensor("ids")]))
        parts = parts[:-1]
    if not len(ids_U):
        return parts
    file = f"rows-{state.round:06d}.safetensors"
    digest = _write_rows(folder / file, ids_U, _tables(state.class_rows))
    return [*parts, {"file": file, "count": len(ids_U), "sha256": digest}]


def _write_rows(path: Path, ids_U: Tensor, tables: Mapping[str, Tensor]) -> str:
    """Some rows of all tables, as a safetensors file; its SHA-256.

    Block by block: of a table that fills half the memory there is no room for a copy.
    """
    shapes = {"ids": (ids_U.dtype, list(ids_U.shape))}
    for name, table_N in tables.items():
        shapes[name] = (table_N.dtype, [len(ids_U), *table_N.shape[1:]])
    header, end = {}, 0
    for name, (dtype, shape) in shapes.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with atomic(path) as file:

        def put(content: bytes) -> None:
            digest.update(content)
            file.write(content)

        put(len(text).to_bytes(8, "little") + text)
        put(ids_U.numpy().tobytes())
        for table_N in tables.values():
            for block in _blocks(len(ids_U)):
                put(table_N[ids_U[block]].view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


_DTYPES = {torch.int64: "I64", torch.int32: "I32", torch.float32: "F32", torch.bfloat16: "BF16"}


def _blocks(count: int, block: int = 65536) -> Iterator[slice]:
    return (slice(start, start + block) for start in range(0, count, block))


def _tables(rows: ClassRows) -> dict[str, Tensor]:
    return {"weight": rows.weight_ND, "updated": rows.updated_N, **rows.slots}


def _row_files(checkpoint: Path) -> list[dict[str, Any]]:
    return list(json.loads((checkpoint / _RECORD).read_bytes())["rows"])


def _checked(path: Path, digest: str) -> Path:
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != digest:
            raise ValueError(f"{path.name} differs from its checksum")
    return path


def _checkpoints(folder: Path) -> list[Path]:
    # By number: a name has six digits or more.
    return sorted((p for p in folder.glob("round-*") if _NAME.fullmatch(p.name)), key=_round)


def _round(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("round-"))
