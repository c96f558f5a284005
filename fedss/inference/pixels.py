"""From image files to vectors and thumbnails, a block at a time."""

import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageFile

from fedss.data.cache import in_threads
from fedss.data.decoding import open_image, pixels_of, upright
from fedss.data.missing import why_missing
from fedss.errors import DataError
from fedss.models import Embedder, EmbedderSpec, embed_pixels

ImageSource = str | Path | BinaryIO | Image.Image

THUMBNAIL = 160
"""The longer side of a thumbnail, in pixels, at most."""
_QUALITY = 80
_BLOCK = 256


class Read(NamedTuple):
    """One image that was read; ``thumbnail`` is empty where none was asked for."""

    position: int
    vector_D: np.ndarray
    thumbnail: bytes


class _Broken(NamedTuple):
    position: int
    reason: str


def read_images(
    embedder: Embedder,
    images: Sequence[ImageSource],
    *,
    thumbnails: bool,
    broken: dict[int, str] | None = None,
) -> Iterator[list[Read]]:
    """Blocks of images, embedded as in training, in order.

    Images are decoded on all cores while the model works; a few hundred are in memory.

    Open images stay as they are: what is not decoded yet is read from its file, else its pixels
    are copied. Decoded from the start, a large JPEG gives slightly other pixels than its file, of
    which fewer are decoded.

    Args:
        broken: gets the positions of images that cannot be read, and why. None: the first such
            image is an error.

    Raises:
        DataError: an image that cannot be read, or whose embedding is not finite.
    """
    spec = embedder.spec

    def prepare(position: int) -> tuple[int, np.ndarray, bytes] | _Broken:
        try:
            pixels, small = _prepared(images[position], spec, thumbnails)
        except FileNotFoundError as error:
            hint = why_missing(os.path.abspath(str(images[position])))
            return _Broken(position, f"{error.strerror}{hint}")
        except Exception as error:
            return _Broken(position, str(error) or type(error).__name__)
        return position, pixels, small

    waiting: list[tuple[int, np.ndarray, bytes]] = []

    def embedded() -> list[Read]:
        vectors_BD = embed_pixels(embedder, np.stack([pixels for _, pixels, _ in waiting])).numpy()
        read = []
        for (position, _, small), vector_D in zip(waiting, vectors_BD, strict=True):
            if not np.isfinite(vector_D).all():
                raise DataError(
                    f"the embedding of {name_of(images[position], position)} is not finite: this "
                    "model cannot be used; did its training diverge?"
                )
            read.append(Read(position, vector_D, small))
        waiting.clear()
        return read

    for block in in_threads(lambda block: [prepare(i) for i in block], len(images)):
        for done in block:
            if not isinstance(done, _Broken):
                waiting.append(done)
            elif broken is None:
                raise DataError(
                    f"cannot read image {name_of(images[done.position], done.position)}: "
                    f"{done.reason}; mend it or choose another one"
                )
            else:
                broken[done.position] = done.reason
        if len(waiting) >= _BLOCK:
            yield embedded()
    if waiting:
        yield embedded()


def _prepared(
    source: ImageSource, spec: EmbedderSpec, thumbnails: bool
) -> tuple[np.ndarray, bytes]:
    with _opened(source) as image:
        full = max(image.size)
        with upright(image, spec.image_size) as seen:
            pixels = pixels_of(seen, spec.image_size, spec.channels)
            if not thumbnails:
                return pixels, b""
            if full == max(seen.size) or max(seen.size) >= THUMBNAIL:
                return pixels, _small(seen)
    # The model wants few pixels: of a JPEG fewer were decoded than people want to see.
    return pixels, thumbnail(source)


def _opened(source: ImageSource) -> Image.Image:
    if isinstance(source, Image.Image):
        content = _content(source)
        return source.copy() if content is None else open_image(io.BytesIO(content))
    if not isinstance(source, str | Path):
        source.seek(0)
    elif not os.path.isfile(source) and os.path.exists(source):
        # A pipe would keep whoever opens it waiting.
        raise OSError("not a file")
    return open_image(source)


def _content(image: Image.Image) -> bytes | None:
    """The file of an open image that nobody has decoded yet, so that it is read as files are.

    None where there is none, or where it was opened and then told to be another size or page.
    """
    if not isinstance(image, ImageFile.ImageFile) or image.fp is None or not image.tile:
        return None
    before = image.fp.tell()
    try:
        image.fp.seek(0)
        content = image.fp.read()
    finally:
        image.fp.seek(before)
    with Image.open(io.BytesIO(content)) as again:
        opened = (image.size, image.mode, image.tell())
        same = (again.size, again.mode, again.tell()) == opened
    return content if same else None


def name_of(source: ImageSource, position: int) -> str:
    """What to call an image in a message or a table."""
    if isinstance(source, str | Path):
        return str(source)
    return str(getattr(source, "filename", "") or getattr(source, "name", "") or position + 1)


def thumbnail(source: ImageSource) -> bytes:
    """A small JPEG of an image, whole and upright, without anything but its pixels.

    Raises:
        OSError, ValueError, SyntaxError or others of Pillow's for a file that is no image.
    """
    with _opened(source) as image, upright(image, THUMBNAIL) as seen:
        return _small(seen)


def _small(image: Image.Image) -> bytes:
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    out = io.BytesIO()
    small.save(out, "JPEG", quality=_QUALITY)
    return out.getvalue()
