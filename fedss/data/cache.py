"""Images decoded once into a memory-mapped file of pixels."""

import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
from PIL import Image

from fedss.data.decoding import decode, is_colourless, open_image, quiet_pillow
from fedss.errors import DataError
from fedss.files import atomic, remove_litter
from fedss.log import Progress, progress_log

# Part of every key: raise it when the same files would give other pixels.
_VERSION = 4
_BATCH = 32
_DAY = 24 * 3600.0
_T = TypeVar("_T")


class BrokenImagesError(DataError):
    """Images that cannot be read: ``reasons`` by file, out of ``total`` images."""

    def __init__(self, reasons: Mapping[str, str], total: int) -> None:
        self.reasons = dict(reasons)
        first = [f"{path} ({reason})" for path, reason in sorted(reasons.items())[:5]]
        more = f", and {len(reasons) - len(first)} more" if len(reasons) > len(first) else ""
        super().__init__(
            f"{len(reasons)} of {total} images cannot be read: {'; '.join(first)}{more}. "
            "Fix or remove them, or leave them out with skip_broken (--skip-broken)"
        )


def cache_folder(cache: Path | None = None) -> Path:
    """Where decoded images are kept: ``cache``, else $FEDSS_CACHE, else ~/.cache/fedss.

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
        "no home directory that can be written; decoded images are kept in %s (name another "
        "folder with FEDSS_CACHE)",
        place,
    )
    return place


def stamp(path: str | Path) -> tuple[int, int]:
    """A file's size, and a digest of its inode and its times of last change.

    Not mtime alone, which archives, ``rsync -t`` and backups set to that of the file before. No
    program can set ctime; it changes with names and rights too, and then images are decoded once
    more for nothing. It is counted in ticks of some milliseconds, in which an archive is unpacked,
    and stays when a folder above is renamed: hence the inode. The device's number, which may change
    with each start of the machine, is left out.
    """
    status = os.stat(path)
    identity = f"{status.st_ino} {status.st_mtime_ns} {status.st_ctime_ns}".encode()
    return status.st_size, int.from_bytes(hashlib.sha256(identity).digest()[:7])


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
    opened: Callable[[str], str | BinaryIO] = str,
) -> np.ndarray:
    """Images as a read-only memory map, uint8 [N, C, image_size, image_size], made once.

    ``stamp`` is that of ``stamp_files`` for the paths. With ``expect_broken`` a list of broken
    images found earlier among these same files is believed without a second look. ``opened`` gives
    what ``decode`` reads of a path.

    Raises:
        BrokenImagesError: All the images that cannot be read.
    """
    key = ("pictures", stamp, image_size, channels)
    note = _file("broken", cache, key, "json")
    if expect_broken:
        with suppress(OSError, ValueError):
            reasons = {paths[i]: reason for i, reason in json.loads(note.read_text())}
            raise BrokenImagesError(reasons, len(paths))

    def decode_block(positions: range) -> tuple[np.ndarray, dict[int, Exception]]:
        pixels = np.empty((len(positions), channels, image_size, image_size), np.uint8)
        broken: dict[int, Exception] = {}
        for row, position in enumerate(positions):
            try:
                pixels[row] = decode(opened(paths[position]), image_size, channels)
            except Exception as error:
                broken[position] = error
        return pixels, broken

    def batches() -> Iterator[np.ndarray]:
        broken: dict[int, Exception] = {}
        for pixels, broken_in_block in in_threads(decode_block, len(paths)):
            broken |= broken_in_block
            if not broken:
                yield pixels
        if broken:
            reasons = [(i, str(error) or type(error).__name__) for i, error in broken.items()]
            # No note of what may be read tomorrow though its file stays as it is.
            passing = [isinstance(e, ImportError | MemoryError) for e in broken.values()]
            if not any(passing) and not any(getattr(e, "errno", None) for e in broken.values()):
                _write_note(note, reasons)
            raise BrokenImagesError({paths[i]: reason for i, reason in reasons}, len(paths))

    shape = (len(paths), channels, image_size, image_size)
    return cached_array(key, shape, batches(), cache=cache, title=title)


def all_colourless(
    paths: Sequence[str],
    stamp: str,
    *,
    cache: Path | None,
    opened: Callable[[str], str | BinaryIO] = str,
) -> bool:
    """Whether every image that can be opened is stored as black and white or grayscale.

    Opens the files up to the first ones in colour; the answer is kept under their ``stamp``.
    """
    note = _file("colourless", cache, (stamp,), "json")
    with suppress(OSError, ValueError):
        return bool(json.loads(note.read_text()))

    def colourless(positions: range) -> bool:
        for position in positions:
            # What cannot be opened has no colour; decoding will say what is wrong with it.
            with suppress(Exception), open_image(opened(paths[position])) as image:
                if not is_colourless(image):
                    return False
        return True

    answer = all(in_threads(colourless, len(paths)))
    _write_note(note, answer)
    return answer


def _write_note(note: Path, content: object) -> None:
    with _cache_file(note) as file:
        file.write(json.dumps(content).encode())


def in_threads(work: Callable[[range], _T], count: int) -> Iterator[_T]:
    """``work`` on the numbers below ``count``, a block at a time, on all cores; results in order.

    Workers go on while a result is used, but not far: few results wait in memory.
    """
    cores = os.cpu_count() or 1
    # Of blocks of 16 MB, Pillow's own choice, glibc keeps what is freed for the thread that had it:
    # 12 threads came to 2.4 GB in place of 0.65. Larger ones go back at once.
    Image.core.set_block_size(2**26)  # type: ignore[attr-defined]
    with quiet_pillow(), ThreadPoolExecutor(cores) as pool:
        waiting: deque[Future[_T]] = deque()
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
    dtype: type[np.generic] = np.uint8,
) -> np.ndarray:
    """The array [*shape] kept under ``key``, read-only from disk; made first if need be.

    ``batches`` yields its rows in order, and is not touched if the array is there. The file
    appears under its name only when it is whole, so a process may die or race with another at
    any time.

    Raises:
        DataError: The folder cannot be written, or its disk has no room for all of it.
    """
    path = _file("pixels", cache, (*key, shape), "npy")
    with suppress(OSError, ValueError, EOFError):
        stored: np.ndarray = np.load(path, mmap_mode="r")
        if stored.shape == shape and stored.dtype == dtype:
            return stored

    log, done = progress_log(), 0
    with _cache_file(path) as file:
        size = math.prod(shape) * np.dtype(dtype).itemsize
        free = shutil.disk_usage(path.parent).free
        if size > free:
            raise DataError(
                f"{title}: {shape[0]:,} images, each of {' x '.join(map(str, shape[1:]))} numbers, "
                f"take {size / 1e9:,.1f} GB, {path.parent} has {free / 1e9:,.1f} GB: take smaller "
                "ones (image_size, --image-size), or another folder with cache= or the variable "
                "FEDSS_CACHE"
            )
        descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
        np.lib.format.write_array_header_1_0(
            file, {"descr": descr, "fortran_order": False, "shape": shape}
        )
        for batch in batches:
            file.write(np.ascontiguousarray(batch).data)
            done += len(batch)
            log(Progress(title, done, shape[0], "images"), False)
    made: np.ndarray = np.load(path, mmap_mode="r")
    return made


def drop_cached(key: Iterable[object], shape: tuple[int, ...], *, cache: Path | None) -> None:
    """Remove what :func:`cached_array` keeps under a key."""
    _file("pixels", cache, (*key, shape), "npy").unlink(missing_ok=True)


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
            f"cannot write decoded images to {path.parent}: {error.strerror or error}. Make room "
            "there, or choose another folder with cache= or the variable FEDSS_CACHE"
        ) from error
