"""Images as programs hold them, open or as numbers, made into the pixels that files become."""

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fedss.data.decoding import is_colourless, open_image, pixels_of, upright
from fedss.errors import DataError

_CHANNELS = (1, 3)
_EXPECTED = "expected images as arrays or tensors, uint8 or float from 0 to 1"


def to_numpy(values: Any) -> np.ndarray:
    """An array or a tensor as an array; a tensor on the CPU shares its memory with it."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        # numpy has no such numbers.
        values = values.float() if values.dtype == torch.bfloat16 else values
        return np.asarray(values.numpy())
    return np.asarray(values)


def as_nchw(array: np.ndarray) -> np.ndarray:
    """A view of images [N, C, H, W], [N, H, W, C] or [N, H, W] as [N, C, H, W].

    Raises:
        DataError: none of these, with C = 1 or 3.
    """
    shape = array.shape
    if len(shape) == 3:
        return array[:, None]
    if len(shape) == 4 and shape[1] in _CHANNELS:
        return array
    if len(shape) == 4 and shape[3] in _CHANNELS:
        return array.transpose(0, 3, 1, 2)
    raise DataError(
        f"images: expected [N, C, H, W], [N, H, W, C] or [N, H, W] with C = 1 or 3, got "
        f"{list(shape)}"
        + ("; lay RGBA on a colour first" if 4 in (shape[1:2] + shape[-1:]) else "")
    )


def to_uint8(array: np.ndarray) -> np.ndarray:
    """Pixels as uint8; float ones from 0 to 1 become 0 to 255, rounded, and uint8 stays as it is.

    Raises:
        DataError: other types, or floats out of that range.
    """
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return np.where(array, np.uint8(255), np.uint8(0))
    if array.dtype.kind != "f":
        raise DataError(
            f"{_EXPECTED}; got {array.dtype}: where they are 0 to 255, convert them to uint8"
        )
    low, high = (float(array.min()), float(array.max())) if array.size else (0.0, 0.0)
    if not 0.0 <= low <= high <= 1.0:  # NaN is neither
        raise DataError(
            f"{_EXPECTED}; got {array.dtype} from {low:g} to {high:g}. Leave out what normalizes "
            "(the network does it itself), or divide what is 0 to 255 by 255"
        )
    scaled: np.ndarray = np.rint(array * np.asarray(255, array.dtype))
    return scaled.astype(np.uint8)


def read_image(image: object, image_size: int | None, channels: int | None) -> np.ndarray:
    """One image as uint8 [C, H, H], as ``decode`` makes it of a file.

    Args:
        image: A Pillow image, which stays as it is; an array or tensor [C, H, W], [H, W, C] or
            [H, W]; encoded bytes; a file; or a dict with ``bytes`` or ``path``, as Hugging Face
            keeps images that are not decoded.
        image_size: None: the image's own side, if it is square.
        channels: None: 1 for a grayscale image, else 3.

    Raises:
        DataError: Something else, or no square image where it has to be one.
        OSError, ValueError or others of Pillow's: an image that cannot be read.
    """
    if isinstance(image, np.ndarray | torch.Tensor):
        array: np.ndarray = to_uint8(as_nchw(to_numpy(image)[None]))[0]
        side = image_size or array.shape[1]
        if array.shape[1:] == (side, side) and channels in (None, len(array)):
            return array
        image = Image.fromarray(array[0] if len(array) == 1 else array.transpose(1, 2, 0).copy())
    with _opened(image) as opened:
        own_channels = 1 if is_colourless(opened) else 3
        with upright(opened, image_size or max(opened.size)) as seen:
            width, height = seen.size
            if image_size is None and width != height:
                raise DataError(
                    f"an image of {width} x {height} pixels, where none but square ones of one "
                    "size need no image_size: say image_size=, such as 64, and each is cut to its "
                    "central square and resized"
                )
            return pixels_of(seen, image_size or width, channels or own_channels)


@contextmanager
def _opened(image: object) -> Iterator[Image.Image]:
    if isinstance(image, Image.Image):
        # upright() closes what it gets, and this one is the caller's.
        yield image.copy()
        return
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytes | bytearray):
        image = io.BytesIO(image)
    if not isinstance(image, str | Path | io.BytesIO):
        raise DataError(
            "expected an image: of Pillow, an array or tensor, encoded bytes or a file; got a "
            f"{type(image).__name__}"
        )
    with open_image(image) as opened:
        yield opened
