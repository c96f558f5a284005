"""Pictures: one type (``Images``), and a function for each place they can come from."""

import difflib
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np

from fedss.data.cache import cache_folder
from fedss.data.folder import read_folder
from fedss.data.images import (
    ClientIndex,
    Dataset,
    Images,
    LazyNames,
    RetrievalTask,
    holdings,
    index_clients,
    own_classes,
    seen_classes,
)
from fedss.data.manifest import Listing, build_dataset, read_rows
from fedss.data.partition import (
    Partition,
    deal_pictures,
    parse_partition,
    rotate_classes,
    split_clients,
)
from fedss.data.sets.celeba import read_celeba
from fedss.data.sets.cifar100 import cifar100_dataset
from fedss.data.sets.glyphs import glyphs_dataset
from fedss.data.sets.inaturalist import read_inaturalist
from fedss.data.sets.landmarks import read_gld23k, read_landmarks
from fedss.data.sets.lfw import read_lfw
from fedss.data.sets.omniglot import omniglot_dataset
from fedss.data.sets.products import read_products
from fedss.errors import DataError

__all__ = [
    "DATASETS",
    "DEFAULT_PARTITIONS",
    "ClientIndex",
    "Dataset",
    "Images",
    "LazyNames",
    "Partition",
    "RetrievalTask",
    "cache_folder",
    "cifar100_dataset",
    "deal_pictures",
    "fingerprint",
    "glyphs_dataset",
    "holdings",
    "index_clients",
    "load_dataset",
    "locate",
    "omniglot_dataset",
    "own_classes",
    "parse_partition",
    "rotate_classes",
    "seen_classes",
    "split_clients",
    "usual_side",
]

_LISTINGS: Mapping[str, Callable[[Path], Listing]] = {
    "landmarks-user-160k": read_landmarks,
    "gld23k": read_gld23k,
    "inaturalist-user-120k": read_inaturalist,
    "sop": read_products,
    "celeba": read_celeba,
    "lfw": read_lfw,
}
DATASETS = ("glyphs", "omniglot", "csv", "folder", *_LISTINGS, "cifar100")
# Of the sets in which no picture has a user: ours, none is published with them.
DEFAULT_PARTITIONS: Mapping[str, Partition] = {
    "sop": Partition("classes", 10),
    "cifar100": Partition("dirichlet", 1.0, 100),
}

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
    partition: str | None = None,
    partition_clients: int | None = None,
) -> Dataset:
    """A data set by name.

    Args:
        name: One of DATASETS.
        path: The CSV (``read_rows`` has its columns) or the root folder (``read_folder``); for
            ``omniglot`` the folder of its archives, which are fetched into it if they are missing
            (None: a folder in the cache folder). ``glyphs`` takes none. Of the other published sets
            nothing is fetched: docs/datasets.md says where to get what.
        image_size: Side of the pictures; None is ``usual_side(name)``.
        channels: 1 or 3; None is 1 for glyphs and Omniglot, 3 for CIFAR-100, else 1 if every
            picture is stored in grayscale and 3 otherwise.
        test_classes: Share of the classes held out as the test; 0: no test. Of no effect where the
            data name test pictures: a CSV that does, Omniglot, and the published sets with a test
            of their own (see docs/datasets.md).
        skip_broken: Leave out unreadable pictures, where pictures are files.
        cache: Folder for decoded pictures; see ``cache_folder``.
        seed: The data's seed (which glyphs, which classes are held out, who holds what in a
            partition), not the training's.
        at_site: The pictures are a site's part of a federation; see ``build_dataset``.
        glyphs_classes: Training and test classes together; see ``glyphs_dataset``.
        glyphs_clients: Training clients.
        partition: ``classes:K``, ``dirichlet:ALPHA`` or ``class``: deals the training pictures to
            clients of its own, instead of those that the data have; see ``deal_pictures``. None:
            the data's clients; where they have none, ``DEFAULT_PARTITIONS``.
        partition_clients: How many, for ``classes`` (where it may be left out) and ``dirichlet``.

    Returns:
        Dataset of uint8 [N, channels, image_size, image_size].

    Raises:
        DataError: Unknown name, missing path, anything amiss with the pictures, or a partition that
            they do not have.
        ConfigError: A partition that cannot be.
    """
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, 3)
        raise DataError(
            f"unknown data set {name!r}; expected one of {', '.join(DATASETS)}"
            + (f"; is {' or '.join(near)} meant?" if near else "")
        )
    dealt = parse_partition(partition, partition_clients) or DEFAULT_PARTITIONS.get(name)
    side = usual_side(name) if image_size is None else image_size
    if name in ("glyphs", "omniglot"):
        if channels not in (None, 1):
            raise DataError(f"channels: {name} has 1 channel, got {channels}; leave it out")
        if side < 1:
            raise DataError(f"image_size: expected at least 1, got {side}")
    if name == "omniglot":
        data = omniglot_dataset(path, image_size=side, cache=cache)
    elif name == "glyphs":
        if path is not None:
            raise DataError(f"glyphs are made by a program: leave out the path {path}")
        data = glyphs_dataset(
            glyphs_classes,
            glyphs_clients,
            test_classes=test_classes,
            image_size=side,
            seed=seed,
            cache=cache,
        )
    elif path is None:
        needed = {"csv": "a CSV file", "folder": "a folder client/class/picture"}
        what = needed.get(name, "the folder with its files (see docs/datasets.md)")
        raise DataError(f"data set {name!r} needs a path: {what}")
    elif name == "cifar100":
        data = cifar100_dataset(
            path,
            image_size=side,
            channels=channels,
            test_classes=test_classes,
            cache=cache,
            seed=seed,
            at_site=at_site,
        )
    else:
        read = {"csv": read_rows, "folder": read_folder, **_LISTINGS}[name]
        data = build_dataset(
            name,
            read(Path(path)),
            image_size=side,
            channels=channels,
            test_classes=test_classes,
            skip_broken=skip_broken,
            cache=cache,
            seed=seed,
            at_site=at_site,
        )
    if dealt is None or not len(data.train):
        return data
    return replace(data, train=deal_pictures(data.train, dealt, seed))


def usual_side(name: str) -> int:
    """The side of a data set's pictures, in pixels, where none is asked for."""
    return {"glyphs": 28, "omniglot": 28, "cifar100": 32}.get(name, 64)


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
