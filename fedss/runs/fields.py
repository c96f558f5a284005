"""The JSON of a run folder, value by value: what is damaged says where, and what to do about it."""

import json
import math
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedss.errors import RunFolderError

# What to do about a damaged file; for all others `_AGAIN`.
_ADVICE = {
    "summary.json": "delete it and start this folder's fedss command again, which writes it anew",
    "retrieval.npz": "delete it: the report is then written without images",
    "confusions.npz": "delete it: the report is then written without images",
    "verification.json": "delete it and run fedss evaluate on this run, which measures these "
    "figures again; without them the report is written, too",
    "floors.json": "delete it: the report is then written without floors",
    "by_class.json": "delete it: the report is then written without intervals",
    "augmentation.npz": "delete it: the report is then written without these images",
}
_AGAIN = "restore it from a copy, or run again in another folder"
_EXACT = 2**53  # integers below are exact as floats


def damaged(where: Path | str, what: str) -> RunFolderError:
    """The error that says what is wrong ``where`` (a file, or a line of it) and what to do."""
    advice = _ADVICE.get(Path(str(where)).name.partition(",")[0], _AGAIN)
    return RunFolderError(f"{where}: {what}; {advice}")


def parse_json(text: str | bytes, where: Path | str) -> Any:
    """The value of a JSON text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise damaged(where, f"damaged JSON ({error})") from error


def read_bytes(path: Path) -> bytes:
    """A file's content."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise damaged(path, f"cannot be read ({error})") from error


def read_fields(path: Path) -> "Fields":
    """A file's JSON object."""
    return Fields(parse_json(read_bytes(path), path), path)


class Fields:
    """A JSON object whose values are checked as they are taken.

    Args:
        value: what was read; anything but an object is an error.
        where: the file, or a line of it, for the error.

    Raises:
        RunFolderError: as each method does, where a key is missing or its value of another type.
    """

    def __init__(self, value: Any, where: Path | str) -> None:
        self.where = where
        if not isinstance(value, dict):
            raise damaged(where, f"expected an object, got {reprlib.repr(value)}")
        self.value: dict[str, Any] = value

    def __contains__(self, key: str) -> bool:
        return key in self.value

    def __iter__(self) -> Iterator[str]:
        return iter(self.value)

    def any(self, key: str) -> Any:
        """Whatever is there."""
        if key not in self.value:
            raise damaged(self.where, f"{key!r} is missing")
        return self.value[key]

    def wrong(self, key: str, expected: str) -> RunFolderError:
        """The error for a value that is not what was expected."""
        got = reprlib.repr(self.value.get(key))
        return damaged(self.where, f"{key!r}: expected {expected}, got {got}")

    def number(self, key: str) -> Any:
        """An int or a float; NaN in place of an infinite one."""
        number = self.any(key)
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise self.wrong(key, "a number")
        try:
            if not math.isfinite(number):
                return math.nan
            return number if abs(number) < _EXACT else float(number)
        except OverflowError as error:
            raise self.wrong(key, "a number") from error

    def integer(self, key: str) -> int:
        """An integer below 2^53."""
        number = self.any(key)
        if isinstance(number, bool) or not isinstance(number, int):
            raise self.wrong(key, "an integer")
        if abs(number) >= _EXACT:
            raise self.wrong(key, "below 2^53")
        return number

    def share(self, key: str) -> float:
        """A number from 0 to 1."""
        share = self.number(key)
        if not 0 <= share <= 1:
            raise self.wrong(key, "a share from 0 to 1")
        return float(share)

    def text(self, key: str) -> str:
        """A string."""
        text = self.any(key)
        if not isinstance(text, str):
            raise self.wrong(key, "a string")
        return text

    def list(self, key: str) -> Sequence[Any]:
        """A list of anything."""
        found = self.any(key)
        if not isinstance(found, list):
            raise self.wrong(key, "a list")
        return found

    def object(self, key: str) -> "Fields":
        """An object within this one."""
        return Fields(self.any(key), self.where)

    def objects(self, key: str) -> "Sequence[Fields]":
        """A list of objects."""
        return [Fields(value, self.where) for value in self.list(key)]

    def numbers(self, key: str) -> Mapping[str, Any]:
        """An object of numbers."""
        found = self.object(key)
        return {name: found.number(name) for name in found}

    def unless_null(self, key: str, read: Callable[[str], Any]) -> Any:
        """What ``read``, a method of this object, gives; None for a null."""
        return None if self.any(key) is None else read(key)
