"""An image file as pixels: opened with care, upright, cut to its central square."""

import io
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    PHOTOMETRIC_INTERPRETATION,
    PLANAR_CONFIGURATION,
    SAMPLEFORMAT,
    TiffImageFile,
)

from fedss.files import START_LENGTH, what_begins

MAX_PIXELS = 2**27
"""Pixels of the largest image that is decoded: half a gigabyte, at Pillow's 4 bytes a pixel."""

_COLOURLESS = ("1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N")
_BANDS = ("R", "C")  # how Pillow names the first channel of planes that are not compressed
# ISO/IEC 23008-12, annex B: what a HEIC file begins with, after the four bytes of a length.
_HEIC = tuple(b"ftyp" + brand for brand in (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1"))
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

# Pixels of images in memory, of all threads; and a word that there are fewer.
_held = 0
_released = threading.Condition()


class PixelLimitError(ValueError):
    """An image of more pixels than are decoded."""


def open_image(file: str | Path | BinaryIO, most_pixels: int | None = None) -> ImageFile.ImageFile:
    """``PIL.Image.open`` for files that nobody has looked at; pixels are not decoded yet.

    Raises:
        PixelLimitError: more than ``most_pixels``, by default and at most MAX_PIXELS.
        ValueError: PostScript.
        ImportError: HEIC, and pi-heif is not installed.
        OSError, SyntaxError or others of Pillow's: no image.
    """
    most_pixels = MAX_PIXELS if most_pixels is None else most_pixels
    try:
        try:
            image = Image.open(file)
        except UnidentifiedImageError as error:
            _prepare_for(file, error)
            image = Image.open(file)
    except Image.DecompressionBombError as error:
        # Pillow's own limit, which lies above ours. It says how many pixels, not width and height.
        pixels = re.search(r"\d+", str(error))
        size = f"{int(pixels[0]):,} pixels," if pixels else str(error)
        raise _too_large(size, most_pixels) from error
    width, height = image.size
    if width * height > most_pixels:
        with image:  # Unlike close(), this leaves a caller's file open.
            raise _too_large(f"{width:,} x {height:,} = {width * height:,} pixels,", most_pixels)
    if image.format == "EPS":
        with image:
            # Pillow would have Ghostscript run it.
            raise ValueError("PostScript is a program, not an image: save it as PNG")
    return image


def _too_large(size: str, most_pixels: int) -> PixelLimitError:
    return PixelLimitError(f"{size} above the limit of {most_pixels:,}: save it smaller")


def _prepare_for(file: str | Path | BinaryIO, error: UnidentifiedImageError) -> None:
    """Let Pillow read HEIC, if that is what it is; otherwise say what it is instead."""
    with open(file, "rb") if isinstance(file, str | Path) else nullcontext(file) as opened:
        opened.seek(0)
        start = opened.read(START_LENGTH)
    if start[4:].startswith(_HEIC):
        try:
            from pi_heif import register_heif_opener
        except ImportError as missing:
            raise ImportError(
                'HEIC, which needs the package pi-heif: pip install "fedss[heic]", or save it '
                "as JPEG"
            ) from missing
        register_heif_opener()
        return
    if start.startswith(_TIFF):
        what = "a TIFF of a kind that cannot be read, or a damaged one: save it as PNG"
    elif known := what_begins(start):
        what = f"no image: it {known}"
    else:
        what = f"no image, it begins with {start[:12]!r}" if start else "an empty file"
    raise UnidentifiedImageError(what) from error


def decode(file: str | Path | BinaryIO, image_size: int, channels: int) -> np.ndarray:
    """One image as uint8 [C, image_size, image_size], cut to its central square.

    Upright, with transparency laid on white; ``docs/image-files.md`` has all rules, and why.

    Raises:
        ValueError: see ``open_image``; or pixels whose range nobody knows: floating-point ones,
            integers below 0 or above 65535.
        ImportError: HEIC, and pi-heif is not installed.
        OSError, SyntaxError or others of Pillow's for a file that is no image.
    """
    with open_image(file) as image, upright(image, image_size) as seen:
        return pixels_of(seen, image_size, channels)


@contextmanager
def upright(image: Image.Image, image_size: int) -> Iterator[Image.Image]:
    """An image as a person sees it: rotated as the camera says, 8 bits a pixel, laid on white.

    For a ``with`` block, in which the image is in memory: all threads together hold MAX_PIXELS
    at a time, and whoever wants more waits. A thread that holds one is not to ask for another.
    Of a JPEG no more is decoded than ``pixels_of`` needs. ``image`` is not to be used afterwards.
    Errors are those of ``decode``.
    """
    width, height = image.size
    # A JPEG decodes at a fraction of its size for much less work; twice the target is left
    # for the filter of pixels_of.
    image.draft(None, (2 * image_size, 2 * image_size))
    if not image.info.get("progressive"):  # of which all is kept until the last scan
        width, height = image.size
    with _room(width * height), ExitStack() as opened:
        # Memory is to be free before there is room. The file is its opener's.
        opened.callback(Image.Image.close, image)
        seen = _upright(image)
        opened.callback(Image.Image.close, seen)
        yield seen


@contextmanager
def _room(pixels: int) -> Iterator[None]:
    """Wait until all threads together hold MAX_PIXELS at most, or nobody holds any."""
    global _held
    with _released:
        _released.wait_for(lambda: not _held or _held + pixels <= MAX_PIXELS)
        _held += pixels
    try:
        yield
    finally:
        with _released:
            _held -= pixels
            _released.notify_all()


def _upright(image: Image.Image) -> Image.Image:
    stored = _stored_as(image)
    tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
    wide_planes = tags.get(PLANAR_CONFIGURATION) == 2 and max(tags.get(BITSPERSAMPLE, (8,))) > 8
    if wide_planes and stored in _BANDS:
        # Not compressed: Pillow would read the wrong bytes.
        raise ValueError("16 bits, channel after channel: save it pixel by pixel, or with 8 bits")
    _mend_transparency(image, stored)
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):
        wide = np.asarray(image)
        if image.mode == "I" and not 0 <= wide.min() <= wide.max() < 2**16:
            raise ValueError(
                f"integers from {wide.min()} to {wide.max()} have no known range; save it with "
                "8 or 16 bits a pixel"
            )
        narrow = (wide >> (4 if stored == "I;12" else 8)).astype(np.uint8)
        if tags.get(PHOTOMETRIC_INTERPRETATION) == 0:
            narrow = 255 - narrow  # white is 0: of fewer bits, Pillow sees to it
        if "transparency" in image.info:
            narrow[wide == image.info["transparency"]] = 255
        return Image.fromarray(narrow)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; save it with 8 or 16 bits")
    if tags.get(SAMPLEFORMAT) == (2,) and np.asarray(image).max() > 127:
        raise ValueError("integers below 0 have no known range; save it with 8 bits, unsigned")
    if image.has_transparency_data:
        if image.mode == "La":
            image = image.convert("LA")
        if image.mode != "RGBA":
            image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image


def _stored_as(image: Image.Image) -> str:
    """How an image that was just opened keeps a pixel, such as "L;2", as Pillow names it."""
    if not isinstance(image, ImageFile.ImageFile) or not image.tile:
        return ""
    details = image.tile[0][3]
    return str(details[0] if isinstance(details, tuple) else details)


def is_colourless(image: Image.Image) -> bool:
    """Whether an image that was just opened is stored as black and white or grayscale."""
    return image.mode in _COLOURLESS or _stored_as(image) == "LA;16B"


def _mend_transparency(image: Image.Image, stored: str) -> None:
    """One transparent value of a PNG, as Pillow gives pixels: it leaves the value as it is stored.

    Of 16 bits in colour Pillow gives the upper 8, and the value means all 16 (PNG, section 13.12).
    """
    value = image.info.get("transparency")
    if stored in ("L;2", "L;4") and isinstance(value, int):
        image.info["transparency"] = value * (85 if stored == "L;2" else 17)
    if stored == "RGB;16B" and isinstance(value, tuple):
        assert isinstance(image, ImageFile.ImageFile)
        assert image.fp is not None
        before = image.fp.tell()
        image.fp.seek(0)
        with Image.open(io.BytesIO(image.fp.read())) as lower:
            image.fp.seek(before)
            # As if the other end came first.
            lower.tile = [(*tile[:3], "RGB;16L") for tile in lower.tile]  # type: ignore[misc]
            wide = np.asarray(image).astype(np.uint16) << 8 | np.asarray(lower)
        hidden = Image.fromarray((wide == value).all(2))
        image.paste((255, 255, 255), mask=hidden)
        del image.info["transparency"]


def pixels_of(image: Image.Image, image_size: int, channels: int) -> np.ndarray:
    """An upright image as ``decode`` gives it."""
    mode = "L" if channels == 1 else "RGB"
    if image.mode != mode:
        image = image.convert(mode)
    # Trained weights know enlarged images better so (benchmarks/photos.py).
    enlarged = min(image.size) < image_size
    how = Image.Resampling.BICUBIC if enlarged else Image.Resampling.BILINEAR
    square = ImageOps.fit(image, (image_size, image_size), how)
    # Faster than np.asarray, which shows in small images.
    pixels = np.frombuffer(square.tobytes(), np.uint8)
    return pixels.reshape(image_size, image_size, channels).transpose(2, 0, 1)


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """No warnings of Pillow's, in any thread, for a ``with`` block.

    They name no file, and each has its answer: of size, ``MAX_PIXELS``; of damaged EXIF, that the
    image is taken as it is stored.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield
