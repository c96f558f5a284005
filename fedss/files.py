"""Files that are whole or not there at all."""

import glob
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from fedss.errors import RunFolderError


@contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """A file to write that gets its name only when it is whole and on the disk."""
    # Random, since two processes may write the same file at once (the shared cache, a report).
    # Whoever finishes first removes all attempts begun before: those that kill -9 left behind,
    # and those of others still at it, whose file then counts as replaced by this one.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        attempts = list(path.parent.glob(f".{glob.escape(path.name)}.{'?' * 8}.tmp"))
        try:
            os.replace(temporary, path)
        except FileNotFoundError:
            if not path.exists():
                raise
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    for attempt in attempts:
        with suppress(OSError):
            attempt.unlink()


def write_file(path: Path, content: bytes) -> None:
    """:func:`atomic`, for content at hand."""
    with atomic(path) as file:
        file.write(content)


def write_json(path: Path, content: Any) -> None:
    """:func:`write_file` of a value as indented JSON."""
    write_file(path, (json.dumps(content, indent=2) + "\n").encode())


def read_json(path: Path) -> Any:
    """A JSON file's value.

    Raises:
        RunFolderError: the file is missing or damaged.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise RunFolderError(f"{path} is missing: is {path.parent} a run folder?") from error
    except ValueError as error:
        raise RunFolderError(
            f"{path} is damaged ({error}); restore it from a backup, or delete {path.parent} "
            "and start again"
        ) from error


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn a failed write (a full disk, a read-only place) into a RunFolderError."""
    try:
        yield
    except OSError as error:
        raise RunFolderError(
            f"cannot write {error.filename or folder}: {error.strerror or error}; make room or "
            "mend the place, then start the same command again: it goes on from the last checkpoint"
        ) from error
