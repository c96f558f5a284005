"""Pictures listed in a CSV: which class, whose, and what for."""

import difflib
import hashlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fedss.data.cache import BrokenPicturesError, all_colourless, decode_files, stamp_files
from fedss.data.images import (
    Dataset,
    Images,
    LazyNames,
    RetrievalTask,
    repeated,
    unanswerable,
)
from fedss.data.missing import why_missing
from fedss.data.names import composed, look_alikes
from fedss.data.table import read_table
from fedss.errors import DataError
from fedss.text import counted

COLUMNS = ("image", "label", "client")
SPLITS = ("train", "query", "gallery", "test", "validation")


class Row(NamedTuple):
    """One listed picture. Rows sort by (client, label, name): the order of all pictures.

    Attributes:
        client: Who holds it.
        label: Its class.
        name: Its file relative to the data set's root, with forward slashes; absolute if it is
            not below the root.
        split: One of SPLITS; None where the list does not say.
        line: Its line in the list; 0 where the row comes from a folder.
    """

    client: str
    label: str
    name: str
    split: str | None
    line: int


@dataclass(frozen=True)
class Listing:
    """Pictures of a data set, none of them opened: ``rows`` from a CSV or a folder ``source``.

    Attributes:
        source: What lists the pictures.
        root: The folder that names are relative to.
        rows: The pictures.
        lists: The file that lists a split's pictures, where that is not ``source``.
        published: The list is someone else's and not to be mended: pictures for testing that no
            other one could match are left out as ``Dataset.unpaired``.
        remarks: What is not as published, or not read, for ``Dataset.remarks``.
        passed_over: Files and folders that are none of the pictures; see ``fedss.data.folder``.
    """

    source: Path
    root: str
    rows: Sequence[Row]
    lists: Mapping[str, Path] = field(default_factory=dict)
    published: bool = False
    remarks: tuple[str, ...] = ()
    passed_over: Mapping[str, int] = field(default_factory=dict)

    def file(self, row: Row) -> str:
        """The picture's file."""
        return os.path.join(self.root, row.name)

    def where(self, row: Row) -> str:
        """The row's place, for messages."""
        path = self.lists.get(row.split or "", self.source)
        return f"{path}, line {row.line}" if row.line else row.name


def read_rows(path: Path) -> Listing:
    """The lines of a CSV in UTF-8 with the columns image, label, client and perhaps split.

    ``image`` is a file, relative to the CSV's folder or absolute. ``split`` is ``train``, ``test``
    (each such picture is searched among all the others), ``query`` and ``gallery`` (instead of
    ``test``), or ``validation`` (like ``test``, for choosing settings). Opens no picture.

    Raises:
        DataError: Anything amiss with the file or a line; says where and what to do.
    """
    root = os.path.abspath(path.parent)
    rows: list[Row] = []
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
        rows.append(Row(client, label, name, split, line))
    names = LazyNames(len(rows), lambda i: rows[i].name)
    check_listed_once(path, names, lambda i: rows[i].line)
    return Listing(path, root, rows, remarks=table.remarks)


def listed_name(root: str, image: str) -> str:
    """The name (see ``Row``) of a picture that a CSV in the folder ``root``, absolute, lists."""
    file = os.path.normpath(os.path.join(root, image))
    return file.removeprefix(os.path.join(root, "")).replace(os.sep, "/")


def check_listed_once(path: Path, names: Sequence[str], line: Callable[[int], int]) -> None:
    """Refuse a CSV that lists a picture twice.

    Args:
        path: The CSV, for the message.
        names: The pictures, as ``listed_name`` gives them.
        line: The line of each, by its position in ``names``.

    Raises:
        DataError: One of them is there twice.
    """
    twice = repeated(LazyNames(len(names), lambda i: os.path.normcase(names[i])))
    if twice is not None:
        first, second, *_ = (i for i, name in enumerate(names) if os.path.normcase(name) == twice)
        raise DataError(
            f"{path}, line {line(second)}: {names[second]} is listed already in line "
            f"{line(first)}; each picture has one line, with one class and one client: remove one "
            "of the lines"
        )


def build_dataset(
    kind: str,
    listing: Listing,
    *,
    image_size: int,
    channels: int | None,
    test_classes: float,
    skip_broken: bool,
    cache: Path | None,
    seed: int,
    at_site: bool,
) -> Dataset:
    """Decode listed pictures into a ``Dataset``; without a test it holds classes out (``arrange``).

    Args:
        kind: The data set's name.
        listing: The pictures.
        image_size: Side of the pictures after cutting to the central square and resizing.
        channels: 1 or 3; None is 1 if every picture is stored in grayscale, else 3.
        test_classes: Share of the classes to hold out, where the listing names no test pictures;
            that of a few classes is up to chance. 0: none, and no test.
        skip_broken: Leave out pictures that are missing or cannot be read; ``Dataset.skipped``
            names them. The rest is as if they had never been listed.
        cache: Folder for the decoded pictures; see ``cache_folder``.
        seed: Decides which classes are held out.
        at_site: The pictures are a site's part of a federation. With the same seed and
            ``test_classes`` a class is trained on at all sites or at none, and a site may have no
            test. A column ``split`` is obeyed, and pictures for testing that have no other one of
            their class here are left out as ``Dataset.unpaired``.

    Returns:
        Dataset of uint8 [N, C, image_size, image_size]; the same whatever the order of the rows.

    Raises:
        DataError: Anything amiss with the pictures or an argument; says where and what to do.
    """
    if image_size < 1:
        raise DataError(f"image_size: expected at least 1, got {image_size}")
    if channels not in (None, 1, 3):
        raise DataError(f"channels: expected 1 (grayscale) or 3 (colour), got {channels}")
    rows, file = sorted(listing.rows), listing.file
    kept = [row for row in rows if os.path.isfile(file(row))]
    if len(kept) < len(rows) and not skip_broken:
        present = set(kept)
        first = next(row for row in rows if row not in present)
        advice = "Paths are relative to the CSV; mend them" if first.line else "Mend them"
        if listing.published:
            advice = "Unpack the rest of the archives there"
        raise DataError(
            f"{listing.where(first)}: no such picture file: {file(first)} "
            f"({len(rows) - len(kept)} of {len(rows)} are missing{why_missing(file(first))}). "
            f"{advice}, or leave missing pictures out with skip_broken (--skip-broken)"
        )

    while True:
        if not kept:
            raise DataError(
                f"none of the {len(rows)} pictures can be read, the first one is {file(rows[0])}"
            )
        splits, unpaired = arrange(replace(listing, rows=kept), test_classes, seed, at_site=at_site)
        files = {split: _files(listing, members) for split, members in splits.items()}
        stamps = {split: stamp_files(paths) for split, paths in files.items()}
        depth = channels
        if depth is None:
            stamp = "".join(stamps.values())
            depth = 1 if all_colourless(_files(listing, kept), stamp, cache=cache) else 3
        pixels: dict[str, np.ndarray] = {}
        reasons: dict[str, str] = {}
        for split in splits:
            try:
                pixels[split] = decode_files(
                    files[split],
                    stamps[split],
                    image_size,
                    depth,
                    cache=cache,
                    title=f"{kind}: {split}",
                    expect_broken=skip_broken,
                )
            except BrokenPicturesError as error:
                reasons |= error.reasons
        if not reasons:
            break
        if not skip_broken:
            raise BrokenPicturesError(reasons, len(kept))
        # A class may have become too small to test, so begin again as if these had not been.
        kept = [row for row in kept if file(row) not in reasons]

    readable = {row.name for row in kept}
    skipped = tuple(row.name for row in rows if row.name not in readable)
    remarks = [*listing.remarks, *look_alikes({row.label for row in rows}, "classes")]
    remarks += look_alikes({row.client for row in rows}, "clients")
    data = assemble(kind, splits, pixels, unpaired, skipped, tuple(remarks))
    return replace(data, passed_over=listing.passed_over)


def assemble(
    kind: str,
    splits: Mapping[str, Sequence[Row]],
    pixels: Mapping[str, np.ndarray],
    unpaired: Sequence[Row],
    skipped: tuple[str, ...] = (),
    remarks: tuple[str, ...] = (),
) -> Dataset:
    """The ``Dataset`` of rows as ``arrange`` gives them, with the ``pixels`` of each split."""
    images: dict[str, Images] = {}
    for split, members in splits.items():
        # Queries and gallery are compared, so they number classes and clients alike.
        pair = ("query", "gallery") if split in ("query", "gallery") else (split,)
        images[split] = _images(pixels[split], members, [r for part in pair for r in splits[part]])
    query = images.get("test", images.get("query"))
    test = RetrievalTask(query, images.get("gallery")) if query is not None else None
    validation = RetrievalTask(images["validation"]) if "validation" in images else None
    left_out = tuple(row.name for row in unpaired)
    train = images.get("train")
    if train is None:
        # A list to judge a trained model on.
        shape = next(iter(images.values())).pixels.shape[1:]
        train = _images(np.empty((0, *shape), np.uint8), [], [])
    return Dataset(kind, train, test, validation, skipped, left_out, remarks)


def _files(listing: Listing, rows: Sequence[Row]) -> LazyNames:
    return LazyNames(len(rows), lambda i: listing.file(rows[i]))


def arrange(
    listing: Listing, test_classes: float, seed: int, *, at_site: bool
) -> tuple[dict[str, list[Row]], list[Row]]:
    """The rows of each split, in order, and the rows left out as unpaired.

    The splits are ``train``, ``test`` or ``query`` and ``gallery``, and ``validation``; those
    without a row are not there. Where no row is for testing, the classes whose ``lot`` is below
    ``test_classes`` are held out of training; the others are never tested. A held-out class of a
    single picture cannot be tested: the picture is left out.

    On one machine a test of unseen classes is a must (unless ``test_classes`` is 0): the class of
    the lowest lot among those of two or more pictures is always held out; and if all classes were,
    the one of the highest lot among the others is trained on.

    Of a published list, test and validation pictures that no other one could match are left out.

    At a site nothing is forced, so that a class is on the same side everywhere: lots alone decide,
    or, if there is a column ``split``, that column alone. Test, query and validation pictures that
    no picture here could match are left out, and so is a gallery without queries.

    Raises:
        DataError: No training pictures; ``test`` beside ``query`` or ``gallery``;
            ``test_classes`` out of range, or with no class that could be held out; at a site, all
            classes held out; elsewhere, a row for testing that no picture could match, or
            ``query`` or ``gallery`` alone.
    """
    splits: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for row in sorted(listing.rows):
        splits[row.split or "train"].append(row)
    to_test = splits["test"] or splits["query"] or splits["validation"]
    if not splits["train"] and (at_site or not to_test):
        raise DataError(
            f"no training pictures: {len(listing.rows)} rows, none with split 'train'; give some "
            "that split"
        )
    pair = [split for split in ("query", "gallery") if splits[split]]
    if pair and splits["test"]:
        raise DataError(
            f"both 'test' and {pair[0]!r} rows: use 'test' alone (each picture is searched among "
            "the others) or 'query' with 'gallery'"
        )
    if len(pair) == 1 and not at_site:
        other = "gallery" if pair == ["query"] else "query"
        raise DataError(
            f"{pair[0]!r} rows but no {other!r} rows: give both, or use 'test' for pictures that "
            "are each searched among the others"
        )
    # Another site may hold the test that this one's column does not name.
    named = listing.rows[0].split is not None if at_site else bool(pair or splits["test"])
    if not named:
        count = Counter(row.label for row in splits["train"])
        held_out = _held_out(count, test_classes, seed, at_site)
        splits["test"] = [row for row in splits["train"] if row.label in held_out]
        splits["train"] = [row for row in splits["train"] if row.label not in held_out]

    # RetrievalTask checks this too, but only once all pictures are decoded, and knows no lines.
    unpaired: list[Row] = []
    gallery = [row.label for row in splits["gallery"]]
    for split, others in (("test", None), ("validation", None), ("query", gallery)):
        members = splits[split]
        reasons = dict(unanswerable([row.label for row in members], others))
        listed = named or split == "validation"
        if reasons and listed and not (at_site or listing.published):
            position, reason = next(iter(reasons.items()))
            raise DataError(f"{listing.where(members[position])}, split {split!r}: {reason}")
        unpaired += [members[position] for position in reasons]
        splits[split] = [row for i, row in enumerate(members) if i not in reasons]
    if not splits["query"]:
        unpaired += splits.pop("gallery")
    return {split: members for split, members in splits.items() if members}, unpaired


def lot(seed: int, label: str) -> float:
    """A class's number from 0 to 1: SHA-256 of ``seed:label`` in UTF-8, divided by 2^256."""
    # Names of folders may hold bytes that are no UTF-8.
    digest = hashlib.sha256(f"{seed}:{label}".encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest) / 2**256


def _held_out(count: Mapping[str, int], test_classes: float, seed: int, at_site: bool) -> set[str]:
    """Of classes with their numbers of pictures, those held out; see ``arrange``."""
    if not 0.0 <= test_classes < 1.0:
        raise DataError(
            "test_classes, the share of the classes to hold out as a test: expected 0 (no test) or "
            f"more, and below 1, got {test_classes}"
        )
    lots = {label: lot(seed, label) for label in count}
    held_out = {label for label in count if lots[label] < test_classes}
    if at_site:
        if len(held_out) == len(count):
            raise DataError(
                f"nothing to train on at this site: all its classes ({len(count)}) are among those "
                f"that test_classes = {test_classes} and the seed {seed} hold out as the test at "
                "all sites; add pictures of other classes, leave this site out, or have the share "
                "lowered for all sites"
            )
        return held_out
    if test_classes == 0.0:
        return held_out
    eligible = [label for label, pictures in count.items() if pictures >= 2]
    if not eligible or len(count) < 2:
        raise DataError(
            "cannot hold out a class for testing: expected at least 2 classes, one of them with "
            f"2 or more pictures; got {counted(len(count), 'class')}, {len(eligible)} of "
            "them with 2 or more"
        )
    tested = min(eligible, key=lots.__getitem__)
    held_out.add(tested)
    if len(held_out) == len(count):
        held_out.remove(max((label for label in count if label != tested), key=lots.__getitem__))
    return held_out


def _images(pixels: np.ndarray, rows: Sequence[Row], numbered: Sequence[Row]) -> Images:
    class_names = sorted({row.label for row in numbered})
    client_names = sorted({row.client for row in numbered})
    label_of = {name: i for i, name in enumerate(class_names)}
    client_of = {name: i for i, name in enumerate(client_names)}
    return Images(
        pixels,
        np.fromiter((label_of[row.label] for row in rows), np.int64, len(rows)),
        np.fromiter((client_of[row.client] for row in rows), np.int64, len(rows)),
        class_names,
        client_names,
        [row.name for row in rows],
    )
