"""From picture files to vectors and thumbnails, a block at a time."""

import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageFile

from fedss.data.cache import in_threads
from fedss.data.decoding import open_picture, pixels_of, upright
from fedss.data.missing import why_missing
from fedss.errors import DataError
from fedss.models import Embedder, EmbedderSpec, embed_pixels

Picture = str | Path | BinaryIO | Image.Image

THUMBNAIL = 160
"""The longer side of a thumbnail, in pixels, at most."""
_QUALITY = 80
_BLOCK = 256


class Read(NamedTuple):
    """One picture that was read; ``thumbnail`` is empty where none was asked for."""

    position: int
    vector_D: np.ndarray
    thumbnail: bytes


@dataclass(frozen=True)
class _Broken:
    position: int
    reason: str


def read_pictures(
    embedder: Embedder,
    pictures: Sequence[Picture],
    *,
    thumbnails: bool,
    broken: dict[int, str] | None = None,
    advice: str = "mend it or choose another one",
) -> Iterator[list[Read]]:
    """Blocks of pictures, embedded as in training, in order.

    Pictures are decoded on all cores while the model works; a few hundred are in memory.

    Args:
        embedder: the model.
        pictures: files, their content, or open pictures. These stay as they are: what is not
            decoded yet is read from its file, else its pixels are copied. Decoded from the start,
            a large JPEG gives slightly other pixels than its file, of which fewer are decoded.
        thumbnails: whether to make them.
        broken: gets the positions of pictures that cannot be read, and why. None: the first such
            picture is an error.
        advice: what to do about it.

    Raises:
        DataError: a picture that cannot be read, or whose embedding is not finite.
    """
    spec = embedder.spec

    def prepare(position: int) -> tuple[int, np.ndarray, bytes] | _Broken:
        try:
            pixels, small = _prepared(pictures[position], spec, thumbnails)
        except FileNotFoundError as error:
            hint = why_missing(os.path.abspath(str(pictures[position])))
            return _Broken(position, f"{error.strerror}{hint}")
        except Exception as error:
            return _Broken(position, str(error) or type(error).__name__)
        return position, pixels, small

    waiting: list[tuple[int, np.ndarray, bytes]] = []

    def embedded() -> list[Read]:
        vectors_BD = embed_pixels(embedder, np.stack([pixels for _, pixels, _ in waiting])).numpy()
        for (position, _, _), finite in zip(waiting, np.isfinite(vectors_BD).all(1), strict=True):
            if not finite:
                raise DataError(
                    f"the embedding of {name_of(pictures[position], position)} is not finite: this "
                    "model cannot be used; did its training diverge?"
                )
        read = [
            Read(position, vector_D, small)
            for (position, _, small), vector_D in zip(waiting, vectors_BD, strict=True)
        ]
        waiting.clear()
        return read

    for some in in_threads(lambda some: [prepare(position) for position in some], len(pictures)):
        for done in some:
            if not isinstance(done, _Broken):
                waiting.append(done)
            elif broken is None:
                raise DataError(
                    f"cannot read picture {name_of(pictures[done.position], done.position)}: "
                    f"{done.reason}; {advice}"
                )
            else:
                broken[done.position] = done.reason
        if len(waiting) >= _BLOCK:
            yield embedded()
    if waiting:
        yield embedded()


def _prepared(picture: Picture, spec: EmbedderSpec, thumbnails: bool) -> tuple[np.ndarray, bytes]:
    with _opened(picture) as image:
        full = max(image.size)
        with upright(image, spec.image_size) as seen:
            pixels = pixels_of(seen, spec.image_size, spec.channels)
            if not thumbnails:
                return pixels, b""
            if full == max(seen.size) or max(seen.size) >= THUMBNAIL:
                return pixels, _small(seen)
    # The model wants few pixels: of a JPEG fewer were decoded than people want to see.
    return pixels, preview(picture)


def _opened(picture: Picture) -> Image.Image:
    if isinstance(picture, Image.Image):
        content = _content(picture)
        return picture.copy() if content is None else open_picture(io.BytesIO(content))
    if not isinstance(picture, str | Path):
        picture.seek(0)
    elif not os.path.isfile(picture) and os.path.exists(picture):
        # A pipe would keep whoever opens it waiting.
        raise OSError("not a file")
    return open_picture(picture)


def _content(picture: Image.Image) -> bytes | None:
    """The file of an open picture that nobody has decoded yet, so that it is read as files are.

    None where there is none, or where it was opened and then told to be another size or page.
    """
    if not isinstance(picture, ImageFile.ImageFile) or picture.fp is None or not picture.tile:
        return None
    before = picture.fp.tell()
    try:
        picture.fp.seek(0)
        content = picture.fp.read()
    finally:
        picture.fp.seek(before)
    with Image.open(io.BytesIO(content)) as again:
        same = (again.size, again.mode, again.tell()) == (
            picture.size,
            picture.mode,
            picture.tell(),
        )
    return content if same else None


def name_of(picture: Picture, position: int) -> str:
    """What to call a picture in a message or a table."""
    if isinstance(picture, str | Path):
        return str(picture)
    return str(getattr(picture, "filename", "") or getattr(picture, "name", "") or position + 1)


def preview(picture: Picture) -> bytes:
    """A small JPEG of a picture, whole and upright, without anything but its pixels.

    Raises:
        OSError, ValueError, SyntaxError or others of Pillow's for a file that is no picture.
    """
    with _opened(picture) as image, upright(image, THUMBNAIL) as seen:
        return _small(seen)


def _small(image: Image.Image) -> bytes:
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    out = io.BytesIO()
    small.save(out, "JPEG", quality=_QUALITY)
    return out.getvalue()
