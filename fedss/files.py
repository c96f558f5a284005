"""Files that are written whole or not at all, and what a file is by its first bytes."""

import codecs
import json
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from fedss.errors import RunFolderError

_LITTER = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")


@contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """A file to write that gets its name only when it is whole and on the disk.

    Of several writers at once each puts its own whole file in place; the last one stays.
    """
    with replacing(path) as temporary, temporary.open("xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """:func:`atomic`, for a file that its writer opens, and sees to its being on the disk."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and str(error.filename) == str(temporary):
            error.filename, error.filename2 = str(path), None
        raise


def remove_litter(folder: Path, older_than: float = 0.0) -> None:
    """Delete what :func:`atomic` left in a folder (not below it) when its process was killed.

    Only what is ``older_than`` so many seconds: 0 takes the files of working writers too.
    """
    with suppress(OSError):
        for file in list(folder.iterdir()):
            if _LITTER.fullmatch(file.name):
                with suppress(OSError):
                    if not older_than or time.time() - file.stat().st_mtime > older_than:
                        file.unlink()


def write_file(path: Path, content: bytes) -> None:
    """:func:`atomic`, for content at hand."""
    with atomic(path) as file:
        file.write(content)


def write_json(path: Path, content: Any) -> None:
    """:func:`write_file` of a value as indented JSON."""
    write_file(path, (json.dumps(content, indent=2) + "\n").encode())


RUN_FOLDER_ADVICE = (
    "make room or check permissions, then start the same command again: it goes on from the last "
    "checkpoint, if there is one"
)


@contextmanager
def writing(folder: Path, advice: str = RUN_FOLDER_ADVICE) -> Iterator[None]:
    """Turn a failed write (a full disk, a read-only place) into a RunFolderError with advice."""
    try:
        yield
    except OSError as error:
        for place in (folder, *folder.parents):
            if place.is_file():
                raise RunFolderError(
                    f"cannot write into {folder}: expected a folder, found a file: {place}; "
                    "choose another place"
                ) from error
        place = error.filename2 or error.filename or folder
        raise RunFolderError(
            f"cannot write {place}: {error.strerror or error}; {advice}"
        ) from error


START_LENGTH = 512
"""Bytes that are enough to recognize a file."""

_WEB_PAGE = "is a web page: download the file itself"
_BEGINNINGS = {
    b"version https://git-lfs": "is a pointer of Git LFS, not the file it stands for: git lfs pull",
    b"<!doctype": _WEB_PAGE,
    b"<html": _WEB_PAGE,
    b"<?xml": "is XML, perhaps an error of the server that it was downloaded from",
    b"\x1f\x8b": "is compressed with gzip: unpack it first",
    b"bzh": "is compressed with bzip2: unpack it first",
    b"\xfd7zxz": "is compressed with xz: unpack it first",
    b"\x89hdf": "is HDF5, as Keras writes it",
}


def what_begins(start: bytes) -> str:
    """What a file is, and what to do, to follow its name; empty where its start does not tell."""
    text = start.removeprefix(codecs.BOM_UTF8).lstrip().lower()
    return next((what for beginning, what in _BEGINNINGS.items() if text.startswith(beginning)), "")
