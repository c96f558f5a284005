"""An embedder in files: tensors and JSON, no code."""

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from fedss.errors import ConfigError
from fedss.files import START_LENGTH, what_begins, write_file
from fedss.models.backbones import conv4_features, conv4_width
from fedss.models.checks import few
from fedss.models.embedder import Embedder, EmbedderSpec, assemble
from fedss.models.flat import raw_bytes
from fedss.models.norms import NormAct
from fedss.own_code import FORM, OwnCode, check_code, is_code

_WEIGHTS = "model.safetensors"
_CONFIG = "config.json"
_FORMAT = "fedss-embedder-1"
_HEADER = "fedss"
# Of models whose description does not say: as many groups as divide the channels, up to 32.
_OLD_GROUP_VALUES = 1


def save_embedder(embedder: Embedder, folder: str | Path, config: Mapping[str, Any]) -> None:
    """Write `model.safetensors` (state dict) and `config.json` for `load_embedder`.

    A crash leaves the old or the new file, never half of one. The folder is made if it is missing.
    `config` is kept under "config" beside the model's own description.

    Raises:
        ConfigError: a config that is not JSON.
    """
    description = {**_description(embedder), "config": dict(config)}
    try:
        text = json.dumps(description, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the config cannot be written as JSON: {error}") from error
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / _WEIGHTS, save(_state(embedder), metadata={"format": "pt"}))
    write_file(folder / _CONFIG, (text + "\n").encode())


def safetensors_of(embedder: Embedder, metadata: Mapping[str, str]) -> bytes:
    """An embedder as one safetensors file, for `load_embedder` and for those without this library.

    The description that `save_embedder` writes into a JSON stands in the header, beside `metadata`.
    Tensors are named ``backbone.<name>``, with the name that the backbone gave them before its
    norms were replaced or frozen, ``projection.weight`` [D, F], ``mean`` and ``std`` [C], and those
    of a whitening, ``whitening.mean_F`` [F] and ``whitening.axes_FK`` [F, K].
    """
    names = _names_in_file(embedder)
    tensors = {names[name]: tensor for name, tensor in _state(embedder).items()}
    header = {"format": "pt", _HEADER: json.dumps(_description(embedder)), **metadata}
    return save(tensors, metadata=header)


def load_embedder(
    path: str | Path, backbone: nn.Module | str | None = None, trust_code: bool = False
) -> Embedder:
    """The embedder that was saved: same outputs, bit for bit, on the CPU, in eval mode.

    Nothing is downloaded, and only tensors and JSON are read: no code of the files runs, and what
    they name is imported only where ``trust_code`` says so.

    Args:
        path: a folder that `save_embedder` wrote, or a file (or its folder) of `safetensors_of`.
        backbone: needed if and only if the model was built around a module of your own: one of the
            same structure, with any weights. It is copied, not changed. Or the name of code that
            makes one, which is imported. Where the model names such code, it takes its place.
        trust_code: import the code that the model names.

    Raises:
        ConfigError: a file missing, damaged or of another origin; a backbone missing or not called
            for; code that is not trusted, not there or another one; tensors missing, left over or
            of another shape or dtype (they are listed).
    """
    path = Path(path)
    file = path if path.is_file() else path / _WEIGHTS
    header: dict[str, str] = {}
    # What is wrong with the file is told when its tensors are read.
    with suppress(OSError, SafetensorError), safe_open(file, framework="pt") as content:
        header = content.metadata() or {}
    if _HEADER in header:
        description = None
        with suppress(ValueError, RecursionError):
            description = json.loads(header[_HEADER])
        spec = _spec(description, f"the header of {file}")
    else:
        spec = _config_spec(file, path.is_file())
    source = backbone if spec.is_own and backbone is not None else spec.backbone
    if source is None:
        raise ConfigError(
            f"the model in {path} was built around a module of its owner's, which no file can "
            "hold: pass one of the same structure, fedss.load(folder, backbone=...), or name the "
            f"function that makes it, --backbone {FORM}"
        )
    if not spec.is_own and backbone is not None:
        raise ConfigError(
            f'the model in {path} was built from the name "{spec.backbone}": leave backbone out'
        )
    if isinstance(backbone, str) and not is_code(backbone):
        raise ConfigError(f"backbone: expected {FORM}, got {backbone!r}")
    if isinstance(source, str) and source == spec.backbone and spec.is_own:
        check_code(OwnCode(source, spec.code or ""), trust_code or source == backbone, path)
    try:
        state = load_file(file)
    except (OSError, SafetensorError) as error:
        raise _unreadable(file, error) from error
    _check_sizes(spec, state, file)
    embedder = assemble(source, spec, seed=0, download=False)
    expected = embedder.state_dict()
    names = _names_in_file(embedder) if _HEADER in header else {name: name for name in expected}
    problems = [f"missing {names[n]}" for n in expected if names[n] not in state]
    problems += [f"left over {n}" for n in state if n not in names.values()]
    problems += [
        f"{name} is {tensor.dtype} {list(tensor.shape)}, expected {t.dtype} {list(t.shape)}"
        for name, tensor, t in ((names[n], state.get(names[n]), t) for n, t in expected.items())
        if tensor is not None and (tensor.shape != t.shape or tensor.dtype != t.dtype)
    ]
    if problems:
        raise ConfigError(f"{file} does not fit the model: {few(problems)}")
    embedder.load_state_dict({name: state[names[name]] for name in expected})
    return embedder.eval()


def fingerprint(embedder: Embedder) -> str:
    """A digest, in hex, of a model's structure and of every number in it; sha256."""
    spec = _stored(embedder.spec)
    # Models of before there was a choice keep the fingerprint that indexes and cards know them by.
    if spec["group_values"] == _OLD_GROUP_VALUES:
        del spec["group_values"]
    digest = hashlib.sha256(json.dumps(spec, sort_keys=True).encode())
    for name, tensor in sorted(embedder.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()


def _description(embedder: Embedder) -> dict[str, Any]:
    return {"format": _FORMAT, "embedder": _stored(embedder.spec)}


def _stored(spec: EmbedderSpec) -> dict[str, Any]:
    """A description as it is written: what most models lack is left out."""
    return {k: v for k, v in asdict(spec).items() if k not in ("code", "whitened") or v}


def _state(embedder: Embedder) -> dict[str, Tensor]:
    # Flattened parameters share one storage, which safetensors refuses: each gets its own.
    return {n: t.detach().cpu().clone().contiguous() for n, t in embedder.state_dict().items()}


def _names_in_file(embedder: Embedder) -> dict[str, str]:
    """The names of tensors in an exported file, by their names in the state dict."""
    parts = embedder.named_modules(remove_duplicate=False)
    replaced = {f"{path}.0" for path, part in parts if isinstance(part, NormAct)}

    def outside(name: str) -> str:
        owner, _, leaf = name.rpartition(".")
        return f"{owner.removesuffix('.0')}.{leaf}" if owner in replaced else name

    return {name: outside(name) for name in embedder.state_dict()}


def _config_spec(file: Path, alone: bool) -> EmbedderSpec:
    config = file.with_name(_CONFIG)
    if alone and not config.exists():
        what = _what_it_is(file)
        got = f"but it {what}" if what else "found none whose header describes a model"
        raise ConfigError(
            f"{file}: expected a safetensors file that fedss export wrote, {got}; export "
            "the run again: fedss export RUN --format safetensors"
        )
    try:
        description = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(config, error) from error
    return _spec(description, str(config))


def _spec(description: Any, where: str) -> EmbedderSpec:
    if not isinstance(description, dict) or description.get("format") != _FORMAT:
        raise ConfigError(f'{where} does not describe a model: its "format" must be "{_FORMAT}"')
    try:
        return EmbedderSpec(**{"group_values": _OLD_GROUP_VALUES, **description["embedder"]})
    except (KeyError, TypeError, ConfigError) as error:
        raise ConfigError(f'{where}: "embedder" does not describe a model: {error}') from error


def _check_sizes(spec: EmbedderSpec, state: Mapping[str, Tensor], file: Path) -> None:
    """Refuse a description of other sizes than the file's, before a network is made of it."""
    held = {name: tuple(tensor.shape) for name, tensor in state.items()}
    expected: dict[str, tuple[int, ...]] = {"mean": (spec.channels,)}
    width = conv4_width(spec.backbone)
    if width is not None:
        try:
            features = conv4_features(spec.channels, spec.image_size, width)
        except ConfigError as error:
            raise ConfigError(f"{file} does not fit its description: {error}") from error
        expected["backbone.block1.conv.weight"] = (width, spec.channels, 3, 3)
        size = min(features, spec.embedding_size) if spec.whitened else features
        expected["projection.weight"] = (spec.embedding_size, size)
    elif spec.backbone is not None:
        of_file = held.get("projection.weight", ())[-1:]
        expected["projection.weight"] = (spec.embedding_size, *of_file)
    # What is missing or left over is told of all names, once the network is there.
    problems = [
        f"{name} is {list(held[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in held and held[name] != shape
    ]
    if problems:
        raise ConfigError(f"{file} does not fit its description: {few(problems)}")


def _unreadable(path: Path, error: Exception) -> ConfigError:
    what = f"{path} is missing"
    if not isinstance(error, FileNotFoundError):
        kind = _what_it_is(path)
        what = f"cannot read {path}: {f'it {kind}' if kind else error}"
    return ConfigError(
        f"{what}. Restore it; or, in a run folder, delete {path.parent.parent}/summary.json "
        "and start the same fedss train command again: it makes the model anew from the last "
        "checkpoint"
    )


def _what_it_is(path: Path) -> str:
    """What a file is that holds no part of a model, as ``what_begins``."""
    with suppress(OSError), path.open("rb") as file:
        start = file.read(START_LENGTH)
        return what_begins(start) if start else "is empty (0 bytes)"
    return ""
