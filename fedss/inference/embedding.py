"""A trained model used on image files: from files to embeddings with names."""

import io
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fedss.data.folder import besides, passed_over
from fedss.data.manifest import check_listed_once, listed_name
from fedss.data.missing import why_missing
from fedss.data.names import composed
from fedss.data.table import read_table
from fedss.errors import ConfigError, DataError
from fedss.files import write_file, writing
from fedss.inference.pixels import Read, read_images
from fedss.log import Progress, progress_log
from fedss.models import Embedder

LEAVE_OUT = "mend or remove it, or leave such images out with skip_broken (--skip-broken)"
"""What to do about an image that cannot be read, where one has the choice."""

LINKS = "symbolic links"
"""How links are counted in a folder to search in."""

_MOST_NAMED = 100  # of the images that cannot be read; more are counted

_ADVICE = "make room or check permissions, or choose another one (--out)"


@dataclass(frozen=True)
class Embeddings:
    """Embeddings of image files.

    Attributes:
        names: one per row, as given or the file's path.
        embeddings_ND: float32 [N, D], rows of length 1.
        skipped: files that could not be read, where that was asked for.
    """

    names: tuple[str, ...]
    embeddings_ND: np.ndarray
    skipped: tuple[str, ...] = ()


def embed_files(
    embedder: Embedder,
    paths: Sequence[str | Path],
    *,
    names: Sequence[str] | None = None,
    skip_broken: bool = False,
) -> Embeddings:
    """Embed image files: decoded as in training, a block at a time.

    Args:
        embedder: e.g. from ``fedss.load``.
        paths: image files.
        names: a name per image; None: its path.
        skip_broken: leave out files that cannot be read, and list them in ``skipped``.

    Raises:
        DataError: files that cannot be read (named), none at all, or a model that gives no finite
            numbers.
    """
    names = [str(path) for path in paths] if names is None else names
    broken: dict[int, str] = {}
    read: list[Read] = []
    log = progress_log()
    log(Progress("embed", 0, len(paths), "images"), False)
    for block in read_images(embedder, list(paths), thumbnails=False, broken=broken):
        read += block
        log(Progress("embed", len(read) + len(broken), len(paths), "images"), False)
    if not skip_broken:
        refuse_broken([(names[at], broken[at], "") for at in sorted(broken)])
    if not read:
        raise DataError(f"no readable image among the {len(paths)} given")
    return Embeddings(
        tuple(names[one.position] for one in read),
        np.stack([one.vector_D for one in read]),
        tuple(names[position] for position in sorted(broken)),
    )


def refuse_broken(broken: Sequence[tuple[str, str, str]]) -> None:
    """Name all images that cannot be read, at once: their names, why, and where they are listed.

    Raises:
        DataError: there are any.
    """
    if len(broken) == 1:
        ((name, why, where),) = broken
        raise DataError(f"{where}cannot read image {name}: {why}; {LEAVE_OUT}")
    if broken:
        each = [f"{where}{name}: {why}" for name, why, where in broken[:_MOST_NAMED]]
        each += [f"and {len(broken) - len(each):,} more"] if len(broken) > len(each) else []
        advice = LEAVE_OUT.replace(" it,", " them,")
        raise DataError(f"cannot read {len(broken):,} images: {'; '.join(each)}; {advice}")


@dataclass(frozen=True)
class ImageList:
    """Image files of a folder or a CSV (``source``, an absolute path), none of them opened."""

    source: Path
    root: Path  # what names are relative to: the folder, or that of the CSV
    # With forward slashes; absolute if a CSV names an image that is not below ``root``.
    names: tuple[str, ...]
    labels: tuple[str | None, ...]
    passed_over: Mapping[str, int] = field(default_factory=dict)  # how many, by kind
    remarks: tuple[str, ...] = ()
    lines: tuple[int, ...] = ()  # of a CSV

    @property
    def paths(self) -> list[Path]:
        """The images' files."""
        return [self.root / name for name in self.names]

    def where(self, position: int) -> str:
        """An image's place, for messages: "LIST, line 2: " of a CSV, of a folder nothing."""
        return f"{self.source}, line {self.lines[position]}: " if self.lines else ""

    def check_files(self) -> None:
        """Whether each image has a file.

        Raises:
            DataError: those that have none.
        """
        missing: list[tuple[str, str, str]] = []
        for position, path in enumerate(self.paths):
            try:
                path.stat()
            except OSError as error:
                hint = why_missing(str(path)) if len(missing) < _MOST_NAMED else ""
                why = f"{path}: {error.strerror}{hint}"
                missing.append((self.names[position], why, self.where(position)))
        refuse_broken(missing)


def list_images(path: Path) -> ImageList:
    """Image files in a folder (and below it), or in the ``image`` column of a CSV.

    An image's class is the name of the folder that it lies in (none for an image directly in
    ``path``), or what the CSV has in its column ``label``. In a folder, what training passes over
    is passed over, and so are symbolic links: what a folder holds cannot lead out of it or in a
    circle. A CSV lists an image once, by whatever path, as in training.

    Raises:
        DataError: no such place, no image in it, a folder that cannot be read, or anything
            amiss with the CSV.
    """
    source = root = path.resolve()
    over: Counter[str] = Counter()
    remarks: tuple[str, ...] = ()
    lines: tuple[int, ...] = ()
    if source.is_dir():
        names = _below(source, over)
        labels = [class_name(Path(name).parent.name) for name in names]
    elif source.is_file():
        # As in training: images lie beside the CSV that was named, be it a link.
        root = Path(os.path.abspath(path.parent))
        table = read_table(path, ("image",), optional="label")
        without = (
            () if "label" in table.columns else ("no column label: these images have no class",)
        )
        lines, rows = zip(*table.rows, strict=True)
        names = [listed_name(str(root), cells[0]) for cells in rows]
        check_listed_once(path, names, lines.__getitem__)
        labels = [class_name(cells[1]) if len(cells) > 1 else None for cells in rows]
        if "label" in table.columns and None in labels:
            without = (f"{labels.count(None):,} without a class: label is empty",)
        remarks = (*without, *table.remarks)
    else:
        raise DataError(f"{path}: expected a folder of images or a CSV, found neither")
    if not names:
        advice = "; list what links lead to in a CSV" if LINKS in over else ""
        raise DataError(
            f"{path}: no image found{besides(over)}{advice}; expected files such as 1.jpg"
        )
    return ImageList(source, root, tuple(names), tuple(labels), over, remarks, lines)


def class_name(text: str) -> str | None:
    """A class's name by the one rule for names (``composed``); None where nothing is left of it."""
    return composed(text) or None


def _below(root: Path, over: Counter[str]) -> list[str]:
    names: list[str] = []

    def fail(error: OSError) -> None:
        raise DataError(
            f"{error.filename}: cannot read this folder: {error.strerror}; mend its rights or "
            "move it away"
        ) from error

    for folder, below, files in os.walk(root, onerror=fail):
        inside = Path(folder).relative_to(root)
        entries = [(name, True) for name in below] + [(name, False) for name in files]
        below.clear()
        for name, is_folder in entries:
            is_link = os.path.islink(os.path.join(folder, name))
            if kind := passed_over(name, is_folder) or (LINKS if is_link else None):
                over[kind] += 1
            elif is_folder:
                below.append(name)
            else:
                names.append((inside / name).as_posix())
    return sorted(names)


def write_embeddings(path: Path, result: Embeddings) -> list[Path]:
    """Write ``X.npy`` with the names, a JSON list, in ``X.names.json``; or one ``X.parquet``.

    The parquet file has the columns ``name`` and ``embedding`` (a list of float32).

    Returns:
        The files written.

    Raises:
        ConfigError: another ending, or pyarrow is not installed.
        DataError: parquet, and a name that is no UTF-8.
        RunFolderError: the place cannot be written.
    """
    buffer = io.BytesIO()
    if path.suffix == ".npy":
        np.save(buffer, result.embeddings_ND)
        names = (json.dumps(result.names, indent=0) + "\n").encode()
        files = {path: buffer.getvalue(), path.with_suffix(".names.json"): names}
    elif path.suffix == ".parquet":
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise ConfigError(
                f'{path}: parquet needs pyarrow: pip install "fedss[parquet]", or write .npy'
            ) from error
        size = result.embeddings_ND.shape[1]
        rows = pyarrow.FixedSizeListArray.from_arrays(result.embeddings_ND.ravel(), size)
        try:
            table = pyarrow.table({"name": list(result.names), "embedding": rows})
        except UnicodeEncodeError as error:
            raise DataError(
                f"{path}: parquet keeps names in UTF-8, which {error.object!r} is not; rename the "
                "image, or write .npy"
            ) from error
        pyarrow.parquet.write_table(table, buffer)
        files = {path: buffer.getvalue()}
    else:
        raise ConfigError(f"{path}: expected a name that ends in .npy or .parquet")
    with writing(path.parent, _ADVICE):
        path.parent.mkdir(parents=True, exist_ok=True)
        for file, content in files.items():
            write_file(file, content)
    return list(files)
