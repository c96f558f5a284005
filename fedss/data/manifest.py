"""Pictures listed in a CSV: which class, whose, and what for."""

import csv
import difflib
import hashlib
import io
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedss.data.cache import BrokenPicturesError, all_colourless, decode_files
from fedss.data.images import Dataset, Images, RetrievalTask, unanswerable
from fedss.errors import DataError

COLUMNS = ("image", "label", "client")
SPLITS = ("train", "query", "gallery", "test", "validation")


@dataclass(frozen=True, order=True)
class Row:
    """One listed picture. Rows sort by (client, label, name): the order of all pictures.

    Attributes:
        client: Who holds it.
        label: Its class.
        name: Its file relative to the data set's root, with forward slashes.
        split: One of SPLITS; None where the list does not say.
        file: The file.
        where: File and line for messages; empty where the row comes from a folder.
    """

    client: str
    label: str
    name: str
    split: str | None
    file: Path
    where: str


def csv_dataset(
    path: str | Path,
    *,
    image_size: int = 64,
    channels: int | None = None,
    test_classes: float = 0.2,
    skip_broken: bool = False,
    cache: Path | None = None,
    seed: int = 0,
) -> Dataset:
    """Pictures from a CSV in UTF-8 with the columns image, label, client and perhaps split.

    ``image`` is a file, relative to the CSV's folder or absolute. ``split`` is ``train``, ``test``
    (each such picture is searched among all the others), ``query`` and ``gallery`` (instead of
    ``test``), or ``validation`` (like ``test``, for choosing settings). Without ``test``, ``query``
    and ``gallery`` some of the training classes are held out as the test, see ``arrange``.

    Args:
        path: The CSV.
        image_size: Side of the pictures after cutting to the central square and resizing.
        channels: 1 or 3; None is 1 if every picture is stored in grayscale, else 3.
        test_classes: Share of the classes to hold out, where the CSV names no test pictures.
        skip_broken: Leave out pictures that are missing or cannot be read; ``Dataset.skipped``
            names them. The rest is as if they had never been listed.
        cache: Folder for the decoded pictures; see ``cache_folder``.
        seed: Decides which classes are held out.

    Returns:
        Dataset of uint8 [N, C, image_size, image_size]; the same whatever the order of the lines.

    Raises:
        DataError: Anything amiss with the CSV or its pictures; says where and what to do.
    """
    return build_dataset(
        "csv",
        read_rows(Path(path)),
        image_size=image_size,
        channels=channels,
        test_classes=test_classes,
        skip_broken=skip_broken,
        cache=cache,
        seed=seed,
    )


def read_rows(path: Path) -> list[Row]:
    """The CSV's lines, checked one by one; opens no picture.

    Raises:
        DataError: See ``csv_dataset``.
    """
    rows: list[Row] = []
    seen: dict[str, int] = {}
    for line, values in read_table(path, COLUMNS, optional="split"):
        row = _row(path, f"{path}, line {line}", values)
        earlier = seen.setdefault(os.path.normcase(row.file), line)
        if earlier != line:
            raise DataError(
                f"{row.where}: {row.name} is listed already in line {earlier}; "
                "each picture has one class and one client: remove one of the lines"
            )
        rows.append(row)
    return rows


def read_table(
    path: Path, columns: Sequence[str], optional: str | None = None
) -> Iterator[tuple[int, dict[str, str]]]:
    """A CSV's lines that are not blank: line number, and cells by column, without outer spaces.

    Args:
        path: The CSV, in UTF-8, with a header line.
        columns: Those that must be there, with no cell empty. Others may be there too.
        optional: A column to mention in messages about the header.

    Raises:
        DataError: Anything amiss with the file, its header or a line; or no line at all.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: expected text in UTF-8, got byte 0x{error.object[error.start]:02x} at "
            f"position {error.start}. Save the file as UTF-8 (in Excel: 'CSV UTF-8')"
        ) from error
    except OSError as error:
        raise DataError(
            f"{path}: expected a CSV file with {_listed(columns)}; cannot open it: {error.strerror}"
        ) from error

    lines = csv.reader(io.StringIO(text, newline=""))
    empty = True
    try:
        header = [cell.strip() for cell in next(lines, [])]
        if not any(header):
            also = f"[,{optional}]" if optional else ""
            raise DataError(f"{path}: empty; expected a header line {','.join(columns)}{also}")
        _check_header(path, header, columns, optional)
        for cells in lines:
            if any(cell.strip() for cell in cells):
                empty = False
                where = f"{path}, line {lines.line_num}"
                yield lines.line_num, _cells(where, header, cells, columns)
    except csv.Error as error:
        raise DataError(f"{path}, line {lines.line_num}: not CSV: {error}") from error
    if empty:
        raise DataError(f"{path}: no pictures: there is a header line and nothing below it")


def _listed(columns: Sequence[str]) -> str:
    return f"the column{'s' if len(columns) > 1 else ''} {', '.join(columns)}"


def _check_header(
    path: Path, header: Sequence[str], columns: Sequence[str], optional: str | None
) -> None:
    missing = [column for column in columns if column not in header]
    if not missing:
        return
    hints = []
    for column in missing:
        near = difflib.get_close_matches(column, header, 1) or [
            found for found in header if found.lower() == column
        ]
        hints += [f"is {near[0]!r} meant as {column!r}?"] if near else []
    if len(header) == 1 and any(mark in header[0] for mark in ";\t"):
        hints.append("separate the columns with commas")
    raise DataError(
        f"{path}, line 1: expected {_listed(columns)}"
        + (f" and perhaps {optional}" if optional else "")
        + f"; missing: {', '.join(missing)}; found: {', '.join(header)}"
        + "".join(f"; {hint}" for hint in hints)
    )


def _cells(
    where: str, header: Sequence[str], cells: Sequence[str], columns: Sequence[str]
) -> dict[str, str]:
    if len(cells) > len(header):
        raise DataError(
            f"{where}: expected {len(header)} cells, got {len(cells)}; "
            'put a value with a comma in it between double quotes: "a,b"'
        )
    values = dict.fromkeys(header, "")
    values |= zip(header, (cell.strip() for cell in cells), strict=False)
    for column in columns:
        if not values[column]:
            raise DataError(f"{where}: empty {column}; fill it in or remove the line")
    return values


def _row(path: Path, where: str, values: Mapping[str, str]) -> Row:
    split = values.get("split")
    if split is not None and split not in SPLITS:
        near = difflib.get_close_matches(split.lower(), SPLITS, 1)
        raise DataError(
            f"{where}: expected split to be one of {', '.join(SPLITS)}, got {split!r}"
            + (f"; is {near[0]!r} meant?" if near else "")
        )
    root = os.path.abspath(path.parent)
    file = Path(os.path.normpath(os.path.join(root, values["image"])))
    name = file.relative_to(root) if file.is_relative_to(root) else file
    return Row(values["client"], values["label"], name.as_posix(), split, file, where)


def build_dataset(
    kind: str,
    rows: Sequence[Row],
    *,
    image_size: int,
    channels: int | None,
    test_classes: float,
    skip_broken: bool,
    cache: Path | None,
    seed: int,
) -> Dataset:
    """Decode listed pictures into a ``Dataset``; arguments as for ``csv_dataset``.

    Raises:
        DataError: See ``csv_dataset``.
    """
    if image_size < 1:
        raise DataError(f"image_size: expected at least 1, got {image_size}")
    if channels not in (None, 1, 3):
        raise DataError(f"channels: expected 1 (grayscale) or 3 (colour), got {channels}")
    rows = sorted(rows)
    kept = [row for row in rows if row.file.is_file()]
    if len(kept) < len(rows) and not skip_broken:
        missing = sorted(set(rows) - set(kept))
        first = missing[0]
        raise DataError(
            f"{first.where or first.name}: no such picture file: {first.file} "
            f"({len(missing)} of {len(rows)} are missing). Paths are relative to the CSV; mend "
            "them, or leave missing pictures out with skip_broken (--skip-broken)"
        )

    while True:
        if not kept:
            raise DataError(
                f"none of the {len(rows)} pictures can be read, the first one is {rows[0].file}"
            )
        splits = arrange(kept, test_classes, seed)
        depth = channels or (1 if all_colourless([r.file for r in kept], cache=cache) else 3)
        images: dict[str, Images] = {}
        reasons: dict[Path, str] = {}
        for split, members in splits.items():
            try:
                pixels = decode_files(
                    [row.file for row in members],
                    image_size,
                    depth,
                    cache=cache,
                    title=f"{kind}: {split}",
                    expect_broken=skip_broken,
                )
            except BrokenPicturesError as error:
                reasons |= error.reasons
                continue
            # Queries and gallery are compared, so they number classes and clients alike.
            pair = ("query", "gallery") if split in ("query", "gallery") else (split,)
            images[split] = _images(pixels, members, [r for part in pair for r in splits[part]])
        if not reasons:
            break
        if not skip_broken:
            raise BrokenPicturesError(reasons, len(kept))
        # A class may have become too small to test, so begin again as if these had not been.
        kept = [row for row in kept if row.file not in reasons]

    if "test" in images:
        test = RetrievalTask(images["test"])
    else:
        test = RetrievalTask(images["query"], images["gallery"])
    validation = RetrievalTask(images["validation"]) if "validation" in images else None
    readable = {row.name for row in kept}
    skipped = tuple(row.name for row in rows if row.name not in readable)
    return Dataset(kind, images["train"], test, validation, skipped)


def arrange(rows: Sequence[Row], test_classes: float, seed: int) -> dict[str, list[Row]]:
    """The rows of each split, in order: ``train``, then ``test`` or ``query`` and ``gallery``.

    Where no row is for testing, a share ``test_classes`` of the training classes is held out: at
    least one, only classes of two or more pictures, and never all classes. Which ones depends on
    the seed and the class names alone.

    Raises:
        DataError: No training or test pictures, a query that nothing could match, ``test``
            beside ``query`` or ``gallery``, or one of these two alone.
    """
    splits: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for row in sorted(rows):
        splits[row.split or "train"].append(row)
    if not splits["train"]:
        raise DataError(
            f"no training pictures: {len(rows)} rows, none with split 'train'; give some that split"
        )
    pair = [split for split in ("query", "gallery") if splits[split]]
    if pair and splits["test"]:
        raise DataError(
            f"both 'test' and {pair[0]!r} rows: use 'test' alone (each picture is searched among "
            "the others) or 'query' with 'gallery'"
        )
    if len(pair) == 1:
        other = "gallery" if pair == ["query"] else "query"
        raise DataError(
            f"{pair[0]!r} rows but no {other!r} rows: give both, or use 'test' for pictures that "
            "are each searched among the others"
        )
    if not pair and not splits["test"]:
        held_out = _held_out(splits["train"], test_classes, seed)
        splits["test"] = [row for row in splits["train"] if row.label in held_out]
        splits["train"] = [row for row in splits["train"] if row.label not in held_out]

    # RetrievalTask checks this too, but only once all pictures are decoded, and knows no lines.
    gallery = [row.label for row in splits["gallery"]]
    for split, others in (("test", None), ("validation", None), ("query", gallery)):
        for position, reason in unanswerable([row.label for row in splits[split]], others):
            row = splits[split][position]
            raise DataError(f"{row.where or row.name}, split {split!r}: {reason}")
    return {split: members for split, members in splits.items() if members}


def _held_out(train: Collection[Row], test_classes: float, seed: int) -> set[str]:
    if not 0.0 < test_classes < 1.0:
        raise DataError(
            "nothing to evaluate: no test pictures are listed, and test_classes, the share of the "
            f"classes to hold out as a test, is {test_classes}; expected more than 0 and below 1"
        )
    count = Counter(row.label for row in train)
    eligible = [label for label, pictures in count.items() if pictures >= 2]
    wanted = min(max(1, round(test_classes * len(count))), len(eligible), len(count) - 1)
    if wanted < 1:
        raise DataError(
            "cannot hold out a class for testing: expected at least 2 classes, one of them with "
            f"2 or more pictures; got {len(count)} classes, {len(eligible)} of them with 2 or more"
        )

    def lot(label: str) -> bytes:
        return hashlib.sha256(f"{seed}:{label}".encode()).digest()

    return set(sorted(eligible, key=lot)[:wanted])


def _images(pixels: np.ndarray, rows: Sequence[Row], numbered: Sequence[Row]) -> Images:
    class_names = sorted({row.label for row in numbered})
    client_names = sorted({row.client for row in numbered})
    label_of = {name: i for i, name in enumerate(class_names)}
    client_of = {name: i for i, name in enumerate(client_names)}
    return Images(
        pixels,
        np.array([label_of[row.label] for row in rows], np.int64),
        np.array([client_of[row.client] for row in rows], np.int64),
        class_names,
        client_names,
        [row.name for row in rows],
    )
