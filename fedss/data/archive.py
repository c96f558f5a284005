"""Images in a zip or a tar, read from it without unpacking."""

import os
import posixpath
import stat
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedss.errors import DataError

_ENDINGS = (".zip", ".tar")
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz", ".tar.xz", ".txz", ".tar.zst")
_MOST_BYTES = 2**30


@dataclass(frozen=True)
class Archive:
    """What is packed in the file ``path``: ``names`` of files, none of them a link; and ``links``.

    ``read`` gives the content of one, from any thread.
    """

    path: Path
    names: Sequence[str]
    read: Callable[[str], bytes]
    links: int = 0

    def inside(self, file: str) -> str:
        """The name within the archive of a file below its path, ``photos.zip/cat/1.png``."""
        return file.removeprefix(os.path.join(os.path.abspath(self.path), "")).replace(os.sep, "/")


def find_archive(path: Path) -> tuple[Path, str] | None:
    """The archive that a path is, or leads into, and what it names there ("": nothing)."""
    for place in (path, *path.parents):
        name = place.name.lower()
        if name.endswith((*_ENDINGS, *_COMPRESSED)) and place.is_file():
            inner = path.relative_to(place).as_posix()
            return place, "" if inner == "." else inner
    return None


def open_archive(path: Path) -> Archive:
    """List what a zip or a tar holds.

    Raises:
        DataError: It cannot be read, or only from its beginning on: a compressed tar.
    """
    if path.name.lower().endswith(_COMPRESSED):
        raise DataError(
            f"{path}: a compressed tar can be read from its beginning alone; unpack it, or pack "
            "the images as a zip or a plain tar"
        )
    try:
        return _zip(path) if path.name.lower().endswith(".zip") else _tar(path)
    except (OSError, zipfile.BadZipFile, tarfile.TarError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{path}: cannot be read as an archive: {reason}") from error


def find_manifest(archive: Archive) -> str | None:
    """The name of the list of images in an archive; None: it has none.

    That is ``manifest.csv`` or the only CSV, not within folders, or within the one that has all.

    Raises:
        DataError: Several CSVs.
    """
    tops = {name.split("/")[0] for name in archive.names}
    depth = 1 if len(tops) == 1 and not any(name in tops for name in archive.names) else 0
    lists = [
        name
        for name in archive.names
        if name.count("/") == depth and name.lower().endswith(".csv") and _shown(name)
    ]
    named = [name for name in lists if name.rsplit("/", 1)[-1] == "manifest.csv"]
    if len(lists) > 1 and not named:
        several = " or ".join(os.path.join(archive.path, name) for name in sorted(lists))
        raise DataError(f"{archive.path}: {len(lists)} CSVs are in it; name one: {several}")
    return next(iter(named or lists), None)


def _shown(name: str) -> bool:
    return not name.rsplit("/", 1)[-1].startswith(".")


def _zip(path: Path) -> Archive:
    # One handle for all threads: zipfile locks it while it reads, and decompresses unlocked.
    pack = zipfile.ZipFile(path)
    members = [info for info in pack.infolist() if not info.is_dir()]
    kept = [m for m in members if not stat.S_ISLNK(m.external_attr >> 16)]
    files = {_plain(m.filename): m for m in kept}

    def read(name: str) -> bytes:
        _check_size(files[name].file_size)
        return pack.read(files[name])

    return Archive(path, list(files), read, len(members) - len(kept))


def _tar(path: Path) -> Archive:
    with tarfile.open(path, "r:") as pack:
        members = [member for member in pack if not member.isdir()]
    kept = [m for m in members if m.isreg() and not m.issparse()]
    places = {_plain(m.name): (m.offset_data, m.size) for m in kept}

    def read(name: str) -> bytes:
        offset, size = places[name]
        _check_size(size)
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(size)

    return Archive(path, list(places), read, len(members) - len(kept))


def _plain(name: str) -> str:
    """A name as all archives might have it: ``tar`` writes ``./a``, and some an absolute path."""
    return posixpath.normpath(name).lstrip("/")


def _check_size(size: int) -> None:
    if size > _MOST_BYTES:
        raise ValueError(f"{size:,} bytes, above the limit of {_MOST_BYTES:,}")
