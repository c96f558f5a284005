"""Pictures decoded once into a memory-mapped file of pixels."""

import hashlib
import io
import json
import logging
import math
import os
import re
import shutil
import tempfile
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    PHOTOMETRIC_INTERPRETATION,
    PLANAR_CONFIGURATION,
    SAMPLEFORMAT,
    TiffImageFile,
)
from rich.console import Console
from rich.progress import Progress

from fedss.errors import DataError
from fedss.files import START_LENGTH, atomic, remove_litter, what_begins

MAX_PIXELS = 2**27
"""Pixels of the largest picture that is decoded: half a gigabyte, at Pillow's 4 bytes a pixel."""

# Part of every key: raise it when the same files would give other pixels.
_VERSION = 3
_BATCH = 32
_DAY = 24 * 3600.0
_COLOURLESS = ("1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N")
_BANDS = ("R", "C")  # how Pillow names the first channel of planes that are not compressed
# ISO/IEC 23008-12, annex B: what a HEIC file begins with, after the four bytes of a length.
_HEIC = tuple(b"ftyp" + brand for brand in (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1"))
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


T = TypeVar("T")

# Pixels of pictures in memory, of all threads; and a word that there are fewer.
_held = 0
_released = threading.Condition()


class BrokenPicturesError(DataError):
    """Pictures that cannot be read: ``reasons`` by file, out of ``total`` pictures."""

    def __init__(self, reasons: Mapping[str, str], total: int) -> None:
        self.reasons = dict(reasons)
        first = [f"{path} ({reason})" for path, reason in sorted(reasons.items())[:5]]
        more = f", and {len(reasons) - len(first)} more" if len(reasons) > len(first) else ""
        super().__init__(
            f"{len(reasons)} of {total} pictures cannot be read: {'; '.join(first)}{more}. "
            "Mend or remove them, or leave them out with skip_broken (--skip-broken)"
        )


def cache_folder(cache: Path | None = None) -> Path:
    """Where decoded pictures are kept: ``cache``, else $FEDSS_CACHE, else ~/.cache/fedss.

    For a user without a home directory that can be written, a folder of the user's own among the
    temporary files of the machine.
    """
    if cache is not None:
        return Path(cache)
    named = os.environ.get("FEDSS_CACHE")
    if named:
        return Path(named)
    try:
        home = Path.home()
    except RuntimeError:  # neither $HOME nor an entry in /etc/passwd
        home = None
    return _caches(home) / "fedss"


@lru_cache
def _caches(home: Path | None) -> Path:
    if home is not None:
        usual = home / ".cache"
        with suppress(OSError):
            usual.mkdir(parents=True, exist_ok=True)
        if os.access(usual, os.W_OK):
            return usual
    place = Path(tempfile.gettempdir()) / f"fedss-cache-{os.getuid()}"
    with suppress(FileExistsError):
        place.mkdir(mode=0o700)
    if place.is_symlink() or place.stat().st_uid != os.getuid():
        raise DataError(f"{place} belongs to somebody else: name a folder with FEDSS_CACHE")
    logging.getLogger("fedss.data").warning(
        "no home directory that can be written; decoded pictures are kept in %s (name another "
        "folder with FEDSS_CACHE)",
        place,
    )
    return place


class PixelLimitError(ValueError):
    """A picture of more pixels than are decoded."""


def open_picture(
    picture: str | Path | BinaryIO, most_pixels: int | None = None
) -> ImageFile.ImageFile:
    """``PIL.Image.open`` for files that nobody has looked at; pixels are not decoded yet.

    Raises:
        PixelLimitError: more than ``most_pixels``, by default and at most MAX_PIXELS.
        ValueError: PostScript.
        ImportError: HEIC, and pi-heif is not installed.
        OSError, SyntaxError or others of Pillow's: no picture.
    """
    most_pixels = MAX_PIXELS if most_pixels is None else most_pixels
    try:
        try:
            image = Image.open(picture)
        except UnidentifiedImageError as error:
            _prepare_for(picture, error)
            image = Image.open(picture)
    except Image.DecompressionBombError as error:
        # Pillow's own limit, which lies above ours. It says how many pixels, not width and height.
        pixels = re.search(r"\d+", str(error))
        found = f"{int(pixels[0]):,} pixels," if pixels else str(error)
        raise _too_large(found, most_pixels) from error
    width, height = image.size
    if width * height > most_pixels:
        _close(image)
        raise _too_large(f"{width:,} x {height:,} = {width * height:,} pixels,", most_pixels)
    if image.format == "EPS":
        _close(image)
        # Pillow would have Ghostscript run it.
        raise ValueError("PostScript is a program, not a picture: save it as PNG")
    return image


def _close(image: Image.Image) -> None:
    with image:
        pass  # Unlike close(), this leaves a caller's file open.


def _too_large(found: str, most_pixels: int) -> PixelLimitError:
    return PixelLimitError(f"{found} above the limit of {most_pixels:,}: save it smaller")


def _prepare_for(picture: str | Path | BinaryIO, error: UnidentifiedImageError) -> None:
    """Let Pillow read HEIC, if that is what it is; otherwise say what it is instead."""
    if isinstance(picture, str | Path):
        with open(picture, "rb") as file:
            start = file.read(START_LENGTH)
    else:
        picture.seek(0)
        start = picture.read(START_LENGTH)
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
        what = f"no picture: it {known}"
    else:
        what = f"no picture, it begins with {start[:12]!r}" if start else "an empty file"
    raise UnidentifiedImageError(what) from error


def decode(picture: str | Path | BinaryIO, image_size: int, channels: int) -> np.ndarray:
    """One picture as uint8 [C, image_size, image_size], cut to its central square.

    The camera's rotation is undone and transparency laid on white; of an animation or of several
    pages the first counts; 16 bits a pixel become 8 by leaving out the lower half.
    ``docs/pictures.md`` has all rules, and why.

    Raises:
        ValueError: see ``open_picture``; or pixels whose range nobody knows: floating-point ones,
            integers below 0 or above 65535.
        ImportError: HEIC, and pi-heif is not installed.
        OSError, SyntaxError or others of Pillow's for a file that is no picture.
    """
    with open_picture(picture) as image, upright(image, image_size) as seen:
        return pixels_of(seen, image_size, channels)


@contextmanager
def upright(image: Image.Image, image_size: int) -> Iterator[Image.Image]:
    """A picture as a person sees it: rotated as the camera says, 8 bits a pixel, laid on white.

    For a ``with`` block, in which the picture is in memory: all threads together hold MAX_PIXELS
    at a time, and whoever wants more waits. A thread that holds one is not to ask for another.

    Of a JPEG that was just opened no more is decoded than ``pixels_of`` needs. ``image`` is not to
    be used afterwards.

    Raises:
        See ``decode``.
    """
    width, height = image.size
    # A JPEG decodes at a fraction of its size for much less work; twice the target is left
    # for the filter of pixels_of.
    image.draft(None, (2 * image_size, 2 * image_size))
    if not image.info.get("progressive"):  # of which all is kept until the last scan
        width, height = image.size
    with _room(width * height):
        used = [image]
        try:
            used.append(_upright(image))
            yield used[-1]
        finally:
            for one in used:
                # Memory is to be free before there is room. The file is its opener's.
                Image.Image.close(one)


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
    stored = stored_as(image)
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
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image)
    return image


def stored_as(image: Image.Image) -> str:
    """How a picture that was just opened keeps a pixel, such as "L;2", as Pillow names it."""
    if not isinstance(image, ImageFile.ImageFile) or not image.tile:
        return ""
    details = image.tile[0][3]
    return str(details[0] if isinstance(details, tuple) else details)


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
    """An upright picture as ``decode`` gives it."""
    mode = "L" if channels == 1 else "RGB"
    if image.mode != mode:
        image = image.convert(mode)
    square = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BILINEAR)
    # Faster than np.asarray, which shows in small pictures.
    pixels = np.frombuffer(square.tobytes(), np.uint8)
    return pixels.reshape(image_size, image_size, channels).transpose(2, 0, 1)


def stamp(path: str | Path) -> tuple[int, int]:
    """A file's size, and a number that stands for which file it is and its times of last change.

    Archives, ``rsync -t`` and backups set the time that a program sees as that of the content, so
    it may be that of the file that was there before. The time of the status (POSIX's ctime) can
    only become later and no program can set it: it tells the two apart. It changes with names,
    rights and hard links, too, and then pictures are decoded once more for nothing.

    Kernels count it in ticks of some milliseconds, in which an archive is unpacked, and it stays
    when a folder above is renamed or a link leads elsewhere: there the file's number (inode) tells.
    That of the device may change with each start of the machine and is left out.
    """
    status = os.stat(path)
    facts = f"{status.st_ino} {status.st_mtime_ns} {status.st_ctime_ns}".encode()
    return status.st_size, int.from_bytes(hashlib.sha256(facts).digest()[:7])


def stamp_files(paths: Iterable[str]) -> str:
    """A digest, in hex, of each file's path and ``stamp``."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path}\0{stamp(path)}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def decode_files(
    paths: Sequence[str],
    stamp: str,
    image_size: int,
    channels: int,
    *,
    cache: Path | None,
    title: str,
    expect_broken: bool = False,
) -> np.ndarray:
    """Pictures as a read-only memory map, uint8 [N, C, image_size, image_size], made once.

    ``stamp`` is what ``stamp_files`` says of the paths. With ``expect_broken`` a list of broken
    pictures found earlier among these same files is believed without a second look.

    Raises:
        BrokenPicturesError: All the pictures that cannot be read.
        DataError: The cache cannot be written.
    """
    key = ("pictures", stamp, image_size, channels)
    note = _file("broken", cache, key, "json")
    if expect_broken:
        with suppress(OSError, ValueError):
            reasons = {paths[i]: reason for i, reason in json.loads(note.read_text())}
            raise BrokenPicturesError(reasons, len(paths))

    def decode_some(some: range) -> tuple[np.ndarray, dict[int, Exception]]:
        pixels = np.empty((len(some), channels, image_size, image_size), np.uint8)
        broken: dict[int, Exception] = {}
        for row, position in enumerate(some):
            try:
                pixels[row] = decode(paths[position], image_size, channels)
            except Exception as error:
                broken[position] = error
        return pixels, broken

    def batches() -> Iterator[np.ndarray]:
        broken: dict[int, Exception] = {}
        for pixels, broken_here in in_threads(decode_some, len(paths)):
            broken |= broken_here
            if not broken:
                yield pixels
        if broken:
            reasons = [(i, str(error) or type(error).__name__) for i, error in broken.items()]
            if not any(map(_may_be_mended, broken.values())):
                with _cache_file(note) as file:
                    file.write(json.dumps(reasons).encode())
            raise BrokenPicturesError({paths[i]: reason for i, reason in reasons}, len(paths))

    shape = (len(paths), channels, image_size, image_size)
    return cached_array(key, shape, batches(), cache=cache, title=title)


def _may_be_mended(error: Exception) -> bool:
    """Whether a picture may be read tomorrow though its file stays as it is."""
    refused = isinstance(error, OSError) and error.errno is not None
    return refused or isinstance(error, ImportError | MemoryError)


def all_colourless(paths: Sequence[str], stamp: str, *, cache: Path | None) -> bool:
    """Whether every picture that can be opened is stored as black and white or grayscale.

    Opens the files up to the first ones in colour; the answer is remembered under the ``stamp``
    of the files.
    """
    note = _file("colourless", cache, (stamp,), "json")
    with suppress(OSError, ValueError):
        return bool(json.loads(note.read_text()))

    def colourless(some: range) -> bool:
        for position in some:
            # What cannot be opened has no colour; decoding will say what is wrong with it.
            with suppress(Exception), open_picture(paths[position]) as image:
                if image.mode not in _COLOURLESS and stored_as(image) != "LA;16B":
                    return False
        return True

    answer = all(in_threads(colourless, len(paths)))
    with _cache_file(note) as file:
        file.write(json.dumps(answer).encode())
    return answer


def in_threads(work: Callable[[range], T], count: int) -> Iterator[T]:
    """``work`` on the numbers below ``count``, some at a time, on all cores; results in order.

    Workers go on while a result is used, but not far: few results wait in memory.
    """
    cores = os.cpu_count() or 1
    # Of blocks of 16 MB, Pillow's own choice, glibc keeps what is freed for the thread that had it:
    # 12 threads came to 2.4 GB in place of 0.65. Larger ones go back at once.
    Image.core.set_block_size(2**26)  # type: ignore[attr-defined]
    with quiet_pillow(), ThreadPoolExecutor(cores) as pool:
        waiting: deque[Future[T]] = deque()
        for start in range(0, count, _BATCH):
            waiting.append(pool.submit(work, range(start, min(start + _BATCH, count))))
            if len(waiting) > 2 * cores:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def cached_array(
    key: Iterable[object],
    shape: tuple[int, ...],
    batches: Iterator[np.ndarray],
    *,
    cache: Path | None,
    title: str,
) -> np.ndarray:
    """The uint8 array [*shape] kept under ``key``, read-only from disk; made first if need be.

    ``batches`` yields its rows in order, and is not touched if the array is there. The file
    appears under its name only when it is whole, so a process may die or race with another at
    any time.

    Raises:
        DataError: The folder cannot be written, or its disk has no room for all of it.
    """
    path = _file("pixels", cache, (*key, shape), "npy")
    with suppress(OSError, ValueError):
        found: np.ndarray = np.load(path, mmap_mode="r")
        if found.shape == shape and found.dtype == np.uint8:
            return found

    console = Console(stderr=True)
    shown = Progress(console=console, transient=True, disable=not console.is_terminal)
    with _cache_file(path) as file, shown:
        size, free = math.prod(shape), shutil.disk_usage(path.parent).free
        if size > free:
            raise DataError(
                f"{title}: {shape[0]:,} pictures of {shape[-1]} x {shape[-2]} pixels take "
                f"{size / 1e9:,.1f} GB, {path.parent} has {free / 1e9:,.1f} GB: take smaller ones "
                "(image_size, --image-size), or another folder with cache= or the variable "
                "FEDSS_CACHE"
            )
        np.lib.format.write_array_header_1_0(
            file, {"descr": "|u1", "fortran_order": False, "shape": shape}
        )
        task = shown.add_task(title, total=shape[0])
        for batch in batches:
            file.write(np.ascontiguousarray(batch).data)
            shown.advance(task, len(batch))
    made: np.ndarray = np.load(path, mmap_mode="r")
    return made


def _file(kind: str, cache: Path | None, key: Iterable[object], suffix: str) -> Path:
    digest = hashlib.sha256()
    for word in (_VERSION, *key):
        digest.update(repr(word).encode("utf-8", "surrogateescape") + b"\n")
    return cache_folder(cache) / f"{kind}-{digest.hexdigest()[:32]}.{suffix}"


@contextmanager
def _cache_file(path: Path) -> Iterator[BinaryIO]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Other processes may be writing here now; what nobody has written to for a day is litter.
        remove_litter(path.parent, older_than=_DAY)
        with atomic(path) as file:
            yield file
    except OSError as error:
        raise DataError(
            f"cannot write decoded pictures to {path.parent}: {error.strerror or error}. Make room "
            "there, or choose another folder with cache= or the variable FEDSS_CACHE"
        ) from error


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """No warnings of Pillow's, in any thread, for a ``with`` block.

    They name no file, and each has its answer: of size, ``MAX_PIXELS``; of damaged EXIF, that the
    picture is taken as it is stored.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield
