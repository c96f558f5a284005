"""Embedding models: backbones by name or of your own, projection, unit norm, flat parameters.

An `Embedder` maps pixels to h = f_θ(x)/‖f_θ(x)‖. `build_embedder` makes one from a name or from a
module of your own and sees to what federated training needs of it: no running statistics, no
randomness in the forward pass, a known output size. `flatten_` then gives θ as one vector.

Shape suffixes: B pictures of a batch, N pictures in all, C channels, H height, W width,
F features of the backbone, D embedding size, P trainable parameters.
"""

import copy
import difflib
import importlib
import json
import math
import os
import re
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from fedss.errors import ConfigError, DataError

NAMES = '"conv4" (64 channels), "conv4-<width>" or "timm:<model>"'

_WEIGHTS = "model.safetensors"
_CONFIG = "config.json"
_FORMAT = "fedss-embedder-1"
_BatchNorm = nn.modules.batchnorm._BatchNorm
_LEAST_VALUES = 8
_MOST_GROUPS = 32


@dataclass(frozen=True)
class EmbedderSpec:
    """What it takes to build an `Embedder` of the same structure again.

    `backbone` is the name given to `build_embedder`, or None for a module of the user's own.
    `pretrained` says that batch norms were frozen rather than replaced; rebuilding downloads
    nothing.
    """

    backbone: str | None
    channels: int
    image_size: int
    embedding_size: int
    pretrained: bool = False

    def __post_init__(self) -> None:
        if self.embedding_size < 1:
            raise ConfigError(f"embedding_size must be 1 or more, not {self.embedding_size}")
        _check_image(self.channels, self.image_size)


class Embedder(nn.Module):
    """Pixels to unit vectors: h = g / ‖g‖, g = A f_θ((x - mean) / std).

    f is the backbone, A the projection without bias (a bias would move all embeddings towards one
    common direction), or nothing where the backbone's own size is wanted. `mean` and `std` [C] are
    buffers: saved with the model, not trained, not sent.

    Made by `build_embedder`, which checks what this class takes for granted.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        projection: nn.Module,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        spec: EmbedderSpec,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.backbone = backbone
        self.projection = projection
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32))

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Unit embeddings.

        Args:
            pixels_BCHW: uint8 [B, C, H, W] in 0 … 255, or floating point in 0 … 1; H = W = the
                image size the model was built for.

        Returns:
            float32 [B, D], rows of length 1 (a row that is exactly zero before normalising stays
            zero).

        Raises:
            ValueError: another shape or dtype.
        """
        expected = (self.spec.channels, self.spec.image_size, self.spec.image_size)
        if pixels_BCHW.ndim != 4 or tuple(pixels_BCHW.shape[1:]) != expected:
            raise ValueError(
                f"pixels must be [B, {', '.join(map(str, expected))}], "
                f"not {list(pixels_BCHW.shape)}"
            )
        if pixels_BCHW.dtype == torch.uint8:
            pixels_BCHW = pixels_BCHW / 255
        elif pixels_BCHW.is_floating_point():
            pixels_BCHW = pixels_BCHW.to(torch.float32)
        else:
            raise ValueError(f"pixels must be uint8 or floating point, not {pixels_BCHW.dtype}")
        scaled_BCHW = (pixels_BCHW - self.mean[:, None, None]) / self.std[:, None, None]
        return nn.functional.normalize(self.projection(self.backbone(scaled_BCHW)), dim=1)


def build_embedder(
    backbone: str | nn.Module,
    *,
    channels: int,
    image_size: int,
    embedding_size: int,
    seed: int,
    pretrained: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Embedder:
    """An embedder fit for federated training.

    Batch norms are replaced by group norms (`replace_batch_norm`), or frozen if `pretrained`
    (`freeze_batch_norm`). A projection to `embedding_size` follows every named backbone, and a
    module of your own unless its output has that size already.

    Args:
        backbone: a name as in `build_backbone`, or a module of your own that maps float32
            [B, C, H, W] to [B, features]. Yours is copied to the CPU, never changed.
        channels: C of the pictures.
        image_size: H and W of the pictures.
        embedding_size: D.
        seed: of the initial weights; the same seed gives the same bits, and the global random
            state is left as it was.
        pretrained: download weights for a timm model; for a module of your own: it holds trained
            weights, so keep its batch norms' statistics.
        mean: per channel, of pixels in 0 … 1. None: what the pretrained timm weights expect,
            otherwise 0.5.
        std: likewise, otherwise 0.5.

    Raises:
        ConfigError: an unknown name; no weights to be had; a module whose output is not
            [B, features], that draws random numbers (dropout) or keeps batch statistics which
            cannot be replaced; a size or number out of range.
    """
    spec = EmbedderSpec(
        backbone=backbone if isinstance(backbone, str) else None,
        channels=channels,
        image_size=image_size,
        embedding_size=embedding_size,
        pretrained=pretrained,
    )
    with _own_random_state(seed):
        body = _body(backbone, spec, pretrained)
        expected_mean, expected_std = _pixel_statistics(body, channels, pretrained)
        return _assemble(
            body,
            spec,
            _per_channel(mean, channels, expected_mean, "mean"),
            _per_channel(std, channels, expected_std, "std"),
        )


def build_backbone(
    name: str, *, channels: int, image_size: int, seed: int, pretrained: bool = False
) -> nn.Module:
    """A backbone by name, as it comes: float32 [B, C, H, W] to [B, features].

    Names: "conv4", "conv4-<width>" (see `conv4`) and "timm:<model>", any image model of timm
    (`pip install "fedss[timm]"`) without its classifier. `build_embedder` is what prepares one
    for training.

    The initial weights are set by `seed` alone and the global random state is left as it was. (It
    is set and put back, so build in one thread; copies are cheap.)

    Raises:
        ConfigError: an unknown name or model; timm missing or unusable; no pretrained weights;
            channels < 1 or image_size < 8.
    """
    _check_image(channels, image_size)
    with _own_random_state(seed):
        return _named_backbone(name, channels, image_size, pretrained)


def conv4(
    channels: int = 1,
    image_size: int = 28,
    width: int = 64,
    stride: int = 2,
    groups: int | None = None,
) -> nn.Sequential:
    """Four blocks of 3 x 3 convolution (padding 1, no bias), group norm, ReLU, max-pool 2.

    The usual small network of few-shot learning (Vinyals et al. 2016, arXiv 1606.04080), changed
    in what federated training and small pictures ask for:

    - group norm instead of batch norm, since running statistics do not average over clients;
    - a first convolution of `stride` > 1 takes the place of the first pool; no pool where the map
      is down to 1 pixel;
    - no ReLU in the last block: its output meets a linear layer, and half of it would be gone
      (with default initialisation too, such a network was seen to collapse);
    - Kaiming initialisation (He et al. 2015, arXiv 1502.01852).

    Drawn from torch's global generator, as torch's own layers are; `build_backbone` gives the same
    network from a seed.

    Args:
        channels: of the pictures.
        image_size: H and W, 8 or more.
        width: channels of each block.
        stride: of the first convolution.
        groups: at most so many groups in a norm; must divide `width`. None: one per channel.
            Either way a group holds at least 8 values where `width` allows, so on maps below 3 x 3
            several channels share one: a norm over one value is constant 0, whatever the picture.

    Returns:
        A module from [B, channels, image_size, image_size] to [B, width * s * s], s the last map's
        side (28 gives s = 1, 105 gives 6).

    Raises:
        ConfigError: a size or number out of range.
    """
    _check_image(channels, image_size)
    if width < 1 or stride < 1:
        raise ConfigError(f"conv4: width and stride must be 1 or more, not {width} and {stride}")
    if groups is not None and (groups < 1 or width % groups):
        raise ConfigError(f"conv4: groups must divide the width {width}, {groups} does not")
    blocks: list[tuple[str, nn.Module]] = []
    inputs, side = channels, image_size
    for number in range(1, 5):
        step = stride if number == 1 else 1
        side = (side - 1) // step + 1
        convolution = nn.Conv2d(inputs, width, 3, stride=step, padding=1, bias=False)
        nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
        layers: list[tuple[str, nn.Module]] = [
            ("conv", convolution),
            (
                "norm",
                nn.GroupNorm(_groups(width, groups or width, -(-_LEAST_VALUES // side**2)), width),
            ),
        ]
        if number < 4:
            layers.append(("relu", nn.ReLU(inplace=True)))
        if step == 1 and side > 1:
            layers.append(("pool", nn.MaxPool2d(2)))
            side //= 2
        blocks.append((f"block{number}", nn.Sequential(OrderedDict(layers))))
        inputs = width
    blocks.append(("flatten", nn.Flatten()))
    return nn.Sequential(OrderedDict(blocks))


def replace_batch_norm(module: nn.Module) -> nn.Module:
    """A copy in which every BatchNorm2d (or SyncBatchNorm) is a GroupNorm; for new weights.

    Running statistics are neither gradients nor sums of them: averaged over clients of different
    classes they describe no client (Hsieh et al. 2020, arXiv 1910.00189; group norm: Wu and He
    2018, arXiv 1803.08494).

    Rule: 32 groups, or the largest divisor of the number of channels below. Affine weights, their
    `requires_grad`, eps and any activation inside the norm (timm's BatchNormAct2d) are kept. The
    outputs are other ones than before, so trained weights should use `freeze_batch_norm`.
    """
    return _replace_each(module, (nn.BatchNorm2d, nn.SyncBatchNorm), _group_norm_like)


def freeze_batch_norm(module: nn.Module) -> nn.Module:
    """A copy in which every batch norm (of any dimension) is a constant affine map.

    For trained weights: the outputs are those of the module in eval mode, bit for bit, whatever
    `.train()` says, since statistics and affine weights become buffers of a `FrozenBatchNorm`:
    saved with the model, not trained, not sent.

    Raises:
        ConfigError: a batch norm without running statistics: there is nothing to freeze.
    """
    return _replace_each(module, (_BatchNorm,), _frozen_like)


class FrozenBatchNorm(nn.Module):
    """y = (x - running_mean) / sqrt(running_var + eps) * weight + bias, all of it constant."""

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        running_mean: Tensor,
        running_var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.register_buffer("running_mean", running_mean)
        self.register_buffer("running_var", running_var)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """The same shape and dtype."""
        return nn.functional.batch_norm(
            x_BCHW,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            training=False,
            eps=self.eps,
        )


@dataclass(frozen=True, eq=False)
class FlatParameters:
    """A module's trainable parameters and their gradients, each as one vector.

    Every parameter is a view into `theta_P` and its gradient a view into `grad_P`, both float32,
    in the order of `named_parameters()`. So with `flat = flatten_(module)`::

        flat.theta_P.copy_(received)                   # load
        flat.grad_P.zero_()                            # instead of zero_grad()
        flat.theta_P.add_(flat.grad_P, alpha=-lr)      # a step of SGD

    Keep the views: `module.zero_grad()` (which sets gradients to None), `module.to(...)` and
    `copy.deepcopy` make or leave parameters of their own. Move and copy first, then flatten.
    """

    theta_P: Tensor
    grad_P: Tensor


def flatten_(module: nn.Module) -> FlatParameters:
    """Move a module's trainable parameters into one vector, in place; gradients become zero.

    Parameters that do not require grad are left out: what is frozen is neither sent nor returned.
    A parameter shared by several layers counts once. The values stay as they are, bit for bit.

    Returns:
        `FlatParameters` of float32 [P], on the device of the parameters.

    Raises:
        ConfigError: no trainable parameter, one that is not float32, or several devices.
    """
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    if not named:
        raise ConfigError("the model has no trainable parameter: every requires_grad is False")
    wrong = [f"{n} ({p.dtype})" for n, p in named if p.dtype != torch.float32]
    if wrong:
        raise ConfigError(
            f"trainable parameters must be float32; call .float() on the model: {_few(wrong)}"
        )
    devices = sorted({str(p.device) for _, p in named})
    if len(devices) > 1:
        raise ConfigError(f"trainable parameters lie on several devices: {', '.join(devices)}")
    theta_P = torch.cat([p.detach().reshape(-1) for _, p in named])
    grad_P = torch.zeros_like(theta_P)
    start = 0
    for _, parameter in named:
        end = start + parameter.numel()
        shape = parameter.shape
        parameter.data = theta_P[start:end].view(shape)
        parameter.grad = grad_P[start:end].view(shape)
        start = end
    return FlatParameters(theta_P, grad_P)


def embed_pixels(
    embedder: Embedder, pixels_NCHW: NDArray[np.uint8], batch_size: int = 256
) -> Tensor:
    """Embeddings of many pictures, in eval mode and without gradients.

    Reads `pixels_NCHW` (a memory map is fine) one batch at a time and runs on the embedder's
    device. The batch size changes results by rounding alone (below 1e-6).

    Args:
        embedder: left in the mode, training or not, it came in.
        pixels_NCHW: uint8 [N, C, H, W]; N may be 0.
        batch_size: pictures at a time, 1 or more.

    Returns:
        float32 [N, D] on the CPU.

    Raises:
        DataError: pixels of another shape or dtype.
        ConfigError: batch_size below 1.
    """
    spec = embedder.spec
    shape = (spec.channels, spec.image_size, spec.image_size)
    if pixels_NCHW.dtype != np.uint8 or pixels_NCHW.shape[1:] != shape:
        raise DataError(
            f"pixels must be uint8 [N, {', '.join(map(str, shape))}], "
            f"not {pixels_NCHW.dtype} {list(pixels_NCHW.shape)}"
        )
    if batch_size < 1:
        raise ConfigError(f"batch_size must be 1 or more, not {batch_size}")
    embeddings_ND = torch.empty(len(pixels_NCHW), spec.embedding_size)
    with _eval_mode(embedder), torch.no_grad():
        for start in range(0, len(pixels_NCHW), batch_size):
            # A copy: torch warns of read-only memory, and a memory map is best read in one go.
            block = np.array(pixels_NCHW[start : start + batch_size], order="C")
            pixels_BCHW = torch.from_numpy(block).to(embedder.mean.device)
            embeddings_ND[start : start + len(block)] = embedder(pixels_BCHW).cpu()
    return embeddings_ND


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
    _write_whole(folder / _WEIGHTS, save(state, metadata={"format": "pt"}))
    _write_whole(folder / _CONFIG, (text + "\n").encode())


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
    if spec.backbone is None and backbone is None:
        raise ConfigError(
            f"the model in {folder} was built around a module of its owner's, which no file can "
            "hold: pass one of the same structure, load_embedder(folder, backbone=...)"
        )
    if spec.backbone is not None and backbone is not None:
        raise ConfigError(
            f'the model in {folder} was built from the name "{spec.backbone}": leave backbone out'
        )
    try:
        state = load_file(folder / _WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"cannot read {folder / _WEIGHTS}: {error}") from error
    with _own_random_state(0):
        body = _body(spec.backbone or backbone, spec, pretrained=False)
        unit = [1.0] * spec.channels
        embedder = _assemble(body, spec, unit, unit)
    expected = embedder.state_dict()
    problems = [f"missing {n}" for n in expected if n not in state]
    problems += [f"left over {n}" for n in state if n not in expected]
    problems += [
        f"{n} is {state[n].dtype} {list(state[n].shape)}, expected {t.dtype} {list(t.shape)}"
        for n, t in expected.items()
        if n in state and (state[n].shape != t.shape or state[n].dtype != t.dtype)
    ]
    if problems:
        raise ConfigError(f"{folder / _WEIGHTS} does not fit the model: {_few(problems)}")
    embedder.load_state_dict(state)
    return embedder.eval()


# --- building ---------------------------------------------------------------------------------


def _check_image(channels: int, image_size: int) -> None:
    if channels < 1:
        raise ConfigError(f"channels must be 1 or more, not {channels}")
    if image_size < 8:
        raise ConfigError(f"image_size must be 8 or more, not {image_size}")


@contextmanager
def _own_random_state(seed: int) -> Iterator[None]:
    """Torch's CPU generator seeded for a while. (torch.manual_seed would seed GPUs for good.)"""
    if not 0 <= seed < 2**64:
        raise ConfigError(f"seed must lie between 0 and 2^64 - 1, not {seed}")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode for a while; every part gets back its own mode, not that of the whole."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def _body(backbone: str | nn.Module | None, spec: EmbedderSpec, pretrained: bool) -> nn.Module:
    if isinstance(backbone, nn.Module):
        return copy.deepcopy(backbone).cpu()
    return _named_backbone(str(backbone), spec.channels, spec.image_size, pretrained)


def _assemble(
    body: nn.Module, spec: EmbedderSpec, mean: Sequence[float], std: Sequence[float]
) -> Embedder:
    """Norms replaced or frozen, all checks, projection drawn from the global generator."""
    lazy = [n for n, p in body.named_parameters() if nn.parameter.is_lazy(p)]
    if lazy:
        raise ConfigError(f"the backbone has lazy layers: run it once on a picture ({_few(lazy)})")
    body = freeze_batch_norm(body) if spec.pretrained else replace_batch_norm(body)
    _refuse_batch_statistics(body)
    _refuse_dropout(body)
    features = _output_size(body, spec.channels, spec.image_size)
    _refuse_randomness(body, spec.channels, spec.image_size)
    projection: nn.Module = nn.Identity()
    if spec.backbone is not None or features != spec.embedding_size:
        projection = nn.Linear(features, spec.embedding_size, bias=False)
        nn.init.kaiming_normal_(projection.weight, nonlinearity="linear")
    return Embedder(body, projection, mean=mean, std=std, spec=spec)


def _named_backbone(name: str, channels: int, image_size: int, pretrained: bool) -> nn.Module:
    own = re.fullmatch(r"conv4(?:-([1-9]\d{0,4}))?", name)
    if own is not None:
        if pretrained:
            raise ConfigError(f'there are no pretrained weights for "{name}": only for timm models')
        return conv4(channels, image_size, width=int(own[1] or 64))
    if name.startswith("timm:"):
        return _timm_model(name.removeprefix("timm:"), channels, image_size, pretrained)
    near = difflib.get_close_matches(name, ["conv4", "conv4-32", "conv4-64"], n=1)
    hint = f'did you mean "{near[0]}"' if near else f'a timm model is written "timm:{name}"'
    raise ConfigError(f'unknown backbone "{name}": names are {NAMES}; {hint}')


def _timm_model(name: str, channels: int, image_size: int, pretrained: bool) -> nn.Module:
    timm = _import_timm()
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=5)
        hint = f"near it: {', '.join(near)}" if near else "timm.list_models() lists them"
        raise ConfigError(f'timm has no model "{name}"; {hint}')
    settings: dict[str, Any] = {"num_classes": 0, "in_chans": channels, "pretrained": pretrained}
    published = timm.get_pretrained_cfg(name)
    if published is not None and published.fixed_input_size:
        settings["img_size"] = image_size
    try:
        model: nn.Module = timm.create_model(name, **settings)
    except (RuntimeError, OSError, ValueError, TypeError, AssertionError) as error:
        what = "with its pretrained weights " if pretrained else ""
        raise ConfigError(
            f'timm cannot build "{name}" {what}for {channels} channels at {image_size} px: '
            f"{type(error).__name__}: {error}"
        ) from error
    return model


def _import_timm() -> Any:
    try:
        return importlib.import_module("timm")
    except ModuleNotFoundError as error:
        raise ConfigError(f'timm models need {error.name}: pip install "fedss[timm]"') from error
    except (RuntimeError, ImportError, AttributeError) as error:
        # A torchvision of another build fails with "operator torchvision::nms does not exist";
        # a second attempt in the same process with errors of a half imported package.
        if "torchvision" not in str(error):
            raise
        raise ConfigError(
            "timm cannot be imported because torchvision does not fit torch "
            f"{torch.__version__}: install both from the same build, from one index "
            f"(CPU or the same CUDA version; see pytorch.org/get-started). Python said: {error}"
        ) from error


def _pixel_statistics(
    body: nn.Module, channels: int, pretrained: bool
) -> tuple[list[float], list[float]]:
    """Mean and std the weights were trained with, if they say so; timm keeps them on the model."""
    published = getattr(body, "pretrained_cfg", None)
    if not pretrained or not isinstance(published, Mapping) or "mean" not in published:
        return [0.5] * channels, [0.5] * channels
    both = []
    for key in ("mean", "std"):
        values = [float(v) for v in published[key]]
        # timm sums the first layer's weights for grey pictures: their common statistics are the
        # average of the colours'.
        both.append(values if len(values) == channels else [sum(values) / len(values)] * channels)
    return both[0], both[1]


def _per_channel(
    given: Sequence[float] | None, channels: int, default: list[float], what: str
) -> list[float]:
    if given is None:
        return default
    values = [float(v) for v in given]
    low = 0.0 if what == "std" else -math.inf
    if len(values) != channels or not all(math.isfinite(v) and v > low for v in values):
        kind = "positive numbers" if what == "std" else "finite numbers"
        raise ConfigError(f"{what} must be {channels} {kind}, one per channel, not {values}")
    return values


# --- norms ------------------------------------------------------------------------------------


def _groups(channels: int, most: int, least_channels: int = 1) -> int:
    """The largest number of groups, up to `most`, of at least so many channels each; else 1."""
    for groups in range(min(most, channels // least_channels), 1, -1):
        if channels % groups == 0:
            return groups
    return 1


def _replace_each(
    module: nn.Module,
    kinds: tuple[type[_BatchNorm], ...],
    make: Callable[[_BatchNorm], nn.Module],
) -> nn.Module:
    """A deep copy with make(norm) in place of every norm of these kinds, shared ones shared."""
    module = copy.deepcopy(module)
    if isinstance(module, kinds):
        return make(module)
    made: dict[nn.Module, nn.Module] = {}
    for path, part in list(module.named_modules(remove_duplicate=False)):
        if isinstance(part, kinds):
            made[part] = made.get(part) or make(part)
            parent, _, leaf = path.rpartition(".")
            module.get_submodule(parent).register_module(leaf, made[part])
    return module


def _group_norm_like(norm: _BatchNorm) -> nn.Module:
    group_norm = nn.GroupNorm(
        _groups(norm.num_features, _MOST_GROUPS),
        norm.num_features,
        eps=norm.eps,
        affine=norm.affine,
    )
    if norm.affine:
        group_norm.weight = norm.weight
        group_norm.bias = norm.bias
    return _followed_by_children(group_norm, norm)


def _frozen_like(norm: _BatchNorm) -> nn.Module:
    if norm.running_mean is None or norm.running_var is None:
        raise ConfigError(
            "a batch norm without running statistics cannot be frozen: use pretrained=False, "
            "which replaces it by a group norm"
        )
    frozen = FrozenBatchNorm(
        norm.running_mean,
        norm.running_var,
        norm.weight.detach() if norm.affine else None,
        norm.bias.detach() if norm.affine else None,
        norm.eps,
    )
    return _followed_by_children(frozen, norm)


def _followed_by_children(new: nn.Module, norm: nn.Module) -> nn.Module:
    """timm's BatchNormAct2d applies layers of its own, drop and then act, after the norm."""
    children = [child for child in norm.children() if not isinstance(child, nn.Identity)]
    new = nn.Sequential(new, *children) if children else new
    return new.train(norm.training)


# --- checks -----------------------------------------------------------------------------------


def _refuse_batch_statistics(body: nn.Module) -> None:
    def keeps_statistics(part: nn.Module) -> bool:
        if isinstance(part, FrozenBatchNorm):
            return False
        # By the buffer and not by the class alone: timm has batch norms that inherit from none.
        buffers = {name for name, _ in part.named_buffers(recurse=False)}
        return "running_var" in buffers or isinstance(part, _BatchNorm)

    bad = [
        f"{path or 'the backbone'} ({type(part).__name__})"
        for path, part in body.named_modules()
        if keeps_statistics(part)
    ]
    if bad:
        raise ConfigError(
            f"the backbone keeps statistics of its batches: {_few(bad)}. They do not average over "
            "clients, and only BatchNorm2d can be replaced by itself: use LayerNorm or GroupNorm "
            "there"
        )


_ADVICE = (
    "Dropout draws from torch's global generator, so that results would depend on the number and "
    "order of workers: set its probability to 0 (a timm model: build it yourself with "
    "drop_rate=0, drop_path_rate=0 and pass the module)"
)


def _refuse_dropout(body: nn.Module) -> None:
    def active(part: nn.Module) -> bool:
        values = (getattr(part, n, 0) for n in ("p", "prob", "drop", "drop_prob", "drop_rate"))
        return any(isinstance(v, int | float) and v > 0 for v in values)

    bad = [
        f"{path or 'the backbone'} ({type(part).__name__})"
        for path, part in body.named_modules()
        if "drop" in type(part).__name__.lower() and active(part)
    ]
    if bad:
        raise ConfigError(f"the backbone has active dropout: {_few(bad)}. {_ADVICE}")


def _refuse_randomness(body: nn.Module, channels: int, image_size: int) -> None:
    """What no name gives away (functional dropout, attention dropout) moves the generator."""
    probe = copy.deepcopy(body).train()
    images_BCHW = torch.zeros(2, channels, image_size, image_size)
    before = torch.get_rng_state()
    try:
        with torch.no_grad():
            probe(images_BCHW)
    except Exception as error:
        raise ConfigError(
            f"the backbone fails in training mode on zeros {list(images_BCHW.shape)}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not torch.equal(before, torch.get_rng_state()):
        raise ConfigError(f"the backbone draws random numbers when it trains. {_ADVICE}")


def _output_size(body: nn.Module, channels: int, image_size: int) -> int:
    images_BCHW = torch.zeros(1, channels, image_size, image_size)
    takes = f"must map float32 {list(images_BCHW.shape)} to [1, features]"
    with _eval_mode(body), torch.no_grad():
        try:
            features_BF = body(images_BCHW)
        except Exception as error:
            raise ConfigError(
                f"the backbone {takes}, but fails: {type(error).__name__}: {error}"
            ) from error
    if not isinstance(features_BF, Tensor):
        raise ConfigError(f"the backbone {takes}, but gives a {type(features_BF).__name__}")
    if features_BF.ndim != 2 or len(features_BF) != 1 or features_BF.shape[1] < 1:
        pool = ": end it with pooling and Flatten" if features_BF.ndim > 2 else ""
        raise ConfigError(f"the backbone {takes}, but gives {list(features_BF.shape)}{pool}")
    if features_BF.dtype != torch.float32:
        raise ConfigError(f"the backbone {takes} in float32, but gives {features_BF.dtype}")
    return int(features_BF.shape[1])


# --- files ------------------------------------------------------------------------------------


def _read_spec(path: Path) -> EmbedderSpec:
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    if not isinstance(description, dict) or description.get("format") != _FORMAT:
        raise ConfigError(f'{path} does not describe a model: its "format" must be "{_FORMAT}"')
    try:
        return EmbedderSpec(**description["embedder"])
    except (KeyError, TypeError) as error:
        raise ConfigError(f'{path}: "embedder" does not describe a model: {error}') from error


def _write_whole(path: Path, content: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files only their owner can read; a model is for sharing.
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _few(items: Sequence[str], most: int = 8) -> str:
    rest = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + rest
