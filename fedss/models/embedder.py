"""Pixels to unit vectors.

Shape suffixes: B images of a batch, N images in all, C channels, H height, W width,
F features of the backbone, D embedding size.
"""

import copy
import reprlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import get_args, get_type_hints

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedss.choices import BatchNormRule, ForwardPrecision
from fedss.errors import ConfigError, DataError
from fedss.models.backbones import named_backbone, own_backbone, own_random_state
from fedss.models.border import Border
from fedss.models.checks import (
    check_image,
    output_size,
    probe_images,
    refuse_batch_statistics,
    refuse_broken_numbers,
    refuse_cut_patches,
    refuse_dropout,
    refuse_hidden_state,
    refuse_lazy_layers,
    refuse_trained_norms,
)
from fedss.models.frozen import freeze_
from fedss.models.layout import channels_last, channels_last_pays
from fedss.models.norms import LEAST_VALUES, freeze_batch_norm, replace_batch_norm
from fedss.models.weights import load_weights_, weights_fingerprint
from fedss.models.whitening import Whitening
from fedss.own_code import find_code, is_code

MOST_FEATURES = 2**20
"""Numbers of the longest embedding."""


@dataclass(frozen=True)
class EmbedderSpec:
    """What it takes to build an `Embedder` of the same structure again.

    `backbone` is the name given to `build_embedder`, or None for a module of the user's own; `code`
    is the SHA-256 of the file that the name leads to, where it is that of own code.
    `pretrained` says that batch norms were frozen rather than replaced; rebuilding downloads
    nothing. `weights` is the SHA-256 of the file that trained weights came from, if they came from
    one, and `trainable` which part trains. `group_values` is the least number of values in a group
    of a norm that took the place of a batch norm (`replace_batch_norm`). `whitened` says that
    features are whitened (`Whitening`) before the projection, which then begins as the identity.
    """

    backbone: str | None
    channels: int
    image_size: int
    embedding_size: int
    pretrained: bool = False
    weights: str | None = None
    trainable: str = "all"
    group_values: int = LEAST_VALUES
    code: str | None = None
    whitened: bool = False

    @property
    def is_own(self) -> bool:
        """Whether the backbone is a module of the user's own."""
        return self.backbone is None or is_code(self.backbone)

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(EmbedderSpec).items():
            value, kinds = getattr(self, name), get_args(hint) or (hint,)
            if type(value) not in kinds:
                expected = " or ".join("null" if k is NoneType else k.__name__ for k in kinds)
                raise ConfigError(f"{name}: expected {expected}, got {reprlib.repr(value)}")
        for name in ("embedding_size", "group_values"):
            value = getattr(self, name)
            if not 1 <= value <= MOST_FEATURES:
                raise ConfigError(f"{name} must be 1 to {MOST_FEATURES}, not {reprlib.repr(value)}")
        check_image(self.channels, self.image_size)


class Embedder(nn.Module):
    """Pixels to unit vectors: h = g / ‖g‖, g = A w(f_θ((x - mean) / std)).

    f is the backbone, w a frozen whitening of its features (`Whitening`) or nothing, A the
    projection without bias (a bias would move all embeddings towards one common direction), or
    nothing where the backbone's own size is wanted. `mean` and `std` [C] are
    buffers: saved with the model, not trained, not sent. With `channels_last` the backbone gets its
    images in that layout, which changes results by rounding alone. Where ``precision`` is set to
    ``"bfloat16"``, backbone and projection run under torch's autocast; weights, their gradients
    and the division by ‖g‖ stay in float32. With a ``border`` it takes activations, too, float16
    [B, *border.shape] as `activations` gives them, in place of pixels.

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
        channels_last: bool = False,
        whitening: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.channels_last = channels_last
        self.precision: ForwardPrecision = "float32"
        self.border: Border | None = None
        self.backbone = backbone
        self.whitening = whitening or nn.Identity()
        self.projection = projection
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32))

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Unit embeddings, float32 [B, D]; a row of zeros before normalizing stays zero.

        Args:
            pixels_BCHW: uint8 [B, C, H, W] in 0 … 255, or floating point in 0 … 1; H = W = the
                image size the model was built for.

        Raises:
            ValueError: another shape or dtype.
        """
        with self._autocast():
            g_BD = self.projection(self.whitening(self._backbone_features(pixels_BCHW)))
        return nn.functional.normalize(g_BD.float(), dim=1)

    def features(self, pixels_BCHW: Tensor) -> Tensor:
        """What the backbone gives, float32 [B, F]; arguments as for `forward`."""
        with self._autocast():
            return self._backbone_features(pixels_BCHW).float()

    def activations(self, pixels_BCHW: Tensor) -> Tensor:
        """What the frozen part gives for pixels, float16 [B, *border.shape]."""
        assert self.border is not None
        with self._autocast():
            return self.border.frozen(self._scaled(pixels_BCHW)).half()

    def _backbone_features(self, pixels_BCHW: Tensor) -> Tensor:
        if self.border is not None and pixels_BCHW.dtype == torch.float16:
            activations_BX = pixels_BCHW.float()
            if self.channels_last and activations_BX.ndim == 4:
                activations_BX = channels_last(activations_BX)
            return self.border.trained(activations_BX)
        features_BF: Tensor = self.backbone(self._scaled(pixels_BCHW))
        return features_BF

    def _scaled(self, pixels_BCHW: Tensor) -> Tensor:
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
        return channels_last(scaled_BCHW) if self.channels_last else scaled_BCHW

    def _autocast(self) -> AbstractContextManager[object]:
        low = self.precision == "bfloat16"
        return torch.autocast(self.mean.device.type, torch.bfloat16) if low else nullcontext()


def build_embedder(
    backbone: str | nn.Module,
    *,
    channels: int,
    image_size: int,
    embedding_size: int,
    seed: int,
    pretrained: bool = False,
    weights: str | Path | None = None,
    trainable: str = "all",
    batch_norm: BatchNormRule = "auto",
    pixel_mean: Sequence[float] | None = None,
    pixel_std: Sequence[float] | None = None,
    whitened: bool = False,
) -> Embedder:
    """An embedder fit for federated training.

    Batch norms are replaced by group norms (`replace_batch_norm`), or frozen if `pretrained` or
    with `weights` (`freeze_batch_norm`), unless `batch_norm` says which. A projection to
    `embedding_size` follows every named backbone, and a module of your own unless its output has
    that size already.

    Args:
        backbone: "conv4", "conv4-<width>" (see `conv4`), "timm:<model>" (any image model of timm:
            `pip install "fedss[timm]"`), or a module of your own that maps float32 [B, C, H, W] to
            [B, features]. Yours is copied to the CPU, never changed. Or "package.module:function",
            which makes one (`own_backbone`): that imports the module.
        channels: C of the images.
        image_size: H and W of the images.
        embedding_size: D.
        seed: of the initial weights; torch's global random state is left as it was.
        pretrained: download weights for a timm model, and scale pixels as they expect (otherwise
            to -1 … 1); for a module of your own: it holds trained weights, so keep its batch
            norms' statistics, and scale pixels as its `pretrained_cfg` says if it is timm's.
        weights: a file with weights of a timm model, in place of the download; see
            `fedss.models.weights.load_weights_`. All else is as with `pretrained`.
        trainable: "all"; "head": the projection alone; or "last-K": the last K blocks of the
            backbone (`fedss.models.frozen.blocks`) and the projection. What does not train is
            neither sent nor returned.
        batch_norm: "freeze": batch norms keep their statistics and learn nothing; "replace": group
            norms take their place; "auto": the former for trained weights (`pretrained`,
            `weights`), the latter for new ones.
        pixel_mean: of pixels from 0 to 1, as the backbone expects them: C numbers, or one for all
            channels. For gray images the average of three is taken. None: what `pretrained` and
            `weights` state, else 0.5.
        pixel_std: their standard deviation, as `pixel_mean`; one is given with the other.
        whitened: whiten features before the projection, which begins as the identity. The
            whitening's statistics are those of the training images: `Whitening.set_`.

    Raises:
        ConfigError: a module of your own whose batch norms have been trained, with neither
            `pretrained` nor a choice of `batch_norm`; an unknown name; no weights to be had, or
            those of another architecture; no such part to train; a module whose output is not
            [B, features], that draws random numbers (dropout), changes its buffers in training or
            keeps batch statistics which cannot be replaced; a size or number out of range.
    """
    trained = pretrained or weights is not None
    if isinstance(backbone, nn.Module):
        refuse_lazy_layers(backbone)
    name = backbone if isinstance(backbone, str) else ""
    frozen = batch_norm == "freeze" or (batch_norm == "auto" and trained)
    spec = EmbedderSpec(
        backbone=name or None,
        channels=channels,
        image_size=image_size,
        embedding_size=embedding_size,
        pretrained=frozen,
        weights=None if weights is None else weights_fingerprint(weights),
        trainable=trainable,
        code=find_code(name).sha256 if is_code(name) else None,
        whitened=whitened,
    )
    _check_statistics(pixel_mean, pixel_std, channels)
    untrained = spec.is_own and batch_norm == "auto" and not trained
    embedder = assemble(backbone, spec, seed, pretrained and weights is None, weights, untrained)
    refuse_cut_patches(embedder.backbone, image_size)
    published = getattr(embedder.backbone, "pretrained_cfg", None)
    if pixel_mean is None and (trained or frozen) and isinstance(published, Mapping):
        pixel_mean, pixel_std = published.get("mean"), published.get("std")
    if pixel_mean is not None and pixel_std is not None:
        for buffer, values in ((embedder.mean, pixel_mean), (embedder.std, pixel_std)):
            # timm sums the first layer's weights for gray images: their common statistics are the
            # average of the colours'.
            own = values if len(values) == channels else [sum(values) / len(values)] * channels
            buffer.copy_(torch.tensor(own))
    return embedder


def assemble(
    backbone: str | nn.Module,
    spec: EmbedderSpec,
    seed: int,
    download: bool,
    weights: str | Path | None = None,
    untrained: bool = False,
) -> Embedder:
    """`build_embedder` from a description; timm's weights are downloaded, read or drawn.

    `untrained`: batch norms that have been trained are refused.
    """
    if weights is not None and not (spec.backbone or "").startswith("timm:"):
        raise ConfigError(
            f"weights: only timm models take a file, expected a backbone timm:<model>, got "
            f"{spec.backbone or 'a module of your own: load it yourself, and set pretrained'}"
        )
    with own_random_state(seed):
        if isinstance(backbone, nn.Module):
            body = copy.deepcopy(backbone).cpu()
        elif is_code(backbone):
            body = own_backbone(backbone, spec.channels, spec.image_size, spec.embedding_size).cpu()
        else:
            body = named_backbone(backbone, spec.channels, spec.image_size, download)
        if weights is not None:
            load_weights_(body, weights, spec.channels)
        refuse_lazy_layers(body)
        if untrained:
            refuse_trained_norms(body)
        refuse_broken_numbers(body)
        freeze_(body, spec.trainable)
        refuse_dropout(body)
        features = output_size(body, spec.channels, spec.image_size)
        images_BCHW = probe_images(spec.channels, spec.image_size)
        if not spec.is_own:
            # Some models lay out constants by the size of the first images that they see.
            with torch.no_grad():
                body.eval()(images_BCHW)
            body.train()
        if spec.pretrained:
            body = freeze_batch_norm(body)
        else:
            body = replace_batch_norm(body, images_BCHW, spec.group_values)
        refuse_batch_statistics(body)
        refuse_hidden_state(body, spec.channels, spec.image_size)
        projection: nn.Module = nn.Identity()
        whitening = Whitening(features, spec.embedding_size) if spec.whitened else None
        if whitening is not None:
            size = whitening.axes_FK.shape[1]
            projection = nn.Linear(size, spec.embedding_size, bias=False)
            nn.init.eye_(projection.weight)
        elif not spec.is_own or features != spec.embedding_size:
            projection = nn.Linear(features, spec.embedding_size, bias=False)
            nn.init.kaiming_normal_(projection.weight, nonlinearity="linear")
        elif spec.trainable == "head":
            raise ConfigError(
                "trainable: the backbone gives embedding_size numbers itself, so there is no "
                "projection, and with head nothing would train; choose another embedding_size, or "
                "last-<number>"
            )
        layout = channels_last_pays(body, spec.channels, spec.image_size)
        half = [0.5] * spec.channels
        return Embedder(
            body,
            projection,
            mean=half,
            std=half,
            spec=spec,
            channels_last=layout,
            whitening=whitening,
        )


def _check_statistics(
    mean: Sequence[float] | None, std: Sequence[float] | None, channels: int
) -> None:
    if mean is None and std is None:
        return
    for name, values, least, expected in (
        ("pixel_mean", mean, 0.0, "0 to 1: of pixels from 0 to 1, not to 255"),
        ("pixel_std", std, 1e-6, "above 0 and up to 1: of pixels from 0 to 1, not to 255"),
    ):
        if values is None or len(values) not in {1, channels, 3 if channels == 1 else channels}:
            came = "none" if values is None else f"{len(values)}: {list(values)}"
            raise ConfigError(
                f"{name}: pixel_mean and pixel_std go together; expected {channels} numbers, one "
                f"per channel, or one for all, got {came}"
            )
        if not all(least <= value <= 1 for value in values):
            raise ConfigError(f"{name}: expected numbers {expected}; got {list(values)}")


@torch.no_grad()
def embed_pixels(
    embedder: Embedder, pixels_NCHW: NDArray[np.uint8], batch_size: int = 256
) -> Tensor:
    """Embeddings of many images, float32 [N, D] on the CPU, in eval mode and without gradients.

    Reads `pixels_NCHW`, uint8, or float16 activations (a memory map is fine), one batch at a time
    and runs on the embedder's device. The batch size changes results by rounding alone (below
    1e-6).

    Raises:
        DataError: pixels of another shape or dtype.
        ConfigError: batch_size below 1.
    """
    spec, border = embedder.spec, embedder.border
    shape: tuple[int, ...] = (spec.channels, spec.image_size, spec.image_size)
    dtype: type[np.generic] = np.uint8
    if border is not None and pixels_NCHW.dtype == np.float16:
        shape, dtype = border.shape, np.float16
    if pixels_NCHW.dtype != dtype or pixels_NCHW.shape[1:] != shape:
        raise DataError(
            f"pixels must be uint8 [N, {', '.join(map(str, shape))}], "
            f"not {pixels_NCHW.dtype} {list(pixels_NCHW.shape)}"
        )
    if batch_size < 1:
        raise ConfigError(f"batch_size must be 1 or more, not {batch_size}")
    embeddings_ND = torch.empty(len(pixels_NCHW), spec.embedding_size)
    # Every part gets back its own mode, not that of the whole.
    modes = [(part, part.training) for part in embedder.modules()]
    embedder.eval()
    try:
        for start in range(0, len(pixels_NCHW), batch_size):
            # A copy: torch warns of read-only memory, and a memory map is best read in one go.
            block = np.array(pixels_NCHW[start : start + batch_size], order="C")
            pixels_BCHW = torch.from_numpy(block).to(embedder.mean.device)
            embeddings_ND[start : start + len(block)] = embedder(pixels_BCHW).cpu()
    finally:
        for part, training in modes:
            part.training = training
    return embeddings_ND
