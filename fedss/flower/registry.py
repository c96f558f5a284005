"""Who is who: the row of every class and the number of every client, as sites have named them."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedss.errors import RunFolderError
from fedss.files import write_json
from fedss.runs.fields import parse_json, read_bytes
from fedss.secret import derive


@dataclass(frozen=True)
class Growth:
    """How many classes and clients there are from a round (0-based) on."""

    round: int
    classes: int
    clients: int


@dataclass(frozen=True)
class Registry:
    """Classes in the order of their rows, and clients in that of their numbers. It only grows.

    Names are plain where ``secret`` is empty; else pseudonyms, and it shows that all were made with
    one secret; None: no site has registered. ``growth`` is the history, so that rounds which are
    run again see what they saw.
    """

    classes: tuple[str, ...] = ()
    clients: tuple[str, ...] = ()
    secret: str | None = None
    growth: tuple[Growth, ...] = ()

    def at(self, round: int) -> Growth:
        """The numbers of a round."""
        return next(g for g in reversed(self.growth) if g.round <= round)


def register(
    registry: Registry, classes: Iterable[str], clients: Iterable[str], round: int
) -> Registry:
    """The registry with new names behind the old ones, in sorted order.

    ``round`` (0-based) is the first that sees them; the first names of all are there from 0 on.
    """
    new_classes = sorted(set(classes).difference(registry.classes))
    new_clients = sorted(set(clients).difference(registry.clients))
    if not new_classes and not new_clients:
        return registry
    classes, clients = (*registry.classes, *new_classes), (*registry.clients, *new_clients)
    now = Growth(round if registry.growth else 0, len(classes), len(clients))
    before = tuple(g for g in registry.growth if g.round != now.round)
    return Registry(classes, clients, registry.secret, (*before, now))


def row_numbers(known: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """The places of ``names`` among the known ones, int32."""
    place = {name: i for i, name in enumerate(known)}
    return np.array([place[name] for name in names], np.int32)


def save_registry(path: Path, registry: Registry) -> None:
    """Write it, whole or not at all."""
    write_json(path, asdict(registry))


def load_registry(path: Path) -> Registry:
    """What :func:`save_registry` wrote before a checkpoint.

    Raises:
        RunFolderError: it is missing or damaged.
    """
    if not path.exists():
        raise RunFolderError(f"{path} is missing, but there is a checkpoint: {_NEEDED}")
    content = parse_json(read_bytes(path), path)
    try:
        growth = tuple(Growth(**entry) for entry in content["growth"])
        classes, clients = _texts(content["classes"]), _texts(content["clients"])
        (secret,) = _texts([content["secret"]])
        now = Growth(growth[-1].round, len(classes), len(clients))
        if growth[0].round != 0 or growth[-1] != now:
            raise ValueError("its names and its growth do not fit together")
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise RunFolderError(f"{path} is damaged ({error}): {_NEEDED}") from error
    return Registry(classes, clients, secret, growth)


_NEEDED = (
    "it says which class has which row, so this run cannot go on without it; restore it, or start "
    "again in another folder"
)


def _texts(names: Any) -> tuple[str, ...]:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"expected a list of names, got {str(names)[:50]}")
    if len(set(names)) < len(names):
        raise ValueError("a name is listed twice")
    return tuple(names)


def token(secret: bytes, kind: str, name: str) -> str:
    """A name's pseudonym at the server: HMAC-SHA256 of kind and name, 128 bits in hex.

    The same at all sites with one secret. Without the secret not even a guess can be checked.
    """
    return derive(secret, kind, name).hex()[:32]


def digest(*lists: Sequence[str]) -> str:
    """A short fingerprint of lists of names, by which site and server see whether they agree."""
    return hashlib.sha256(json.dumps(lists).encode()).hexdigest()[:32]
