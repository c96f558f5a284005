"""Trained weights of a timm model out of a local file: all of them, or an error that lists why."""

import hashlib
import pickle
import sys
import zipfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedss.errors import ConfigError
from fedss.files import START_LENGTH, what_begins
from fedss.models.checks import few
from fedss.optional import import_extra
from fedss.text import one_line

# Statistics of a batch norm are frozen with it, and then nobody asks how many batches made them.
_UNUSED = "num_batches_tracked"


def weights_fingerprint(path: str | Path) -> str:
    """SHA-256 of a file of weights, in hexadecimal digits.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(
            f"weights: expected a file (.safetensors, .pth or .pt), cannot read {path}: "
            f"{error.strerror or error}"
        ) from error


def load_weights_(model: nn.Module, path: str | Path, channels: int) -> None:
    """Load a timm model's weights from a file of timm's own names, in place.

    What ``timm.models.load_state_dict`` opens: safetensors, or what torch saved, of which tensors
    alone are read and no code is run; wrapped in ``state_dict`` or ``model`` or not, with the
    prefix ``module.`` of parallel training or not; averaged weights (``state_dict_ema``) go first.
    Tensors under other names are taken in their order, if all have the shapes and the last names
    of the model's (``_bn0.weight`` for ``bn1.weight``): other libraries list the same network so.
    Then what timm does with published weights: positions of a transformer are resized to the
    model's images, and a first convolution of three colours is summed up for gray ones. The
    tensors of timm's classifier may be left over. Nothing else may be, and nothing may be missing;
    the model, without its classifier, is changed only if all fits.

    Raises:
        ConfigError: the file cannot be read; it has not the tensors of this architecture (they are
            listed: missing, left over, or of another shape or kind), or numbers that are not
            finite.
    """
    timm = import_extra("timm.models", "timm")
    try:
        state = timm.load_state_dict(str(path))
        state = {str(name): tensor for name, tensor in state.items()}
    except Exception as error:
        # Whatever a file that is something else makes pickle, zip, safetensors or timm raise.
        raise ConfigError(
            f"weights: {path} {_what_it_is(Path(path)) or _what_it_holds(Path(path), error)}; "
            "expected .safetensors, or a .pth or .pt of torch.save(model.state_dict(), ...)"
        ) from error
    # The others are neither missing, left over, nor of the wrong kind: halved files cast them, too.
    state = {name: value for name, value in state.items() if not name.endswith(_UNUSED)}
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    no_tensors = [name for name in state if name not in tensors]
    tensors = _in_order(tensors, model)
    expected = {n: t for n, t in model.state_dict().items() if not n.endswith(_UNUSED)}
    published: Any = getattr(model, "pretrained_cfg", {})
    layers = tuple(f"{layer}." for layer in _names(published.get("classifier")))
    classifier = [name for name in tensors if name.startswith(layers)]
    tensors = {n: tensor for n, tensor in tensors.items() if n not in classifier}
    # timm's conversions trip over tensors of another architecture, which are listed below.
    with suppress(Exception):
        tensors = _fitted(tensors, model, _names(published.get("first_conv")), channels)
    differing = [
        f"{n} {_kind(tensors[n])}, expected {_kind(t)}"
        for n, t in expected.items()
        if n in tensors and _kind(tensors[n]) != _kind(t)
    ]
    problems = {
        "missing": [n for n in expected if n not in tensors],
        "left over": [n for n in tensors if n not in expected] + no_tensors,
        "of another shape or kind": differing,
        "not finite": [
            n for n in expected if n in tensors and not bool(tensors[n].isfinite().all())
        ],
    }
    listed = [f"{len(names)} {what} ({few(names)})" for what, names in problems.items() if names]
    if listed:
        name = published.get("architecture", type(model).__name__)
        besides = f" ({few(classifier)}: its classifier, not needed)" if classifier else ""
        raise ConfigError(
            f"weights: {path} does not hold those of timm:{name} for images of {channels} "
            f"channels{besides}: {'; '.join(listed)}. {_where_they_are(state, expected)}"
        )
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(tensors[name])


def _in_order(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The same under the names of the model, if that is another list of the same network."""
    expected = {n: t for n, t in model.state_dict().items() if not n.endswith(_UNUSED)}
    given = list(tensors.items())[: len(expected)]
    if len(given) < len(expected) or len(tensors) > len(given) + 2 or expected.keys() & tensors:
        return tensors
    for (name, tensor), (wanted, like) in zip(given, expected.items(), strict=True):
        first = wanted == next(iter(expected))  # of three colours, where images may be gray
        if name.rpartition(".")[2] != wanted.rpartition(".")[2] or (
            tensor.shape != like.shape and not (first and tensor.shape[2:] == like.shape[2:])
        ):
            return tensors
    return dict(zip(expected, (tensor for _, tensor in given), strict=True))


def _what_it_is(path: Path) -> str:
    """What a file is that holds no weights, and what to do; empty where nothing tells."""
    try:
        size, named_safetensors = path.stat().st_size, path.suffix == ".safetensors"
        with path.open("rb") as file:
            start = file.read(START_LENGTH)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    if not size:
        return "is empty (0 bytes): download it again"
    if what := what_begins(start):
        return what
    if start.startswith(b"PK"):
        if what := _what_the_zip_is(path):
            return what
    elif start.isascii() and b"\0" not in start:
        return f"is a text: it begins with {start.decode().split(chr(10))[0][:60]!r}"
    elif start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 100_000_000:
        if not named_safetensors:
            return "is of the format safetensors: give it a name that ends with .safetensors"
        return f"is damaged or cut short at {size:,} bytes: download it again"
    by_torch = start.startswith((b"PK", b"\x80"))
    if named_safetensors:
        hint = " (torch.save wrote it: .pth)" if by_torch else ""
        return f"is not of the format safetensors, in spite of its name{hint}"
    return "" if by_torch else "is of no format that is known here"


def _what_the_zip_is(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:
        return f"is damaged or cut short at {path.stat().st_size:,} bytes: download it again"
    if not any(name.endswith("/data.pkl") for name in names):
        return f"is a zip archive with {few(names, 3)}, which torch did not write: unpack it first"
    if any("/code/" in name for name in names):
        return "is a TorchScript program: save its state_dict() instead"
    return ""


def _what_it_holds(path: Path, error: Exception) -> str:
    """What a file of torch's holds that is not tensors by their names."""
    if isinstance(error, AttributeError):
        return "holds no tensors by name"
    if not isinstance(error.__cause__ or error, pickle.UnpicklingError):
        return f"cannot be read: {one_line(error)[:300]}"
    objects: list[str] = []
    # It knows files of torch 1.6 and later alone.
    with suppress(Exception):
        objects = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    named = f" ({few(objects, 3)})" if objects else ""
    return (
        f"holds Python objects beside tensors{named}, as torch.save(model, ...) writes them, "
        "and no code of a file is run: save model.state_dict() where the file was made"
    )


def _where_they_are(state: Mapping[str, object], expected: Iterable[str]) -> str:
    """What to do about tensors that do not fit."""
    needed = list(expected)
    for name in state:
        prefix = name.removesuffix(needed[0])
        if prefix not in ("", name) and all(prefix + each in state for each in needed):
            return f'All names have "{prefix}" before them: save the tensors without it'
    inner = [
        name
        for name, value in state.items()
        if isinstance(value, Mapping) and any(isinstance(t, Tensor) for t in value.values())
    ]
    if inner:
        return f"There are tensors inside {few(inner)}: save one of these alone"
    return (
        "Give the backbone that the file was made from; tensors need the names that timm gives them"
    )


def _names(layers: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (layers,) if isinstance(layers, str) else layers or ()


def _fitted(
    state: dict[str, Tensor], model: nn.Module, convolutions: tuple[str, ...], channels: int
) -> dict[str, Tensor]:
    """What timm makes of published weights for a model: see ``timm.models.load_pretrained``."""
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is not None:
        state = convert(state, model)
    timm = import_extra("timm.models", "timm")
    for name in (f"{layer}.weight" for layer in convolutions):
        if name in state and state[name].ndim == 4 and state[name].shape[1] == 3 != channels:
            state[name] = timm.adapt_input_conv(channels, state[name])
    return state


def _kind(tensor: Tensor) -> str:
    """Shape, and whether these are fractions: float16 will do where float32 is expected."""
    fractions = "" if tensor.is_floating_point() else f"{tensor.dtype} "
    return f"{fractions}{list(tensor.shape)}"
