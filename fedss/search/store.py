"""Pictures with their vectors and thumbnails in one SQLite file.

An index has two of them: one that `fedss index` writes as a whole, and one that classes are
enrolled into, picture by picture. Names and classes are bytes, as file names are (those of Linux
need not be text).
"""

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fedss.errors import RunFolderError
from fedss.files import writing

_FORMAT = "fedss-index-1"
# Seconds that one process waits for another to end what it is writing.
_PATIENCE = 30.0
# AUTOINCREMENT: the number of a picture that was removed is never given to another one.
_TABLES = """
    CREATE TABLE IF NOT EXISTS about (key TEXT PRIMARY KEY, value TEXT NOT NULL);
    CREATE TABLE IF NOT EXISTS pictures (
        id INTEGER PRIMARY KEY AUTOINCREMENT, name BLOB NOT NULL, label BLOB,
        size INTEGER, changed INTEGER, vector BLOB NOT NULL
    );
    CREATE TABLE IF NOT EXISTS thumbnails (id INTEGER PRIMARY KEY, jpeg BLOB NOT NULL);
"""


class Item(NamedTuple):
    """One picture to be put on a shelf.

    Attributes:
        name: its name, for people.
        label: its class, or None.
        stamp: of its file, as ``fedss.data.cache.stamp`` gives it, or None.
        vector_D: its embedding, float32.
        thumbnail: a JPEG.
    """

    name: str
    label: str | None
    stamp: tuple[int, int] | None
    vector_D: np.ndarray
    thumbnail: bytes


@dataclass(frozen=True)
class Shelf:
    """What one file holds, without thumbnails.

    Attributes:
        about: facts of the whole, as text.
        ids: a number per picture, for ``read_thumbnail``.
        names, labels: of each picture.
        vectors_ND: float32.
    """

    about: dict[str, str]
    ids: tuple[int, ...]
    names: tuple[str, ...]
    labels: tuple[str | None, ...]
    vectors_ND: np.ndarray


def make_shelf(path: Path, about: dict[str, str]) -> None:
    """An empty shelf, where there is none; of several processes at once one makes it."""
    with _opened(path, "rwc") as file:
        file.executescript(f"BEGIN IMMEDIATE; {_TABLES}")
        facts = {"format": _FORMAT, **about}
        file.executemany("INSERT OR IGNORE INTO about VALUES (?, ?)", facts.items())


def is_there(path: Path) -> bool:
    """Whether a shelf was made: SQLite leaves an empty file where its maker was killed."""
    return path.is_file() and path.stat().st_size > 0


@contextmanager
def changing(path: Path, alone: bool = False) -> Iterator[sqlite3.Connection]:
    """One change of a shelf: done as a whole, or, where it fails, not at all.

    Others wait for its end. With ``alone`` nobody else knows of the file, and it is worthless if
    this process dies: no journal is kept.
    """
    with _opened(path) as file:
        # What is removed is somebody's picture: overwritten, not only no longer listed.
        file.execute("PRAGMA secure_delete = ON")
        if alone:
            file.execute("PRAGMA journal_mode = OFF")
        file.execute("BEGIN IMMEDIATE")
        yield file


def put(file: sqlite3.Connection, items: Iterable[Item]) -> None:
    """Add pictures, in order."""
    for item in items:
        vector = np.ascontiguousarray(item.vector_D, "<f4").tobytes()
        row = (_bytes(item.name), _bytes(item.label), *(item.stamp or (None, None)), vector)
        added = file.execute(
            "INSERT INTO pictures (name, label, size, changed, vector) VALUES (?, ?, ?, ?, ?)", row
        )
        file.execute("INSERT INTO thumbnails VALUES (?, ?)", (added.lastrowid, item.thumbnail))


def take_out(file: sqlite3.Connection, label: str) -> int:
    """Remove the pictures of a class; how many there were."""
    file.execute(
        "DELETE FROM thumbnails WHERE id IN (SELECT id FROM pictures WHERE label = ?)",
        (_bytes(label),),
    )
    return file.execute("DELETE FROM pictures WHERE label = ?", (_bytes(label),)).rowcount


def note(file: sqlite3.Connection, about: dict[str, str]) -> None:
    """Write facts of the whole."""
    file.executemany("INSERT OR REPLACE INTO about VALUES (?, ?)", about.items())


def read_about(path: Path) -> dict[str, str]:
    """The facts of the whole.

    Raises:
        RunFolderError: no such file, or not one of ours.
    """
    with _opened(path) as file:
        return _about(file, path)


def read_shelf(path: Path, size: int) -> Shelf:
    """All of it but thumbnails.

    Args:
        path: the file.
        size: D of its vectors.

    Raises:
        RunFolderError: no such file, or a damaged one.
    """
    with _opened(path) as file:
        file.execute("BEGIN")
        about = _about(file, path)
        (pages,), (size_of_page,) = (
            file.execute(f"PRAGMA {fact}").fetchone() for fact in ("page_count", "page_size")
        )
        if path.stat().st_size < pages * size_of_page:
            raise damaged(path, "its end is missing")
        (count,) = file.execute("SELECT count(*) FROM pictures").fetchone()
        ids: list[int] = []
        names: list[str] = []
        labels: list[str | None] = []
        known: dict[bytes | None, str | None] = {None: None}
        vectors_ND = np.empty((count, size), np.float32)
        rows = file.execute("SELECT id, name, label, vector FROM pictures ORDER BY id")
        for position, (number, name, label, vector) in enumerate(rows):
            if position >= count or len(vector) != 4 * size:
                raise damaged(path, f"picture {number} has {len(vector)} bytes of vector")
            vectors_ND[position] = np.frombuffer(vector, "<f4")
            ids.append(number)
            names.append(_text(name))
            if label not in known:
                known[label] = _text(label)
            labels.append(known[label])
    lengths_N = np.einsum("nd,nd->n", vectors_ND, vectors_ND)
    if not np.all((np.abs(lengths_N - 1) < 1e-3) | (lengths_N == 0)):
        raise damaged(path, "a vector is not of length 1")
    return Shelf(about, tuple(ids), tuple(names), tuple(labels), vectors_ND)


def read_stamps(path: Path) -> dict[str, tuple[int, tuple[int, int] | None]]:
    """Number and stamp of each picture by name; of several of one name the last."""
    with _opened(path) as file:
        rows = file.execute("SELECT name, id, size, changed FROM pictures ORDER BY id")
        return {
            _text(name): (number, None if size is None else (size, at))
            for name, number, size, at in rows
        }


def read_items(path: Path, ids: Sequence[int]) -> list[tuple[int, tuple[np.ndarray, bytes]]]:
    """Number, and vector and thumbnail, of some pictures."""
    if not ids:
        return []
    with _opened(path) as file:
        found = []
        for number in ids:
            row = file.execute(
                "SELECT vector, jpeg FROM pictures JOIN thumbnails USING (id) WHERE id = ?",
                (number,),
            ).fetchone()
            if row is None:
                raise damaged(path, f"picture {number} is missing")
            found.append((number, (np.frombuffer(row[0], "<f4"), row[1])))
        return found


def read_thumbnail(path: Path, number: int, build: str) -> bytes | None:
    """A picture's thumbnail; None if it is no longer there.

    Args:
        path: the file.
        number: the picture's.
        build: what ``about`` said of it when the number was read: another one is another file, in
            which numbers mean other pictures.
    """
    with _opened(path) as file:
        row = file.execute(
            "SELECT jpeg FROM thumbnails WHERE id = ? AND ? = "
            "(SELECT value FROM about WHERE key = 'build')",
            (number, build),
        ).fetchone()
        return None if row is None else row[0]


def damaged(path: Path, why: object) -> RunFolderError:
    """The error for a file that nobody can use."""
    return RunFolderError(
        f"{path} is damaged ({why}); restore it from a backup, or delete it and make it anew: "
        "fedss index RUN PICTURES for index.sqlite, fedss enrol for enrolled.sqlite"
    )


def _bytes(text: str | None) -> bytes | None:
    return None if text is None else text.encode("utf-8", "surrogateescape")


def _text(name: bytes) -> str:
    # Not os.fsdecode: an index holds the same names whatever this process's locale is.
    return name.decode("utf-8", "surrogateescape")


def _about(file: sqlite3.Connection, path: Path) -> dict[str, str]:
    about = dict(file.execute("SELECT key, value FROM about").fetchall())
    if about.get("format") != _FORMAT:
        raise damaged(path, f"expected format {_FORMAT}, found {about.get('format')}")
    return about


@contextmanager
def _opened(path: Path, mode: str = "rw") -> Iterator[sqlite3.Connection]:
    """A connection of its own for each use: any thread may make one, and none is left open.

    For reading too it may write, if it can: where a process was killed while it wrote, the first
    one that opens the file undoes what is half done.
    """
    if mode != "rwc" and not is_there(path):
        raise RunFolderError(f"{path} is missing: fedss index RUN PICTURES makes it")
    advice = "make room or mend the place, then start the same command again"
    try:
        with writing(path.parent, advice):
            uri = f"{path.absolute().as_uri()}?mode={mode}"
            file = sqlite3.connect(uri, uri=True, timeout=_PATIENCE, isolation_level=None)
            with closing(file):
                try:
                    yield file
                    if file.in_transaction:
                        file.execute("COMMIT")
                except BaseException:
                    if file.in_transaction:
                        file.execute("ROLLBACK")
                    raise
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY:
            raise RunFolderError(
                f"{path} is in use by another fedss process; wait for it and try again"
            ) from error
        if error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_ERROR:
            raise damaged(path, error) from error
        raise RunFolderError(f"cannot use {path}: {error}; {advice}") from error
    except sqlite3.DatabaseError as error:
        raise damaged(path, error) from error
