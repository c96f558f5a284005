"""The JSON of a run folder, read by its types: what is damaged says where, and what to do."""

import json
import math
import reprlib
from collections.abc import Mapping, Sequence, Set
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, NotRequired, get_args, get_origin, get_type_hints, is_typeddict

from fedss.errors import RunFolderError

_AGAIN = "restore it from a copy, or run again in another folder"
# What to do about a damaged file; for all others `_AGAIN`.
_ADVICE = {
    "config.json": f"if this is not the run folder, name the run folder itself; {_AGAIN}",
    "summary.json": "delete it and start this folder's fedss command again, which writes it anew",
    "retrieval.npz": "delete it: the report is then written without images",
    "confusions.npz": "delete it: the report is then written without images",
    "verification.json": "delete it and run fedss evaluate on this run, which measures these "
    "figures again; without them the report is written, too",
    "floors.json": "delete it: the report is then written without floors",
    "by_class.json": "delete it: the report is then written without intervals",
    "augmentation.npz": "delete it: the report is then written without these images",
    "audit.json": "delete it and run fedss audit on this run, which writes it anew",
}
_EXACT = 2**53  # integers below are exact as floats


def damaged(where: Path | str, what: str) -> RunFolderError:
    """The error that says what is wrong ``where`` (a file, or a line of it) and what to do."""
    advice = _ADVICE.get(Path(str(where)).name.partition(",")[0], _AGAIN)
    return RunFolderError(f"{where}: {what}; {advice}")


def parse_json(text: str | bytes, where: Path | str) -> Any:
    """The value of a JSON text."""
    try:
        # Else of bytes that are no text the error would name the encoding that json guesses.
        return json.loads(text if isinstance(text, str) else text.decode())
    except (ValueError, RecursionError) as error:
        raise damaged(where, f"damaged JSON ({error})") from error


def read_bytes(path: Path) -> bytes:
    """A file's content."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise damaged(path, f"cannot be read ({error})") from error


def read_file(kind: Any, path: Path) -> Any:
    """A file's JSON object, as :func:`read_as` reads it."""
    return read_as(kind, parse_json(read_bytes(path), path), path)


Share = Annotated[float, "share"]
"""A number from 0 to 1."""
_SHARES = {"eer", "far", "tar", "fpir", "dir", "dir_low", "dir_high"}  # by name, of any class
_WORDS = {int: "an integer", float: "a number", str: "a string"}


def read_as(kind: Any, value: Any, where: Path | str, key: str = "") -> Any:
    """A JSON value, checked to be what a type says.

    Args:
        kind: int (below 2^53), float (NaN in place of an infinite one), bool, str, ``Share``, Any,
            a mapping from str or a sequence of these, one of them or None; a ``TypedDict``, whose
            other keys stay as they are, or a dataclass, of these.
        value: what was read, under the ``key`` and ``where`` (a file, or a line of it).

    Raises:
        RunFolderError: it is of another type, or lacks a key.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any or kind is bool:
        return value if kind is Any else bool(value)
    if origin in (NotRequired, UnionType):
        nothing = value is None and origin is UnionType
        return None if nothing else read_as(inner[0], value, where, key)
    if origin in (list, tuple, Sequence):
        if not isinstance(value, list):
            raise wrong(where, key, "a list", value)
        of_kind = [read_as(inner[0], each, where, key) for each in value]
        return tuple(of_kind) if origin is tuple else of_kind
    if kind not in (int, float, str, Share):
        if not isinstance(value, dict):
            raise damaged(where, f"expected an object, got {reprlib.repr(value)}")
        if origin is Mapping:
            return {name: read_as(inner[1], each, where, name) for name, each in value.items()}
        return _read_object(kind, value, where)
    fits = isinstance(value, {float: int | float, Share: int | float}.get(kind, kind))
    if not fits or isinstance(value, bool):
        raise wrong(where, key, _WORDS.get(kind, "a share from 0 to 1"), value)
    if kind is str:
        return value
    if kind is int and abs(value) >= _EXACT:
        raise wrong(where, key, "below 2^53", value)
    try:
        finite = value if math.isfinite(value) else math.nan
    except OverflowError as error:
        raise wrong(where, key, "a number", value) from error
    if (kind is Share or key in _SHARES) and not 0 <= finite <= 1:
        raise wrong(where, key, "a share from 0 to 1", value)
    return finite if abs(finite) < _EXACT else float(finite)


def wrong(where: Path | str, key: str, expected: str, value: object) -> RunFolderError:
    """The error for a value that is not what was expected."""
    return damaged(where, f"{key!r}: expected {expected}, got {reprlib.repr(value)}")


def _read_object(kind: Any, value: dict[str, Any], where: Path | str) -> Any:
    kinds, needed = _hints(kind)
    read = {}
    for name, of in kinds.items():
        if name in value:
            read[name] = read_as(of, value[name], where, name)
        elif name in needed:
            raise damaged(where, f"{name!r} is missing")
    return {**value, **read} if is_typeddict(kind) else kind(**read)


@cache
def _hints(kind: Any) -> tuple[dict[str, Any], Set[str]]:
    kinds = get_type_hints(kind, include_extras=True)
    return kinds, getattr(kind, "__required_keys__", kinds.keys())
