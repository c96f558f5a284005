"""What a backbone must be for federated training; every refusal says what to do instead."""

import copy
import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedss.errors import ConfigError
from fedss.models.norms import BatchNorm, FrozenBatchNorm, InstanceNorm
from fedss.text import one_line

_ADVICE = (
    "Dropout draws from torch's global generator, so that results would depend on the number and "
    "order of workers: set its probability to 0"
)


def check_image(channels: int, image_size: int) -> None:
    """Refuse sizes that no network is for; below 8 pixels four halvings leave nothing."""
    if not 1 <= channels <= 1024:
        raise ConfigError(f"channels must be 1 to 1024, not {reprlib.repr(channels)}")
    if not 8 <= image_size <= 4096:
        raise ConfigError(f"image_size must be 8 to 4096, not {reprlib.repr(image_size)}")


def refuse_lazy_layers(body: nn.Module) -> None:
    """Weights that are not there yet can be neither seeded nor sent."""
    tensors = [*body.named_parameters(), *body.named_buffers()]
    lazy = [name for name, tensor in tensors if nn.parameter.is_lazy(tensor)]
    if lazy:
        raise ConfigError(f"the backbone has lazy layers: run it once on an image ({few(lazy)})")


def refuse_trained_norms(body: nn.Module) -> None:
    """Batch norms that have learnt something, which fresh group norms in their place would lose."""

    def has_learnt(part: nn.Module) -> bool:
        if not isinstance(part, BatchNorm):
            return False
        mean, var = part.running_mean, part.running_var
        if mean is not None and var is not None and bool((mean != 0).any() or (var != 1).any()):
            return True
        # Initialization may choose another constant, as for a residual block that begins as 0.
        affine = [tensor for tensor in (part.weight, part.bias) if tensor is not None]
        return any(bool((tensor != tensor[:1]).any()) for tensor in affine)

    trained = _parts(body, has_learnt)
    if trained:
        raise ConfigError(
            f"batch_norm: the backbone's batch norms hold what earlier training left: "
            f"{few(trained)}. Expected a choice: freeze keeps them as they are, for trained "
            "weights (so does pretrained); replace puts group norms in their place, after which "
            "the network gives other features than before"
        )


def refuse_broken_numbers(body: nn.Module) -> None:
    """Parameters and statistics that are not finite; a mask of another buffer may be infinite."""
    tensors = [(n, t.isfinite()) for n, t in body.named_parameters()]
    for name, buffer in body.named_buffers():
        statistics = name.rpartition(".")[2] in ("running_mean", "running_var")
        tensors.append((name, buffer.isfinite() if statistics else ~buffer.isnan()))
    bad = [name for name, fine in tensors if not bool(fine.all())]
    if bad:
        raise ConfigError(
            f"the backbone holds numbers that are not finite: {few(bad)}. Expected finite ones: "
            "the training that left them went wrong"
        )


def refuse_batch_statistics(body: nn.Module) -> None:
    """Norms that are left once batch norms have been replaced or frozen."""

    def keeps_statistics(part: nn.Module) -> bool:
        if isinstance(part, FrozenBatchNorm):
            return False
        # By the buffer and not by the class alone: timm has batch norms that inherit from none.
        buffers = {name for name, _ in part.named_buffers(recurse=False)}
        return "running_var" in buffers or isinstance(part, BatchNorm)

    bad = _parts(body, keeps_statistics)
    if bad:
        advice = "to keep trained statistics: torch's BatchNorm with the same tensors, and freeze"
        if any(keeps_statistics(p) and isinstance(p, InstanceNorm) for p in body.modules()):
            advice = "InstanceNorm: without track_running_stats, or batch_norm=freeze"
        raise ConfigError(
            f"the backbone keeps statistics of its batches: {few(bad)}. They do not average over "
            "clients, and only torch's BatchNorm can be replaced: use LayerNorm or GroupNorm there "
            f"({advice})"
        )


def refuse_dropout(body: nn.Module) -> None:
    """Dropout that a layer's class gives away, by name."""

    def active(part: nn.Module) -> bool:
        values = (getattr(part, n, 0) for n in ("p", "prob", "drop", "drop_prob", "drop_rate"))
        return "drop" in type(part).__name__.lower() and any(
            isinstance(v, int | float) and v > 0 for v in values
        )

    bad = _parts(body, active)
    if bad:
        raise ConfigError(f"the backbone has active dropout: {few(bad)}. {_ADVICE}")


def refuse_hidden_state(body: nn.Module, channels: int, image_size: int) -> None:
    """What no name gives away: random numbers drawn, or buffers changed, by a training step.

    Functional and attention dropout move the generator. A counter or running mean of a module's own
    is in no message: each worker's copy would go its own way.
    """
    images_BCHW = probe_images(channels, image_size)
    body = copy.deepcopy(body).train()
    buffers = {name: buffer.clone() for name, buffer in body.named_buffers()}
    before = torch.get_rng_state()
    try:
        with torch.no_grad():
            body(images_BCHW)
    except Exception as error:
        raise ConfigError(
            f"the backbone fails in training mode on images {list(images_BCHW.shape)}: "
            f"{one_line(error)}"
        ) from error
    if not torch.equal(before, torch.get_rng_state()):
        raise ConfigError(f"the backbone draws random numbers when it trains. {_ADVICE}")
    changed = [
        name
        for name, buffer in body.named_buffers()
        if name not in buffers or not torch.equal(buffer, buffers[name])
    ]
    if changed:
        raise ConfigError(
            f"the backbone changes buffers when it trains: {few(changed)}. Buffers are not sent to "
            "the server, so that results would depend on which worker saw which images: leave "
            "them as they are in forward, or set them once before training"
        )


def refuse_cut_patches(body: nn.Module, image_size: int) -> None:
    """Patches that do not fill an image: a transformer would not see its right and lower edge."""
    embedding = getattr(body, "patch_embed", None)
    patches = getattr(embedding, "proj", None)
    if not isinstance(patches, nn.Conv2d) or getattr(embedding, "dynamic_img_pad", False):
        return
    side, padded = patches.kernel_size[0], patches.padding not in ("valid", (0, 0))
    rest = image_size % side
    if padded or patches.stride[0] != side or not rest:
        return
    fits = [size for size in (image_size - rest, image_size - rest + side) if size >= side]
    raise ConfigError(
        f"image_size: the backbone takes patches of {side} x {side} pixels; expected a multiple of "
        f"{side}, such as {' or '.join(map(str, fits))}, got {image_size}, of which it would not "
        f"see the last {rest}" + size_hint(getattr(body, "pretrained_cfg", None), image_size)
    )


def probe_images(channels: int, image_size: int) -> Tensor:
    """Two images, float32 from -1 to 1, to try a backbone on."""
    shape = (2, channels, image_size, image_size)
    return torch.linspace(-1, 1, math.prod(shape)).view(shape)


def output_size(body: nn.Module, channels: int, image_size: int) -> int:
    """The number of features that the backbone gives for an image."""
    images_BCHW = torch.zeros(1, channels, image_size, image_size)
    takes = f"must map float32 {list(images_BCHW.shape)} to [1, features]"
    try:
        with torch.no_grad():
            features_BF = copy.deepcopy(body).eval()(images_BCHW)
    except Exception as error:
        size = size_hint(getattr(body, "pretrained_cfg", None), image_size)
        raise ConfigError(f"the backbone {takes}, but fails: {one_line(error)}{size}") from error
    if not isinstance(features_BF, Tensor):
        raise ConfigError(f"the backbone {takes}, but gives a {type(features_BF).__name__}")
    if features_BF.ndim != 2 or len(features_BF) != 1 or features_BF.shape[1] < 1:
        pool = ": end it with pooling and Flatten" if features_BF.ndim > 2 else ""
        raise ConfigError(f"the backbone {takes}, but gives {list(features_BF.shape)}{pool}")
    if features_BF.dtype != torch.float32:
        raise ConfigError(f"the backbone {takes} in float32, but gives {features_BF.dtype}")
    return int(features_BF.shape[1])


def size_hint(published: Any, image_size: int) -> str:
    """What to say of the size that a timm model was made for, where it is another one."""
    side = published.get("input_size", [0])[-1] if isinstance(published, Mapping) else 0
    if side in (0, image_size):
        return ""
    return f"; the model is made for {side} px: --image-size {side}"


def few(items: Sequence[str], most: int = 8) -> str:
    """The first items of a list, and how many more there are."""
    rest = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + rest


def _parts(body: nn.Module, chosen: Callable[[nn.Module], bool]) -> list[str]:
    return [
        f"{path or 'the backbone'} ({type(part).__name__})"
        for path, part in body.named_modules()
        if chosen(part)
    ]
