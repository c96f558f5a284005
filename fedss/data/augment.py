"""Changes of training images at the client: parameters are drawn first, then applied.

All of a client's parameters of a round come from one generator of its own, and applying them draws
nothing. So what a client sees in a round depends on seed, round and client alone: not on threads,
engine, or who trains beside it. torchvision's own random transforms draw from torch's global
generator, which threads share; its kernels draw nothing.

Shape suffixes: B images, C channels, H height, W width, Q their pixels, A parameters of an image.
"""

import io
import math
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedss.errors import ConfigError
from fedss.own_code import import_code, is_code
from fedss.seeds import generator
from fedss.text import one_line

_PREVIEWED, _VERSIONS = 8, 5


@dataclass(frozen=True)
class Augmentation:
    """One way to change images.

    Each parameter of an image is drawn uniformly between the ends of its range. ``apply`` takes
    images uint8 [B, C, H, W] on the CPU, H = W, and parameters float64 [B, A] to changed images of
    the same shape; image and parameters decide each result.
    """

    ranges: tuple[tuple[float, float], ...]
    apply: Callable[[Tensor, np.ndarray], Tensor]


def draw_parameters(augmentation: Augmentation, count: int, rng: np.random.Generator) -> np.ndarray:
    """Parameters for so many images, float64 [count, A]."""
    low_A, high_A = np.array(augmentation.ranges).T
    return rng.uniform(low_A, high_A, (count, len(augmentation.ranges)))


def change(augmentation: Augmentation, pixels: Tensor, drawn: np.ndarray) -> Tensor:
    """Changed images uint8 [..., C, H, W], by their parameters [..., A]."""
    flat_BCHW = pixels.reshape(-1, *pixels.shape[-3:])
    changed_BCHW = augmentation.apply(flat_BCHW, drawn.reshape(-1, drawn.shape[-1]))
    return changed_BCHW.view(pixels.shape)


def preview(augmentation: Augmentation, pixels_NCHW: np.ndarray, seed: int) -> bytes:
    """Training images, each with what clients may make of it, for the report.

    A file of numpy's (npz) with ``pixels``, uint8 [8, 1 + 5, C, H, W], the image itself first;
    fewer where there are fewer images.
    """
    rng = generator(seed, "augment preview")
    chosen = np.sort(rng.permutation(len(pixels_NCHW))[:_PREVIEWED])
    before_B1CHW = pixels_NCHW[chosen][:, None]
    drawn_BA = draw_parameters(augmentation, len(chosen) * _VERSIONS, rng)
    pixels_BCHW = torch.from_numpy(before_B1CHW.repeat(_VERSIONS, axis=1))
    after = change(augmentation, pixels_BCHW, drawn_BA).numpy()
    buffer = io.BytesIO()
    np.savez_compressed(buffer, pixels=np.concatenate([before_B1CHW, after], axis=1))
    return buffer.getvalue()


def _photos(pixels_BCHW: Tensor, drawn_BA: np.ndarray) -> Tensor:
    """A part of the image, resized to the whole; perhaps mirrored; other light and colour.

    What torchvision's kernels of these names compute, bit for bit, without its compiled library,
    which has to be of the same build as torch.
    """
    side = pixels_BCHW.shape[-1]
    changed: list[Tensor] = []
    for pixels_CHW, drawn in zip(pixels_BCHW, drawn_BA.tolist(), strict=True):
        area, log_ratio, x, y, mirrored, brightness, contrast, saturation = drawn
        width = min(side, round(side * math.sqrt(area * math.exp(log_ratio))))
        height = min(side, round(side * math.sqrt(area / math.exp(log_ratio))))
        top, left = int(y * (side - height + 1)), int(x * (side - width + 1))
        part_CHW = pixels_CHW[:, top : top + height, left : left + width]
        if part_CHW.shape != pixels_CHW.shape:
            (part_CHW,) = torch.nn.functional.interpolate(
                part_CHW[None], (side, side), mode="bilinear", antialias=True
            )
        if mirrored < 0.5:
            part_CHW = part_CHW.flip(-1)
        # In fractions, so that three steps are rounded once.
        part_CHW = (part_CHW / 255).mul_(brightness).clamp_(0, 1)
        part_CHW = _blend(part_CHW, _gray(part_CHW).mean(), contrast)
        changed.append(_blend(part_CHW, _gray(part_CHW), saturation))
    return _bytes(torch.stack(changed) * 255)


def _gray(pixels_CHW: Tensor) -> Tensor:
    """Luma (ITU-R BT.601), [1, H, W]; gray images as they are."""
    if len(pixels_CHW) == 1:
        return pixels_CHW
    red_HW, green_HW, blue_HW = pixels_CHW.unbind()
    return (red_HW * 0.2989).add_(green_HW, alpha=0.587).add_(blue_HW, alpha=0.114)[None]


def _blend(pixels_CHW: Tensor, other: Tensor, share: float) -> Tensor:
    """``share`` of the first, the rest of the second; a share above 1 leads away from it."""
    return (pixels_CHW * share).add_(other, alpha=1 - share).clamp_(0, 1)


def _drawings(pixels_BCHW: Tensor, drawn_BA: np.ndarray) -> Tensor:
    """Turned, moved, scaled and sheared, on the image's own background.

    What ``affine`` of torchvision does image by image, in one call: on small drawings the
    calls would cost a third of the training.
    """
    side = pixels_BCHW.shape[-1]
    angle_B, x_B, y_B, log_scale_B, shear_x_B, shear_y_B = drawn_BA.T
    one_B, zero_B = np.ones(len(drawn_BA)), np.zeros(len(drawn_BA))
    cos_B, sin_B = np.cos(np.radians(angle_B)), np.sin(np.radians(angle_B))
    turn_B22 = _matrices(cos_B, -sin_B, sin_B, cos_B)
    along_y_B22 = _matrices(one_B, zero_B, -np.tan(np.radians(shear_y_B)), one_B)
    along_x_B22 = _matrices(one_B, -np.tan(np.radians(shear_x_B)), zero_B, one_B)
    scale_B11 = np.exp(log_scale_B)[:, None, None]
    # From each new pixel back to where it comes from; the image reaches from -1 to 1.
    back_B22 = np.linalg.inv(scale_B11 * turn_B22 @ along_y_B22 @ along_x_B22)
    from_B21 = -back_B22 @ np.stack([2 * x_B, 2 * y_B], axis=1)[..., None]
    to_xy = np.meshgrid(*[(np.arange(side) + 0.5) / side * 2 - 1] * 2)
    grid_B2Q = back_B22 @ np.stack(to_xy).reshape(2, -1) + from_B21
    grid_BHW2 = grid_B2Q.transpose(0, 2, 1).reshape(-1, side, side, 2).astype(np.float32)
    # What comes in from outside becomes 0: so the background is to be 0 meanwhile.
    background_BC11 = _background(pixels_BCHW)
    moved_BCHW = torch.nn.functional.grid_sample(
        pixels_BCHW.float() - background_BC11, torch.from_numpy(grid_BHW2), align_corners=False
    )
    return _bytes(moved_BCHW + background_BC11)


def _matrices(a_B: np.ndarray, b_B: np.ndarray, c_B: np.ndarray, d_B: np.ndarray) -> np.ndarray:
    """[[a, b], [c, d]] for each, float64 [B, 2, 2]."""
    return np.stack([a_B, b_B, c_B, d_B], axis=1).reshape(-1, 2, 2)


def _background(pixels_BCHW: Tensor) -> Tensor:
    """The median of the pixels on the four edges, float32 [B, C, 1, 1]."""
    rows, columns = pixels_BCHW[..., [0, -1], :], pixels_BCHW[..., [0, -1]]
    edges_BCE = torch.cat([rows.flatten(2), columns.flatten(2)], dim=2)
    return edges_BCE.median(dim=2).values.float()[..., None, None]


def _bytes(pixels_BCHW: Tensor) -> Tensor:
    return pixels_BCHW.round_().clamp_(0, 255).to(torch.uint8)


AUGMENTATIONS = {
    "photos": Augmentation(
        (
            (0.5, 1.0),  # area of the part, as a share of the image's
            (math.log(3 / 4), math.log(4 / 3)),  # its width to its height
            (0.0, 1.0),  # where it lies from left to right
            (0.0, 1.0),  # and from top to bottom
            (0.0, 1.0),  # below a half: mirrored
            (0.8, 1.2),  # brightness
            (0.8, 1.2),  # contrast
            (0.8, 1.2),  # saturation
        ),
        _photos,
    ),
    "drawings": Augmentation(
        (
            (-10.0, 10.0),  # turned by so many degrees
            (-0.07, 0.07),  # moved to the right, as a share of the side
            (-0.07, 0.07),  # and down
            (math.log(0.85), math.log(1.15)),  # scaled
            (-8.0, 8.0),  # sheared by so many degrees along x
            (-8.0, 8.0),  # and y
        ),
        _drawings,
    ),
}
"""By name. Drawings are never mirrored: many characters are others in a mirror."""


_NUMBERS = 2.0**53  # integers below are exact as floats
# Generators are the process's, and workers are threads.
_GENERATORS = threading.Lock()


def find_augmentation(name: str) -> Augmentation | None:
    """An augmentation by its name in ``AUGMENTATIONS``, or that of own code; None for ``none``.

    Own code is anything that takes an image, uint8 [C, H, W] on the CPU, and gives another of the
    same shape, as transforms of ``torchvision.transforms.v2`` do. What it draws from the generators
    of torch (on the CPU), NumPy and Python's ``random`` depends on seed, round and client alone:
    they are seeded for each image with a number of its own, one thread at a time.

    Raises:
        ConfigError: own code that is not there, or cannot be called.
    """
    if not is_code(name):
        return AUGMENTATIONS.get(name)
    transform = import_code(name)
    if not callable(transform) or isinstance(transform, type):
        raise ConfigError(
            f"augment {name}: expected what takes an image, uint8 [C, H, W], and gives one, got "
            f"{'the class ' if isinstance(transform, type) else ''}"
            f"{getattr(transform, '__name__', type(transform).__name__)}; name an object of it"
        )
    return Augmentation(((0.0, _NUMBERS),), partial(_own, name, transform))


def _own(
    name: str, transform: Callable[[Tensor], Any], pixels_BCHW: Tensor, drawn_BA: np.ndarray
) -> Tensor:
    changed: list[Tensor] = []
    with _own_generators() as seed:
        for pixels_CHW, (number,) in zip(pixels_BCHW, drawn_BA.tolist(), strict=True):
            seed(int(number))
            try:
                result = transform(pixels_CHW.clone())
            except Exception as error:
                raise ConfigError(f"augment {name} fails: {one_line(error)}") from error
            if (
                not isinstance(result, Tensor)
                or result.dtype != torch.uint8
                or result.shape != pixels_CHW.shape
            ):
                got = type(result).__name__
                if isinstance(result, Tensor):
                    got = f"{str(result.dtype).removeprefix('torch.')} {list(result.shape)}"
                raise ConfigError(
                    f"augment {name}: expected an image as it came, uint8 "
                    f"{list(pixels_CHW.shape)}, got {got}; leave out what normalizes (the network "
                    "does it itself) or resizes to another size"
                )
            changed.append(result.as_subclass(Tensor))
    return torch.stack(changed)


@contextmanager
def _own_generators() -> Iterator[Callable[[int], None]]:
    """A function that seeds the process's generators, which are afterwards as they were."""

    def seed(number: int) -> None:
        torch.default_generator.manual_seed(number)
        np.random.seed(number % 2**32)  # noqa: NPY002  Others draw from it.
        random.seed(number)

    with _GENERATORS:
        before = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
        try:
            yield seed
        finally:
            torch.set_rng_state(before[0])
            np.random.set_state(before[1])  # noqa: NPY002
            random.setstate(before[2])


def check_augmentation(name: str, shape: tuple[int, ...]) -> None:
    """Try own code on two images of noise, uint8 [C, H, W].

    Raises:
        ConfigError: it is none, or what it gives does not follow from the generators.
    """
    augmentation = find_augmentation(name)
    if augmentation is None or not is_code(name):
        return
    rng = generator(0, "augment check")
    pixels_BCHW = torch.from_numpy(rng.integers(0, 256, (2, *shape), np.uint8))
    drawn_BA = draw_parameters(augmentation, 2, rng)
    first, again = (change(augmentation, pixels_BCHW, drawn_BA) for _ in range(2))
    if not torch.equal(first, again):
        raise ConfigError(
            f"augment {name}: gives another image when it is asked again, with torch's, NumPy's "
            "and Python's generators as before; let it draw from one of these, and remember nothing"
        )
