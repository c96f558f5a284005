"""A vector store: images with their vectors and thumbnails, in one SQLite file.

An index has two of them: one that `fedss index` writes as a whole, and one that classes are
enrolled into, image by image. Names and classes are bytes, as file names are (those of Linux
need not be text).
"""

import sqlite3
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fedss.data.cache import stamp
from fedss.errors import RunFolderError
from fedss.files import writing

_FORMAT = "fedss-index-1"
# Seconds that one process waits for another to end what it is writing.
_PATIENCE = 30.0
# AUTOINCREMENT: the number of an image that was removed is never given to another one.
_TABLES = """
    CREATE TABLE IF NOT EXISTS about (key TEXT PRIMARY KEY, value TEXT NOT NULL);
    CREATE TABLE IF NOT EXISTS images (
        id INTEGER PRIMARY KEY AUTOINCREMENT, name BLOB NOT NULL, label BLOB,
        size INTEGER, changed INTEGER, vector BLOB NOT NULL
    );
    CREATE TABLE IF NOT EXISTS thumbnails (id INTEGER PRIMARY KEY, jpeg BLOB NOT NULL);
"""


class Item(NamedTuple):
    """One image to be stored: its vector is float32, its thumbnail a JPEG."""

    name: str
    label: str | None
    fingerprint: tuple[int, int] | None
    vector_D: np.ndarray
    thumbnail: bytes


@dataclass(frozen=True)
class VectorStore:
    """What one file holds, without thumbnails, which ``read_thumbnail`` gives by their ids."""

    metadata: dict[str, str]
    ids: tuple[int, ...]
    names: tuple[str, ...]
    labels: tuple[str | None, ...]
    vectors_ND: np.ndarray


def file_fingerprint(path: Path) -> tuple[int, int] | None:
    """What tells whether a file has changed (``fedss.data.cache.stamp``); None of a missing one."""
    with suppress(OSError):
        return stamp(path)
    return None


def create_store(path: Path, metadata: dict[str, str]) -> None:
    """An empty store, where there is none; of several processes at once one makes it."""
    with _opened(path, "rwc") as file:
        file.executescript(f"BEGIN IMMEDIATE; {_TABLES}")
        rows = {"format": _FORMAT, **metadata}.items()
        file.executemany("INSERT OR IGNORE INTO about VALUES (?, ?)", rows)


def store_exists(path: Path) -> bool:
    """Whether a store was made: SQLite leaves an empty file where its maker was killed."""
    return path.is_file() and path.stat().st_size > 0


@contextmanager
def transaction(path: Path, alone: bool = False) -> Iterator[sqlite3.Connection]:
    """One change of a store: done as a whole, or, where it fails, not at all.

    Others wait for its end. With ``alone`` nobody else knows of the file, and it is worthless if
    this process dies: no journal is kept.
    """
    with _opened(path) as file:
        # What is removed is somebody's image: overwritten, not only no longer listed.
        file.execute("PRAGMA secure_delete = ON")
        if alone:
            file.execute("PRAGMA journal_mode = OFF")
        file.execute("BEGIN IMMEDIATE")
        yield file


def add_items(file: sqlite3.Connection, items: Iterable[Item]) -> None:
    """Add images, in order."""
    for item in items:
        vector = np.ascontiguousarray(item.vector_D, "<f4").tobytes()
        row = (_bytes(item.name), _bytes(item.label), *(item.fingerprint or (None, None)), vector)
        added = file.execute(
            "INSERT INTO images (name, label, size, changed, vector) VALUES (?, ?, ?, ?, ?)", row
        )
        file.execute("INSERT INTO thumbnails VALUES (?, ?)", (added.lastrowid, item.thumbnail))


def remove_class(file: sqlite3.Connection, label: str) -> int:
    """Remove the images of a class; how many there were."""
    file.execute(
        "DELETE FROM thumbnails WHERE id IN (SELECT id FROM images WHERE label = ?)",
        (_bytes(label),),
    )
    return file.execute("DELETE FROM images WHERE label = ?", (_bytes(label),)).rowcount


def write_metadata(file: sqlite3.Connection, metadata: dict[str, str]) -> None:
    """Write metadata of the whole."""
    file.executemany("INSERT OR REPLACE INTO about VALUES (?, ?)", metadata.items())


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of the whole.

    Raises:
        RunFolderError: no such file, or not one of ours.
    """
    with _opened(path) as file:
        return _metadata(file, path)


def read_store(path: Path, size: int) -> VectorStore:
    """All of it but thumbnails; ``size``: D of its vectors.

    Raises:
        RunFolderError: no such file, or a damaged one.
    """
    with _opened(path) as file:
        file.execute("BEGIN")
        metadata = _metadata(file, path)
        (pages,), (size_of_page,) = (
            file.execute(f"PRAGMA {name}").fetchone() for name in ("page_count", "page_size")
        )
        if path.stat().st_size < pages * size_of_page:
            raise damaged_store(path, "its end is missing")
        (count,) = file.execute("SELECT count(*) FROM images").fetchone()
        ids: list[int] = []
        names: list[str] = []
        labels: list[str | None] = []
        vectors_ND = np.empty((count, size), np.float32)
        rows = file.execute("SELECT id, name, label, vector FROM images ORDER BY id")
        for position, (number, name, label, vector) in enumerate(rows):
            if position >= count or len(vector) != 4 * size:
                raise damaged_store(path, f"image {number} has {len(vector)} bytes of vector")
            vectors_ND[position] = np.frombuffer(vector, "<f4")
            ids.append(number)
            names.append(_text(name))
            labels.append(None if label is None else sys.intern(_text(label)))
    lengths_N = np.einsum("nd,nd->n", vectors_ND, vectors_ND)
    if not np.all((np.abs(lengths_N - 1) < 1e-3) | (lengths_N == 0)):
        raise damaged_store(path, "a vector is not of length 1")
    return VectorStore(metadata, tuple(ids), tuple(names), tuple(labels), vectors_ND)


def read_fingerprints(path: Path) -> dict[str, tuple[int, tuple[int, int] | None]]:
    """Number and fingerprint of each image by name; of several of one name the last."""
    with _opened(path) as file:
        rows = file.execute("SELECT name, id, size, changed FROM images ORDER BY id")
        return {
            _text(name): (number, None if size is None else (size, at))
            for name, number, size, at in rows
        }


def read_items(path: Path, ids: Sequence[int]) -> list[tuple[int, tuple[np.ndarray, bytes]]]:
    """Number, and vector and thumbnail, of some images."""
    if not ids:
        return []
    with _opened(path) as file:
        items = []
        for number in ids:
            row = file.execute(
                "SELECT vector, jpeg FROM images JOIN thumbnails USING (id) WHERE id = ?", (number,)
            ).fetchone()
            if row is None:
                raise damaged_store(path, f"image {number} is missing")
            items.append((number, (np.frombuffer(row[0], "<f4"), row[1])))
        return items


def read_thumbnail(path: Path, number: int, build: str) -> bytes | None:
    """An image's thumbnail; None if it is no longer there.

    ``build`` is that of the metadata when the number was read: numbers of another build mean other
    images.
    """
    with _opened(path) as file:
        row = file.execute(
            "SELECT jpeg FROM thumbnails WHERE id = ? AND ? = "
            "(SELECT value FROM about WHERE key = 'build')",
            (number, build),
        ).fetchone()
        return None if row is None else row[0]


def damaged_store(path: Path, why: object) -> RunFolderError:
    """The error for a file that nobody can use."""
    return RunFolderError(
        f"{path} is damaged ({why}); restore it from a backup, or delete it and make it anew: "
        "fedss index RUN IMAGES for index.sqlite, fedss enrol for enrolled.sqlite"
    )


def _bytes(text: str | None) -> bytes | None:
    return None if text is None else text.encode("utf-8", "surrogateescape")


def _text(name: bytes) -> str:
    # Not os.fsdecode: an index holds the same names whatever this process's locale is.
    return name.decode("utf-8", "surrogateescape")


def _metadata(file: sqlite3.Connection, path: Path) -> dict[str, str]:
    metadata = dict(file.execute("SELECT key, value FROM about").fetchall())
    if metadata.get("format") != _FORMAT:
        raise damaged_store(path, f"expected format {_FORMAT}, found {metadata.get('format')}")
    return metadata


@contextmanager
def _opened(path: Path, mode: str = "rw") -> Iterator[sqlite3.Connection]:
    """A connection of its own for each use: any thread may make one, and none is left open.

    For reading too it may write, if it can: where a process was killed while it wrote, the first
    one that opens the file undoes what is half done.
    """
    if mode != "rwc" and not store_exists(path):
        raise RunFolderError(f"{path} is missing: fedss index RUN IMAGES makes it")
    advice = "make room or check permissions, then start the same command again"
    try:
        with writing(path.parent, advice):
            uri = f"{path.absolute().as_uri()}?mode={mode}"
            file = sqlite3.connect(uri, uri=True, timeout=_PATIENCE, isolation_level=None)
            with closing(file), file:  # which commits what has begun, or takes it back
                yield file
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY:
            raise RunFolderError(
                f"{path} is in use by another fedss process; wait for it and try again"
            ) from error
        if error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_ERROR:
            raise damaged_store(path, error) from error
        raise RunFolderError(f"cannot use {path}: {error}; {advice}") from error
    except sqlite3.DatabaseError as error:
        raise damaged_store(path, error) from error
