"""Data sets by name."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedss.data.archive import find_archive, find_manifest, open_archive
from fedss.data.assembly import DataOptions, build_dataset
from fedss.data.folder import read_folder
from fedss.data.images import Dataset
from fedss.data.manifest import Listing, read_manifest
from fedss.data.partition import Partition, deal_images, parse_partition
from fedss.data.sets.cifar100 import cifar100_dataset
from fedss.data.sets.faces import read_celeba, read_lfw
from fedss.data.sets.glyphs import glyphs_dataset
from fedss.data.sets.omniglot import omniglot_dataset
from fedss.data.sets.products import read_products
from fedss.data.sets.user_split import read_gld23k, read_inaturalist, read_landmarks
from fedss.data.table import parse_columns
from fedss.errors import DataError

_Load = Callable[[Any, DataOptions], Dataset]


@dataclass(frozen=True)
class Source:
    """A data set that has a name.

    ``load`` gets a ``Path``, or None where none is needed; ``path`` says what is needed there, ""
    if nothing. ``image_size`` is the side where none is asked for. ``grayscale``: its images have
    one channel and no choice. ``partition``: who holds what where no image has a user; our choice,
    as none is published.
    """

    load: _Load
    path: str = "the folder with its files (see docs/datasets.md)"
    image_size: int = 64
    grayscale: bool = False
    partition: Partition | None = None


def _listed(read: Callable[[Path], Listing]) -> _Load:
    """A data set of image files, by the function that lists them."""
    return lambda path, options: build_dataset(read(path), options)


def _csv(path: Path, options: DataOptions) -> Dataset:
    called, dealt = parse_columns(options.columns), options.partition is not None
    return build_dataset(read_manifest(path, called=called, dealt=dealt), options)


def _folder(path: Path, options: DataOptions) -> Dataset:
    return build_dataset(read_folder(path, dealt=options.partition is not None), options)


def _glyphs(path: Path | None, options: DataOptions) -> Dataset:
    if path is not None:
        raise DataError(f"glyphs are made by a program: leave out the path {path}")
    return glyphs_dataset(
        options.glyphs_classes,
        options.glyphs_clients,
        test_classes=options.test_classes,
        image_size=options.image_size,
        seed=options.seed,
        cache=options.cache,
    )


DATASETS: Mapping[str, Source] = {
    "glyphs": Source(_glyphs, path="", image_size=28, grayscale=True),
    "omniglot": Source(
        lambda path, o: omniglot_dataset(path, image_size=o.image_size, cache=o.cache),
        path="",
        image_size=28,
        grayscale=True,
    ),
    "csv": Source(_csv, path="a CSV file"),
    "folder": Source(_folder, path="a folder client/class/image"),
    "landmarks-user-160k": Source(_listed(read_landmarks)),
    "gld23k": Source(_listed(read_gld23k)),
    "inaturalist-user-120k": Source(_listed(read_inaturalist)),
    "sop": Source(_listed(read_products), partition=Partition("classes", 10)),
    "celeba": Source(_listed(read_celeba)),
    "lfw": Source(_listed(read_lfw)),
    "cifar100": Source(cifar100_dataset, image_size=32, partition=Partition("dirichlet", 1.0, 100)),
}


def load_dataset(name: str, path: str | Path | None = None, **options: Any) -> Dataset:
    """A data set by name.

    Args:
        name: One of ``fedss.data.DATASETS``.
        path: The CSV (``read_manifest`` has its columns) or the root folder (``read_folder``); for
            ``omniglot`` the folder of its archives, which are fetched into it if they are missing
            (None: a folder in the cache folder). ``glyphs`` takes none. Of the other published sets
            nothing is fetched: docs/datasets.md says where to get what.
        **options: Fields of :class:`fedss.data.DataOptions`, such as ``image_size=32``.

    Returns:
        Dataset of uint8 [N, channels, image_size, image_size].

    Raises:
        DataError: Unknown name, missing path, anything amiss with the images, or a partition that
            they do not have.
        ConfigError: A partition that cannot be.
    """
    source = DATASETS.get(name)
    if source is None:
        near = difflib.get_close_matches(name, DATASETS, 3)
        raise DataError(
            f"unknown data set {name!r}; expected one of {', '.join(DATASETS)}"
            + (f"; is {' or '.join(near)} meant?" if near else "")
        )
    if options.get("image_size") is None:
        options["image_size"] = source.image_size
    settings = DataOptions(name, **options)
    partition = parse_partition(settings.partition, settings.partition_clients) or source.partition
    if source.grayscale and settings.channels not in (None, 1):
        raise DataError(f"channels: {name} has 1 channel, got {settings.channels}; leave it out")
    if settings.columns is not None and name != "csv":
        raise DataError(
            f"columns: {name} is no CSV of yours, got {settings.columns!r}; leave it out"
        )
    if path is None and source.path:
        raise DataError(f"data set {name!r} needs a path: {source.path}")
    data = source.load(None if path is None else Path(path), settings)
    if partition is None or not len(data.train):
        return data
    return replace(data, train=deal_images(data.train, partition, settings.seed))


def usual_side(name: str) -> int:
    """The side of a data set's images, in pixels, where none is asked for."""
    return DATASETS[name].image_size if name in DATASETS else Source.image_size


def locate(path: str | Path) -> tuple[str, Path]:
    """Name and path, for ``load_dataset``, of the images of one's own that are at ``path``.

    A file is a CSV, and so is a folder with a ``manifest.csv``; any other folder is
    ``path/client/class/image``. A zip or a tar is a CSV if it has one (``find_manifest``), else
    such folders; ``photos.zip/list.csv`` is a CSV in it.

    Raises:
        DataError: There is neither file nor folder, or an archive that cannot be read.
    """
    path = Path(path)
    if (place := find_archive(path)) is not None:
        listed = place[1] or find_manifest(open_archive(place[0]))
        return "csv" if listed else "folder", path
    for file in (path / "manifest.csv", path):
        if file.is_file():
            return "csv", file
    if path.is_dir():
        return "folder", path
    raise DataError(
        f"{path}: expected a CSV file, a folder with a manifest.csv, a folder client/class/image, "
        "or a zip or tar of one of these; found neither file nor folder"
    )
