"""What the loaders of published data sets share: their files found, read line by line, counted."""

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedss.data.manifest import ListedImage, Listing
from fedss.errors import DataError


@dataclass(frozen=True)
class Counts:
    """Published numbers of a part of a data set; None where none is published."""

    images: int | None = None
    classes: int | None = None
    clients: int | None = None


def find(title: str, root: Path, wanted: Mapping[str, Sequence[str]]) -> dict[str, Path]:
    """The files and folders of a data set below ``root``, by the keys of ``wanted``.

    For each, ``wanted`` has the places where it may be, one of which must be there; those that end
    with a slash are folders. Links are followed. ``title`` is the data set's name, for messages.

    Raises:
        DataError: Something is nowhere, or at two places; says what was expected.
    """
    expected = "; ".join(" or ".join(places) for places in wanted.values())
    where = f"{root}: expected the folder of {title}, with {expected}"
    if not root.is_dir():
        what = "a file: unpack the archive" if root.exists() else "nothing there"
        raise DataError(f"{where}; got {what} (docs/datasets.md says where to get what)")
    paths, missing = {}, []
    for key, places in wanted.items():
        present = [
            place
            for place in places
            if ((root / place).is_dir() if place.endswith("/") else (root / place).is_file())
        ]
        if len(present) > 1:
            raise DataError(
                f"{root}: both {present[0]} and {present[1]} are there, and {title} is read from "
                "one of them; remove or rename the other"
            )
        if present:
            paths[key] = root / present[0]
        else:
            missing.append(" or ".join(places))
    if missing:
        names = sorted(os.listdir(root))
        seen = ", ".join(names[:8]) + (", …" if len(names) > 8 else "") or "nothing"
        what = f"missing: {'; '.join(missing)}; found: {seen}"
        if not paths:
            what = f"found none of these, but {seen}"
        raise DataError(f"{where}; {what} (docs/datasets.md says where to get what)")
    return paths


def read_lines(path: Path, form: str, pattern: str) -> Iterator[tuple[int, tuple[str, ...]]]:
    """The lines of a text file in UTF-8 that are not blank: number, and the groups of ``pattern``.

    The regular expression ``pattern`` matches a whole line without outer spaces; ``form`` is what a
    line looks like, for messages.

    Raises:
        DataError: The file cannot be read, or a line has another form.
    """
    matches = re.compile(pattern).fullmatch
    try:
        lines = path.read_bytes().decode("utf-8-sig").splitlines()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: expected lines {form!r} in UTF-8, got byte 0x{error.object[error.start]:02x} "
            f"at position {error.start}; is it another file, or an archive?"
        ) from error
    for number, line in enumerate(lines, 1):
        if line := line.strip():
            match = matches(line)
            if match is None:
                shown = line if len(line) <= 80 else line[:79] + "…"
                raise DataError(f"{path}, line {number}: expected {form!r}, got {shown!r}")
            yield number, match.groups()


def published_listing(
    paths: Mapping[str, Path],
    root: Path,
    rows: Sequence[ListedImage],
    counts: Mapping[str, Counts],
    remarks: Sequence[str] = (),
) -> Listing:
    """A listing of files that others have made, with remarks on what is not as published.

    ``paths``, from ``find``, has the file that lists each split; the first is the listing's source.
    ``counts`` has what was published of each split; the split "" is all images.
    """
    said = list(remarks)
    for split, expected in counts.items():
        of_split = [row for row in rows if not split or row.split == split]
        for what, number, names in (
            ("images", expected.images, {row.name for row in of_split}),
            ("classes", expected.classes, {row.label for row in of_split}),
            ("clients", expected.clients, {row.client for row in of_split}),
        ):
            if number is not None and len(names) != number:
                part = f"{split} {what}" if split else what
                said.append(f"{part}: the lists have {len(names):,}, published are {number:,}")
    times = Counter(row.name for row in rows)
    twice = [name for name, count in times.items() if count > 1]
    if twice:
        said.append(f"images listed more than once: {len(twice):,}, the first is {twice[0]}")
    trained = {row.name for row in rows if row.split == "train"}
    leaked = {row.name: None for row in rows if row.split != "train" and row.name in trained}
    if leaked:
        said.append(
            f"images listed both for training and for testing: {len(leaked):,}, the first is "
            f"{next(iter(leaked))}; figures of the test are better than on images never seen"
        )
    source = next(iter(paths.values()))
    return Listing(source, os.path.abspath(root), rows, paths, True, tuple(said))
