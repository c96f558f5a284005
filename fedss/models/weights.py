"""Trained weights of a timm model out of a local file: all of them, or an error that lists why."""

import hashlib
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedss.errors import ConfigError
from fedss.extras import import_extra
from fedss.models.checks import few

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
    Then what timm does with published weights: positions of a transformer are resized to the
    model's pictures, and a first convolution of three colours is summed up for grey ones. The
    tensors of timm's classifier may be left over. Nothing else may be, and nothing may be missing.

    Args:
        model: a timm model without its classifier; changed only if all fits.
        path: the file.
        channels: of the pictures.

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
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(
            f"weights: {path} holds no tensors that can be read (expected .safetensors, or a "
            f".pth or .pt with nothing but tensors in it): {reason[0][:300]}"
        ) from error
    found = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    no_tensors = [name for name in state if name not in found]
    expected = model.state_dict()
    published: Any = getattr(model, "pretrained_cfg", {})
    found, classifier = _without_classifier(found, published.get("classifier") or ())
    # timm's conversions trip over tensors of another architecture, which are listed below.
    with suppress(Exception):
        found = _fitted(found, model, published.get("first_conv") or (), channels)
    differing = [
        f"{n} {_kind(found[n])}, expected {_kind(t)}"
        for n, t in expected.items()
        if n in found and _kind(found[n]) != _kind(t)
    ]
    problems = {
        "missing": [n for n in expected if n not in found and not n.endswith(_UNUSED)],
        "left over": [n for n in found if n not in expected and not n.endswith(_UNUSED)]
        + no_tensors,
        "of another shape or kind": differing,
        "not finite": [n for n in expected if n in found and not bool(found[n].isfinite().all())],
    }
    listed = [f"{len(names)} {what} ({few(names)})" for what, names in problems.items() if names]
    if listed:
        name = published.get("architecture", type(model).__name__)
        besides = f" ({few(classifier)}: its classifier, not needed)" if classifier else ""
        raise ConfigError(
            f"weights: {path} does not hold those of timm:{name} for pictures of {channels} "
            f"channels{besides}: {'; '.join(listed)}. Give the backbone that the file was made "
            "from; tensors need the names that timm gives them"
        )
    with torch.no_grad():
        for name, tensor in expected.items():
            if name in found:
                tensor.copy_(found[name])


def _without_classifier(
    state: dict[str, Tensor], layers: str | tuple[str, ...]
) -> tuple[dict[str, Tensor], list[str]]:
    """The state without the classifier's tensors, and their names."""
    layers = (layers,) if isinstance(layers, str) else layers
    prefixes = tuple(f"{layer}." for layer in layers)
    names = [name for name in state if prefixes and name.startswith(prefixes)]
    return {name: tensor for name, tensor in state.items() if name not in names}, names


def _fitted(
    state: dict[str, Tensor], model: nn.Module, convolutions: str | tuple[str, ...], channels: int
) -> dict[str, Tensor]:
    """What timm makes of published weights for a model: see ``timm.models.load_pretrained``."""
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is not None:
        state = convert(state, model)
    timm = import_extra("timm.models", "timm")
    for layer in (convolutions,) if isinstance(convolutions, str) else convolutions:
        name = f"{layer}.weight"
        if name in state and state[name].ndim == 4 and state[name].shape[1] == 3 != channels:
            state[name] = timm.adapt_input_conv(channels, state[name])
    return state


def _kind(tensor: Tensor) -> str:
    """Shape, and whether these are fractions: float16 will do where float32 is expected."""
    fractions = "" if tensor.is_floating_point() else f"{tensor.dtype} "
    return f"{fractions}{list(tensor.shape)}"
