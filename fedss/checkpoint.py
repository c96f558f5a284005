"""Atomic checkpoints: safetensors and JSON, whole or not there at all.

A checkpoint is a folder ``round-000120``. It is written under another name, flushed to the disk
and renamed, so that a process killed at any moment leaves the previous one in place.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load, save

from fedss.algorithm import ServerState
from fedss.class_rows import ClassRows
from fedss.errors import RunFolderError
from fedss.files import write_file, write_json
from fedss.moments import RowHistory

KEPT = 2
_STATE, _RECORD = "state.safetensors", "checkpoint.json"


def save_checkpoint(folder: Path, state: ServerState) -> None:
    """Write ``folder/round-<round>`` and remove all but the newest two.

    Raises:
        OSError: the disk is full or the place cannot be written; earlier checkpoints are whole.
    """
    tensors = {"backbone": state.backbone_P, "rows": state.class_rows.weight_ND}
    tensors["rows_updated"] = state.class_rows.updated_N
    tensors |= {f"backbone.{name}": slot for name, slot in state.backbone_slots.items()}
    tensors |= {f"rows.{name}": slot for name, slot in state.class_rows.slots.items()}
    history = state.class_rows.history
    if history is not None:
        tensors["history.second"] = history.second_ZZ
        tensors |= {f"history.map.{round}": map_DE for round, map_DE in history.maps.items()}
    content = save(tensors)
    temporary, final = folder / ".unfinished", folder / f"round-{state.round:06d}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write_file(temporary / _STATE, content)
    record = {"round": state.round, "sha256": hashlib.sha256(content).hexdigest()}
    write_json(temporary / _RECORD, record)
    shutil.rmtree(final, ignore_errors=True)
    temporary.replace(final)
    _flush_folder(folder)
    for old in _checkpoints(folder)[:-KEPT]:
        shutil.rmtree(old)


def load_checkpoint(folder: Path) -> ServerState | None:
    """The newest checkpoint in ``folder``, bit for bit as it was saved; None if there is none.

    Raises:
        RunFolderError: a file of the newest checkpoint is missing or damaged.
    """
    found = _checkpoints(folder)
    if not found:
        return None
    newest = found[-1]
    try:
        record = json.loads((newest / _RECORD).read_bytes())
        content = (newest / _STATE).read_bytes()
        if hashlib.sha256(content).hexdigest() != record["sha256"]:
            raise ValueError(f"{_STATE} differs from its checksum")
    except (OSError, ValueError, KeyError, TypeError) as error:
        back_to = f"go on from {found[-2].name}" if len(found) > 1 else "start again from round 0"
        raise RunFolderError(
            f"checkpoint {newest} is damaged ({error}); delete that folder to {back_to}"
        ) from error
    tensors = load(content)
    history = None
    if "history.second" in tensors:
        maps = {
            int(round): map_DE for round, map_DE in _with_prefix(tensors, "history.map.").items()
        }
        history = RowHistory(tensors["history.second"], maps)
    slots, updated_N = _with_prefix(tensors, "rows."), tensors["rows_updated"]
    return ServerState(
        tensors["backbone"],
        _with_prefix(tensors, "backbone."),
        ClassRows(tensors["rows"], slots, updated_N, history),
        record["round"],
    )


def _with_prefix(tensors: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("round-*"))


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
