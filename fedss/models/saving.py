"""An embedder in a folder: tensors and JSON, no code."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from fedss.errors import ConfigError
from fedss.files import write_file
from fedss.models.checks import few
from fedss.models.embedder import Embedder, EmbedderSpec, assemble

_WEIGHTS = "model.safetensors"
_CONFIG = "config.json"
_FORMAT = "fedss-embedder-1"


def save_embedder(embedder: Embedder, folder: str | Path, config: Mapping[str, Any]) -> None:
    """Write `model.safetensors` (state dict) and `config.json` for `load_embedder`.

    Each file is written beside its place and moved into it, so a crash leaves the old or the new
    file, never half of one.

    Args:
        embedder: on any device; flattened or not.
        folder: made if missing.
        config: anything JSON can hold; kept under "config" beside the model's own description.

    Raises:
        ConfigError: a config that is not JSON.
    """
    description = {"format": _FORMAT, "embedder": asdict(embedder.spec), "config": dict(config)}
    try:
        text = json.dumps(description, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the config cannot be written as JSON: {error}") from error
    # Flattened parameters share one storage, which safetensors refuses: each gets its own.
    state = {n: t.detach().cpu().clone().contiguous() for n, t in embedder.state_dict().items()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / _WEIGHTS, save(state, metadata={"format": "pt"}))
    write_file(folder / _CONFIG, (text + "\n").encode())


def load_embedder(folder: str | Path, backbone: nn.Module | None = None) -> Embedder:
    """The embedder that `save_embedder` wrote: same outputs, bit for bit, on the CPU, in eval mode.

    Nothing is downloaded, and only tensors and JSON are read: no code of the folder runs.

    Args:
        folder: what `save_embedder` wrote.
        backbone: needed if and only if the model was built around a module of your own: one of the
            same structure, with any weights. It is copied, not changed.

    Raises:
        ConfigError: a file missing or damaged; a backbone missing or not called for; tensors
            missing, left over or of another shape or dtype (they are listed).
    """
    folder = Path(folder)
    spec = _read_spec(folder / _CONFIG)
    source = spec.backbone or backbone
    if source is None:
        raise ConfigError(
            f"the model in {folder} was built around a module of its owner's, which no file can "
            "hold: pass one of the same structure, fedss.load(folder, backbone=...)"
        )
    if spec.backbone is not None and backbone is not None:
        raise ConfigError(
            f'the model in {folder} was built from the name "{spec.backbone}": leave backbone out'
        )
    try:
        state = load_file(folder / _WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise _unreadable(folder / _WEIGHTS, error) from error
    embedder = assemble(source, spec, seed=0, download=False)
    expected = embedder.state_dict()
    problems = [f"missing {n}" for n in expected if n not in state]
    problems += [f"left over {n}" for n in state if n not in expected]
    problems += [
        f"{n} is {state[n].dtype} {list(state[n].shape)}, expected {t.dtype} {list(t.shape)}"
        for n, t in expected.items()
        if n in state and (state[n].shape != t.shape or state[n].dtype != t.dtype)
    ]
    if problems:
        raise ConfigError(f"{folder / _WEIGHTS} does not fit the model: {few(problems)}")
    embedder.load_state_dict(state)
    return embedder.eval()


def _read_spec(path: Path) -> EmbedderSpec:
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    if not isinstance(description, dict) or description.get("format") != _FORMAT:
        raise ConfigError(f'{path} does not describe a model: its "format" must be "{_FORMAT}"')
    try:
        return EmbedderSpec(**description["embedder"])
    except (KeyError, TypeError) as error:
        raise ConfigError(f'{path}: "embedder" does not describe a model: {error}') from error


def _unreadable(path: Path, error: Exception) -> ConfigError:
    what = f"{path} is missing" if isinstance(error, FileNotFoundError) else f"cannot read {path}"
    why = "" if isinstance(error, FileNotFoundError) else f": {error}"
    return ConfigError(
        f"{what}{why}. Restore it; or, in a run folder, delete {path.parent.parent}/summary.json "
        "and start the same fedss train command again: it makes the model anew from the last "
        "checkpoint"
    )
