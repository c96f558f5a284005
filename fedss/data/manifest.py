"""Images listed in a CSV: which class, whose, and what for."""

import difflib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from fedss.data.images import LazyNames, repeated
from fedss.data.names import composed
from fedss.data.table import read_table
from fedss.errors import DataError

COLUMNS = ("image", "label", "client")
SPLITS = ("train", "query", "gallery", "test", "validation")


class ListedImage(NamedTuple):
    """One listed image. Rows sort by (client, label, name): the order of all images.

    ``name`` is its file relative to the data set's root, with forward slashes, absolute if it is
    not below the root. ``split`` is one of SPLITS; None where the list does not say. ``line`` is 0
    where the row comes from a folder.
    """

    client: str
    label: str
    name: str
    split: str | None
    line: int


@dataclass(frozen=True)
class Listing:
    """Images of a data set, none of them opened: ``rows`` from a CSV or a folder ``source``.

    ``root`` is the folder that names are relative to, ``lists`` has the file that lists a split's
    images where that is not ``source``. A list that is ``published`` is someone else's and not to
    be mended: images for testing that no other one could match are left out as unpaired.
    ``remarks`` and ``passed_over`` go into the ``Dataset``.
    """

    source: Path
    root: str
    rows: Sequence[ListedImage]
    lists: Mapping[str, Path] = field(default_factory=dict)
    published: bool = False
    remarks: tuple[str, ...] = ()
    passed_over: Mapping[str, int] = field(default_factory=dict)

    def file(self, row: ListedImage) -> str:
        """Path of the image."""
        return os.path.join(self.root, row.name)

    def where(self, row: ListedImage) -> str:
        """The row's place, for messages."""
        path = self.lists.get(row.split or "", self.source)
        return f"{path}, line {row.line}" if row.line else row.name


def read_manifest(path: Path) -> Listing:
    """The lines of a CSV in UTF-8 with the columns image, label, client and perhaps split.

    ``image`` is a file, relative to the CSV's folder or absolute. ``split`` is ``train``, ``test``
    (each such image is searched among all the others), ``query`` and ``gallery`` (instead of
    ``test``), or ``validation`` (like ``test``, for choosing settings). Opens no image.

    Raises:
        DataError: Anything amiss with the file or a line; says where and what to do.
    """
    root = os.path.abspath(path.parent)
    rows: list[ListedImage] = []
    table = read_table(path, COLUMNS, optional="split")
    for line, (image, label, client, *rest) in table.rows:
        name = listed_name(root, image)
        split = sys.intern(rest[0]) if rest else None
        if split is not None and split not in SPLITS:
            near = difflib.get_close_matches(split.lower(), SPLITS, 1)
            raise DataError(
                f"{path}, line {line}: expected split to be one of {', '.join(SPLITS)}, "
                f"got {split!r}" + (f"; is {near[0]!r} meant?" if near else "")
            )
        # Of millions of lines, each name is kept once.
        client, label = sys.intern(composed(client)), sys.intern(composed(label))
        rows.append(ListedImage(client, label, name, split, line))
    names = LazyNames(len(rows), lambda i: rows[i].name)
    check_listed_once(path, names, lambda i: rows[i].line)
    return Listing(path, root, rows, remarks=table.remarks)


def listed_name(root: str, image: str) -> str:
    """The ``ListedImage.name`` of an image that a CSV in the folder ``root``, absolute, lists."""
    file = os.path.normpath(os.path.join(root, image))
    return file.removeprefix(os.path.join(root, "")).replace(os.sep, "/")


def check_listed_once(path: Path, names: Sequence[str], line: Callable[[int], int]) -> None:
    """Refuse a CSV that lists an image twice; ``line`` tells the line of ``names[i]``."""
    twice = repeated(LazyNames(len(names), lambda i: os.path.normcase(names[i])))
    if twice is not None:
        first, second, *_ = (i for i, name in enumerate(names) if os.path.normcase(name) == twice)
        raise DataError(
            f"{path}, line {line(second)}: {names[second]} is listed already in line "
            f"{line(first)}; each image has one line, with one class and one client: remove one "
            "of the lines"
        )
