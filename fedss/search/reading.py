"""From picture files to vectors and thumbnails, a block at a time."""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from fedss.data.cache import in_threads, pixels_of, upright
from fedss.errors import DataError
from fedss.models import Embedder, embed_pixels

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
) -> Iterator[list[Read]]:
    """Blocks of pictures, embedded as in training, in order.

    Pictures are decoded on all cores while the model works; a few hundred are in memory.

    Args:
        embedder: the model.
        pictures: files, their content, or open pictures (these are copied).
        thumbnails: whether to make them.
        broken: gets the positions of pictures that cannot be read, and why. None: the first such
            picture is an error.

    Raises:
        DataError: a picture that cannot be read.
    """
    spec = embedder.spec

    def prepare(position: int) -> tuple[int, np.ndarray, bytes] | _Broken:
        try:
            return (position, *_prepared(pictures[position], spec.image_size, spec.channels))
        except Exception as error:
            return _Broken(position, str(error) or type(error).__name__)

    def _prepared(picture: Picture, size: int, channels: int) -> tuple[np.ndarray, bytes]:
        if isinstance(picture, Image.Image):
            return both(picture.copy(), size, channels)
        with Image.open(picture) as image:
            return both(image, size, channels)

    def both(image: Image.Image, size: int, channels: int) -> tuple[np.ndarray, bytes]:
        image = upright(image, size)
        small = thumbnail(image) if thumbnails else b""
        return pixels_of(image, size, channels), small

    waiting: list[tuple[int, np.ndarray, bytes]] = []

    def embedded() -> list[Read]:
        vectors_BD = embed_pixels(embedder, np.stack([pixels for _, pixels, _ in waiting])).numpy()
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
                    f"{done.reason}; mend or remove it, or leave such pictures out with "
                    "skip_broken (--skip-broken)"
                )
            else:
                broken[done.position] = done.reason
        if len(waiting) >= _BLOCK:
            yield embedded()
    if waiting:
        yield embedded()


def name_of(picture: Picture, position: int) -> str:
    """What to call a picture in a message or a table."""
    if isinstance(picture, str | Path):
        return str(picture)
    return str(getattr(picture, "filename", "") or getattr(picture, "name", "") or position + 1)


def thumbnail(image: Image.Image) -> bytes:
    """A small JPEG of an upright picture, whole, without anything but its pixels."""
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    out = io.BytesIO()
    small.save(out, "JPEG", quality=_QUALITY)
    return out.getvalue()
