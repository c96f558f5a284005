"""Start a run from the weights of another: its backbone, and class rows by the names of classes."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedss.config import Config, config_from_dict
from fedss.core.class_rows import create_class_rows
from fedss.core.optimizers import current_rows
from fedss.errors import ConfigError, RunFolderError
from fedss.inference.model import load
from fedss.models import Embedder, fingerprint, load_embedder
from fedss.runs.about import read_any_config
from fedss.runs.checkpoint import load_checkpoint, newest_round
from fedss.runs.fields import parse_json, read_as, read_bytes
from fedss.text import counted
from fedss.training.build import resolved, server_optimizer

_LOG = logging.getLogger("fedss.training")
# What two networks of one architecture have in common, before their tensors are looked at.
_ARCHITECTURE = (
    *("backbone", "channels", "embedding_size", "pretrained", "group_values", "whitened"),
)


@dataclass(frozen=True)
class Start:
    """Where a run starts from, beside its embedder, which has the weights already.

    Attributes:
        weights: fingerprint of the model.
        record: what ``config.json`` says of it.
        ids_U: int64, the classes whose rows come from there.
        rows_UD: float32, these rows.
    """

    weights: str
    record: dict[str, Any]
    ids_U: Tensor
    rows_UD: Tensor


def start_from(
    given: Path | None,
    folder: Path,
    config: Config,
    embedder: Embedder,
    class_names: Sequence[str],
    backbone: nn.Module | str | None,
) -> Start | None:
    """Give an embedder the weights that a run starts from, in place; None: it starts with its own.

    A run that goes on has its first weights in its own folder, wherever the other run is by then.

    Args:
        given: the folder of the other run; None: what ``folder`` knows, if it was told before.
        folder: that of the run that starts.
        config: the configuration of the run that starts.
        embedder: its model.
        class_names: the names of its class rows.
        backbone: the user's own module or the name of the code that makes it, if there is one.

    Raises:
        ConfigError: the other run has another architecture.
        RunFolderError: there is no such run, or ``folder`` was started from another one.
    """
    has_config = (folder / "config.json").exists()
    record = read_any_config(folder).get("start") if has_config else None
    if given is not None and record is not None and record.get("run") != str(given):
        raise RunFolderError(
            f"{folder} was started from {record.get('run')}, not from {given}; leave --from out, "
            "or choose another folder"
        )
    if record is not None and newest_round(folder / "checkpoint"):
        source = load_embedder(folder / "checkpoint" / "first", backbone)
        _take_weights(embedder, source, folder)
        nothing = torch.empty(0, dtype=torch.int64), torch.empty(0, embedder.spec.embedding_size)
        return Start(fingerprint(embedder), dict(record), *nothing)
    run = given if record is None else Path(str(record.get("run")))
    if run is None:
        return None
    _take_weights(embedder, load(run, backbone), run)
    ids_U, rows_UD = _rows_of(run, class_names)
    if config.normalize_rows:
        rows_UD = F.normalize(rows_UD, dim=1)
    of = counted(len(class_names), "class")
    _LOG.info("starts from %s: the backbone, and %d rows of %s", run, len(ids_U), of)
    record = {"run": str(run), "round": newest_round(run / "checkpoint"), "class_rows": len(ids_U)}
    return Start(fingerprint(embedder), record, ids_U, rows_UD)


def _take_weights(embedder: Embedder, source: Embedder, run: Path) -> None:
    there, here = source.spec, embedder.spec
    different = [
        f"{name} {getattr(there, name)!r} there, {getattr(here, name)!r} here"
        for name in _ARCHITECTURE
        if getattr(there, name) != getattr(here, name)
    ]
    theirs, ours = source.state_dict(), embedder.state_dict()
    if not different:
        shapes = ({n: list(t.shape) for n, t in state.items()} for state in (theirs, ours))
        before, now = shapes
        different = [
            f"{name} {before.get(name, 'not')} there, {now.get(name, 'not')} here"
            for name in sorted({*before, *now})
            if before.get(name) != now.get(name)
        ][:3]
    if different:
        raise ConfigError(
            f"--from {run}: expected a model of the same architecture, got {'; '.join(different)}; "
            "take the settings of its config.json (--config)"
        )
    embedder.load_state_dict(theirs)


def _rows_of(run: Path, class_names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The ids of classes that a run has trained too, and their rows as they stand there."""
    place = run / "checkpoint"
    known = place / "classes.json"
    about = read_any_config(run) if newest_round(place) and known.exists() else None
    if about is None:
        # A model without its checkpoint, a federation, an earlier version of fedss.
        _LOG.warning("%s has no class rows with names; all of them start anew", run)
        return torch.empty(0, dtype=torch.int64), torch.empty(0, 1)
    names: list[str] = read_as(list[str], parse_json(read_bytes(known), known), known)
    config = config_from_dict({**about["config"], **about.get("resolved", {})})
    optimizer, size = server_optimizer(config), resolved(config.embedding_size)
    rows = create_class_rows(
        len(names), size, optimizer.of_rows.slots, config.seed, config.row_dtype
    )
    state = load_checkpoint(place, rows)
    assert state is not None
    row_of = {name: row for row, name in enumerate(names)}
    pairs = [(i, row_of[name]) for i, name in enumerate(class_names) if name in row_of]
    ids_U, there_U = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).unbind(1)
    # Those that it never touched say nothing.
    touched_U = state.class_rows.updated_N[there_U] != 0
    ids_U, there_U = ids_U[touched_U].contiguous(), there_U[touched_U].contiguous()
    return ids_U, current_rows(optimizer, state.class_rows, there_U, state.round)[0]
