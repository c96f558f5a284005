"""Pictures: one type (``Images``), and a function for each place they can come from."""

import difflib
import hashlib
from itertools import islice
from pathlib import Path

import numpy as np

from fedss.data.cache import cache_folder
from fedss.data.folder import folder_dataset
from fedss.data.glyphs import glyphs_dataset
from fedss.data.images import (
    ClientIndex,
    Dataset,
    Images,
    LazyNames,
    RetrievalTask,
    index_clients,
    own_classes,
    seen_classes,
)
from fedss.data.manifest import csv_dataset
from fedss.data.omniglot import omniglot_dataset
from fedss.data.partition import rotate_classes, split_clients
from fedss.errors import DataError

__all__ = [
    "DATASETS",
    "ClientIndex",
    "Dataset",
    "Images",
    "LazyNames",
    "RetrievalTask",
    "cache_folder",
    "csv_dataset",
    "fingerprint",
    "folder_dataset",
    "glyphs_dataset",
    "index_clients",
    "load_dataset",
    "locate",
    "omniglot_dataset",
    "own_classes",
    "rotate_classes",
    "seen_classes",
    "split_clients",
]

DATASETS = ("glyphs", "omniglot", "csv", "folder")

_SAMPLE, _SOME = 256, 10_000


def load_dataset(
    name: str,
    path: str | Path | None = None,
    *,
    image_size: int | None = None,
    channels: int | None = None,
    test_classes: float = 0.2,
    skip_broken: bool = False,
    cache: Path | None = None,
    seed: int = 0,
    at_site: bool = False,
    glyphs_classes: int = 1280,
    glyphs_clients: int = 256,
) -> Dataset:
    """A data set by name.

    Args:
        name: One of DATASETS.
        path: The CSV or the root folder; for ``omniglot`` the folder of its archives, which are
            fetched into the cache folder if it is None. ``glyphs`` takes none.
        image_size: Side of the pictures; None is 28 for glyphs and Omniglot, else 64.
        channels: 1 or 3; None is 1 for glyphs and Omniglot, else 1 if every picture is stored
            in grayscale and 3 otherwise.
        test_classes: Share of the classes held out as the test; 0 for ``csv`` and ``folder``: no
            test. A CSV that names test pictures and Omniglot have a test of their own.
        skip_broken: Leave out unreadable pictures of ``csv`` and ``folder``.
        cache: Folder for decoded pictures; see ``cache_folder``.
        seed: The data's seed (which glyphs, which classes are held out), not the training's.
        at_site: ``csv`` and ``folder`` are a site's part of a federation; see ``csv_dataset``.
        glyphs_classes: Training and test classes together; see ``glyphs_dataset``.
        glyphs_clients: Training clients.

    Returns:
        Dataset of uint8 [N, channels, image_size, image_size].

    Raises:
        DataError: Unknown name, missing path, or anything amiss with the pictures.
    """
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, 3)
        raise DataError(
            f"unknown data set {name!r}; expected one of {', '.join(DATASETS)}"
            + (f"; is {' or '.join(near)} meant?" if near else "")
        )
    if name in ("glyphs", "omniglot"):
        if channels not in (None, 1):
            raise DataError(f"channels: {name} has 1 channel, got {channels}; leave it out")
        side = 28 if image_size is None else image_size
        if side < 1:
            raise DataError(f"image_size: expected at least 1, got {side}")
        if name == "omniglot":
            return omniglot_dataset(path, image_size=side, cache=cache)
        if path is not None:
            raise DataError(f"glyphs are made by a program: leave out the path {path}")
        return glyphs_dataset(
            glyphs_classes,
            glyphs_clients,
            test_classes=test_classes,
            image_size=side,
            seed=seed,
            cache=cache,
        )
    if path is None:
        needed = "a CSV file" if name == "csv" else "a folder client/class/picture"
        raise DataError(f"data set {name!r} needs a path: {needed}")
    read = csv_dataset if name == "csv" else folder_dataset
    return read(
        path,
        image_size=64 if image_size is None else image_size,
        channels=channels,
        test_classes=test_classes,
        skip_broken=skip_broken,
        cache=cache,
        seed=seed,
        at_site=at_site,
    )


def locate(path: str | Path) -> tuple[str, Path]:
    """Name and path, for ``load_dataset``, of the pictures that a site keeps at ``path``.

    A file is a CSV, and so is a folder with a ``manifest.csv``; any other folder is
    ``path/client/class/picture``.

    Raises:
        DataError: There is neither file nor folder.
    """
    path = Path(path)
    manifest = path / "manifest.csv"
    if manifest.is_file():
        return "csv", manifest
    if path.is_file():
        return "csv", path
    if path.is_dir():
        return "folder", path
    raise DataError(
        f"{path}: expected a CSV file, a folder with a manifest.csv, or a folder "
        "client/class/picture; found neither file nor folder"
    )


def fingerprint(data: Dataset) -> str:
    """SHA-256, in hex, of training, test (queries and gallery) and validation pictures.

    Covers, of each of these parts: whether it is there, all labels, all clients, the names of all
    classes, clients and pictures in order, the pixels' shape, and the pixels of up to 256 pictures
    spread evenly. Does not cover: the pixels of other pictures (names stand for them), the data
    set's own name, the names of skipped and unpaired pictures, and where anything is stored.
    """
    digest = hashlib.sha256()
    tasks = [(t.query, t.gallery) if t else (None, None) for t in (data.test, data.validation)]
    for images in (data.train, *tasks[0], *tasks[1]):
        if images is None:
            digest.update(b"none\n")
            continue
        digest.update(f"{images.pixels.shape}\n".encode())
        for numbers in (images.labels, images.clients):
            digest.update(np.ascontiguousarray(numbers, "<i8").data)
        for names in (images.class_names, images.client_names, images.names):
            digest.update(f"{len(names)}\n".encode())
            lines = (f"{len(name)}:{name}\n" for name in names)
            while some := "".join(islice(lines, _SOME)):
                digest.update(some.encode("utf-8", "surrogateescape"))
        if len(images):
            sample = np.unique(np.linspace(0, len(images) - 1, _SAMPLE).astype(np.int64))
            digest.update(np.ascontiguousarray(images.pixels[sample]).tobytes())
    return digest.hexdigest()
