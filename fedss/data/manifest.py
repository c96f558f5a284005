"""Images listed in a CSV: which class, whose, and what for."""

import difflib
import hashlib
import io
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, NamedTuple

from fedss.data.archive import Archive, find_archive, find_manifest, open_archive
from fedss.data.cache import stamp, stamp_files
from fedss.data.images import LazyNames, repeated
from fedss.data.names import composed
from fedss.data.parquet import read_parquet
from fedss.data.table import read_table
from fedss.errors import DataError

COLUMNS = ("image", "label", "client")
NOBODY = "nobody"
"""The client of images of which nobody says whose they are."""
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
    ``remarks`` and ``passed_over`` go into the ``Dataset``. Images in an ``archive`` have paths as
    if it was a folder.
    """

    source: Path
    root: str
    rows: Sequence[ListedImage]
    lists: Mapping[str, Path] = field(default_factory=dict)
    published: bool = False
    remarks: tuple[str, ...] = ()
    passed_over: Mapping[str, int] = field(default_factory=dict)
    archive: Archive | None = None

    def file(self, row: ListedImage) -> str:
        """Path of the image."""
        return self.path(row.name)

    def path(self, name: str) -> str:
        """Path of the image of a name."""
        return os.path.join(self.root, name)

    @cached_property
    def _packed(self) -> frozenset[str]:
        return frozenset(self.archive.names if self.archive else ())

    def is_there(self, row: ListedImage) -> bool:
        """Whether there is a file."""
        file = self.file(row)
        return self.archive.inside(file) in self._packed if self.archive else os.path.isfile(file)

    def open(self, file: str) -> str | BinaryIO:
        """What ``decode`` reads of a path of ``file``."""
        return io.BytesIO(self.archive.read(self.archive.inside(file))) if self.archive else file

    def stamp(self, files: Iterable[str]) -> str:
        """As ``stamp_files``; of an archive's files the path of each, and the archive's stamp."""
        if self.archive is None:
            return stamp_files(files)
        digest = hashlib.sha256(repr(stamp(self.archive.path)).encode())
        for file in files:
            digest.update(f"{file}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def where(self, row: ListedImage) -> str:
        """The row's place, for messages."""
        path = self.lists.get(row.split or "", self.source)
        return f"{path}, line {row.line}" if row.line else row.name


def read_manifest(
    path: Path, *, called: Mapping[str, str] | None = None, dealt: bool = False
) -> Listing:
    """The lines of a CSV in UTF-8 with the columns image, label, client and perhaps split.

    ``image`` is a file, relative to the CSV's folder or absolute. ``split`` is ``train``, ``test``
    (each such image is searched among all the others), ``query`` and ``gallery`` (instead of
    ``test``), or ``validation`` (like ``test``, for choosing settings). Opens no image.

    Args:
        path: The CSV; the same as Parquet (``.parquet``); an archive that has one
            (``find_manifest``) and the images that it lists; or a CSV in an archive, as if that
            was a folder: ``photos.zip/list.csv``.
        called: What a column is called in this file, where it is called otherwise.
        dealt: Images get other clients, so the column client may be missing.

    Raises:
        DataError: Anything amiss with the file or a line; says where and what to do.
    """
    archive, content = None, None
    if (place := find_archive(path)) is not None:
        archive = open_archive(place[0])
        inner = place[1] or find_manifest(archive)
        if inner is None or inner not in archive.names:
            what = f"no {inner} in it" if inner else "no CSV in it, not within folders"
            raise DataError(f"{archive.path}: expected a CSV that lists the images; {what}")
        path, content = archive.path / inner, archive.read(inner)
    root = os.path.abspath(path.parent)
    rows: list[ListedImage] = []
    spare = ("client",) if dealt else ()
    if content is None and path.suffix.lower() == ".parquet":
        table = read_parquet(path, COLUMNS, "split", spare=spare, called=called)
    else:
        table = read_table(path, COLUMNS, "split", spare=spare, called=called, content=content)
    place_of = {column: i for i, column in enumerate(table.columns)}
    for line, cells in table.rows:
        name = listed_name(root, cells[0])
        split = sys.intern(cells[place_of["split"]]) if "split" in place_of else None
        if split is not None and split not in SPLITS:
            near = difflib.get_close_matches(split.lower(), SPLITS, 1)
            raise DataError(
                f"{path}, line {line}: expected split to be one of {', '.join(SPLITS)}, "
                f"got {split!r}" + (f"; is {near[0]!r} meant?" if near else "")
            )
        client = cells[place_of["client"]] if "client" in place_of else NOBODY
        # Of millions of lines, each name is kept once.
        client, label = sys.intern(composed(client)), sys.intern(composed(cells[1]))
        rows.append(ListedImage(client, label, name, split, line))
    names = LazyNames(len(rows), lambda i: rows[i].name)
    check_listed_once(path, names, lambda i: rows[i].line)
    return Listing(path, root, rows, remarks=table.remarks, archive=archive)


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
