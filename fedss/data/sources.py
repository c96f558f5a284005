"""Data sets of PyTorch, Hugging Face, pandas, polars and numpy as a ``Dataset``.

None of these but torch and numpy is imported: what is asked of an object is its length, its columns
and its images.
"""

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedss.data.assembly import DataOptions, build_dataset
from fedss.data.gathering import (
    Given,
    Named,
    Who,
    check_count,
    gather,
    gather_array,
    gather_labelled,
    number_values,
    who_holds,
)
from fedss.data.images import Dataset, LazyNames
from fedss.data.manifest import NOBODY, SPLITS, ListedImage, Listing, listed_name
from fedss.data.partition import deal_images
from fedss.errors import DataError

_FILES_SIZE = 64
_MAP_STYLE = "expected a map-style data set, with a length and an image for each number"


def arrays_dataset(
    images: Any,
    labels: Any,
    clients: Any,
    class_names: Sequence[str] | None,
    options: Mapping[str, Any],
) -> Dataset:
    """See ``Dataset.from_arrays``."""
    settings, size = _settings("arrays", options)
    named = number_values(labels, "labels", class_names)
    is_array = isinstance(images, np.ndarray | torch.Tensor) or hasattr(images, "__array__")
    count = len(images)
    check_count(named, "labels", count)
    given = _given(settings, size, count, lambda i: images[i])
    who = who_holds(clients, count, settings)
    if is_array:
        return gather_array(given, images, named, who, settings)
    return gather(given, named, who, settings)


def torch_dataset(dataset: Any, clients: Any, options: Mapping[str, Any]) -> Dataset:
    """See ``Dataset.from_torch``."""
    settings, size = _settings(type(dataset).__name__, options)
    count = _length(dataset)
    who = who_holds(clients, count, settings)
    names = _class_names(dataset)
    if (files := _image_files(dataset)) is not None:
        paths = [os.path.abspath(path) for path, _ in files]
        labels = number_values([label for _, label in files], "labels", names)
        root = os.path.abspath(getattr(dataset, "root", os.curdir))
        return _listed(root, paths, labels, who, None, settings)
    labels_read: list[Any] = []

    def image(row: int) -> object:
        sample = dataset[row]
        if not isinstance(sample, tuple | list) or len(sample) < 2:
            hint = (
                "; of Hugging Face? Dataset.from_huggingface reads those"
                if isinstance(sample, Mapping)
                else ""
            )
            raise DataError(
                f"expected a pair of image and label, got a {type(sample).__name__}{hint}"
            )
        labels_read.append(sample[1])
        return sample[0]

    given = _given(settings, size, count, image)
    return gather_labelled(
        given, lambda: number_values(labels_read, "labels", names), who, settings
    )


def huggingface_dataset(
    dataset: Any,
    image: str,
    label: str,
    client: str | None,
    clients: Any,
    options: Mapping[str, Any],
) -> Dataset:
    """See ``Dataset.from_huggingface``."""
    info = getattr(dataset, "info", None)
    title = getattr(info, "dataset_name", None) or getattr(info, "builder_name", None)
    settings, size = _settings(title or "huggingface", options)
    columns = getattr(dataset, "column_names", None)
    if isinstance(columns, Mapping):
        raise DataError(
            f"expected one split, got a dict of {', '.join(columns)}: give one, such as "
            f"dataset[{next(iter(columns), 'train')!r}]"
        )
    count = _length(dataset)
    if columns is None:
        raise DataError(f"expected a Dataset of Hugging Face, got a {type(dataset).__name__}")
    _check_columns(columns, [image, label, *([client] if client else [])])
    features = getattr(dataset, "features", None) or {}

    def column(name: str, what: str) -> Named:
        names = getattr(features.get(name), "names", None)
        return number_values(dataset[name], what, names)

    if client is not None and clients is not None:
        raise DataError(f"both client={client!r} and clients=: give the column or the clients")
    labels = column(label, f"labels (column {label!r})")
    if client is not None and settings.partition is None:
        who = Who(column(client, f"clients (column {client!r})"), None)
    else:
        who = who_holds(clients, count, settings)
    # Else the other columns' images would be decoded with each.
    select = getattr(dataset, "select_columns", None)
    rows = select([image]) if select else dataset
    fingerprint = getattr(dataset, "_fingerprint", None)
    key = ("huggingface", fingerprint, image, size, settings.channels) if fingerprint else None
    given = _given(settings, size, count, lambda i: rows[i][image], key)
    return gather(given, labels, who, settings)


def dataframe_dataset(
    frame: Any,
    root: str | Path | None,
    columns: Mapping[str, str],
    clients: Any,
    options: Mapping[str, Any],
) -> Dataset:
    """See ``Dataset.from_dataframe``; ``columns`` has the names of image, label, client, split."""
    settings, size = _settings("dataframe", options)
    if hasattr(frame, "collect"):
        raise DataError("expected a DataFrame, got a lazy one: give frame.collect()")
    found = getattr(frame, "columns", None)
    if found is None:
        raise DataError(f"expected a DataFrame of pandas or polars, got a {type(frame).__name__}")
    found = [str(name) for name in found]
    own = clients is None and settings.partition is None
    wanted = ("image", "label", "client") if own else ("image", "label")
    _check_columns(found, [columns[key] for key in wanted])
    cells = {key: list(frame[name]) for key, name in columns.items() if name in found}
    labels = number_values(cells["label"], f"labels (column {columns['label']!r})")
    images = cells["image"]
    if own:
        who = Who(number_values(cells["client"], f"clients (column {columns['client']!r})"), None)
    else:
        who = who_holds(clients, len(images), settings)
    if not images:
        raise DataError("no images: the DataFrame has no rows")
    if not isinstance(images[0], str | os.PathLike):
        if "split" in cells:
            raise DataError(
                f"column {columns['split']!r}: a split is read where images are files; drop the "
                "column (test_classes holds classes out), or name files"
            )
        return gather(
            _given(settings, size, len(images), lambda i: images[i]), labels, who, settings
        )
    for row, image in enumerate(images):
        if not isinstance(image, str | os.PathLike) or not os.fspath(image):
            raise DataError(f"column {columns['image']!r}: expected a file, got {image!r} at {row}")
    return _listed(
        os.path.abspath(root or os.curdir), images, labels, who, cells.get("split"), settings
    )


def _settings(title: str, options: Mapping[str, Any]) -> tuple[DataOptions, int | None]:
    """The options of a data set, and the side to which images are resized, if one is given."""
    size = options.get("image_size")
    given = {name: value for name, value in options.items() if value is not None}
    return DataOptions(**{"name": title, "image_size": _FILES_SIZE, **given}), size


def _given(
    settings: DataOptions,
    size: int | None,
    count: int,
    image: Any,
    key: tuple[object, ...] | None = None,
) -> Given:
    if settings.skip_broken:
        raise DataError("skip_broken: only images that are files can be left out; leave it out")
    digits = len(str(max(count - 1, 0)))
    names = LazyNames(count, lambda i: f"{i:0{digits}}")
    return Given(settings.name, count, image, size, settings.channels, names, key)


def _length(dataset: Any) -> int:
    if not hasattr(dataset, "__getitem__"):
        raise DataError(f"{_MAP_STYLE}; got a {type(dataset).__name__}")
    try:
        return len(dataset)
    except TypeError as error:
        raise DataError(f"{_MAP_STYLE}; got a {type(dataset).__name__}: {error}") from error


def _class_names(dataset: Any) -> Sequence[str] | None:
    """The names of classes, of torchvision's sets and of parts of them (``Subset``)."""
    while dataset is not None:
        names = getattr(dataset, "classes", None)
        if isinstance(names, list | tuple):
            return names
        dataset = getattr(dataset, "dataset", None)
    return None


def _image_files(dataset: Any) -> list[tuple[str, int]] | None:
    """File and class of torchvision's ``ImageFolder``, where it changes neither; else None."""
    samples, loader = getattr(dataset, "samples", None), getattr(dataset, "loader", None)
    changes = [getattr(dataset, name, None) for name in ("transform", "target_transform")]
    plain = getattr(loader, "__module__", None) == "torchvision.datasets.folder"
    if not isinstance(samples, list) or not plain or any(change is not None for change in changes):
        return None
    return samples


def _check_columns(found: Sequence[str], wanted: Sequence[str]) -> None:
    for name in wanted:
        if name not in found:
            near = difflib.get_close_matches(name, found, 1)
            raise DataError(
                f"expected a column {name!r}, found {', '.join(found)}"
                + (f"; is {near[0]!r} meant?" if near else "")
                + ". Name another one with image=, label= or client=; in place of a column of "
                "clients, clients= takes a client for each image or a partition such as "
                "'classes:10'"
            )


def _listed(
    root: str,
    images: Sequence[str | os.PathLike[str]],
    labels: Named,
    who: Who,
    splits: Sequence[Any] | None,
    settings: DataOptions,
) -> Dataset:
    """Image files, decoded on all cores and once, as those of a CSV are."""
    count = len(images)
    clients = who.clients or Named(np.zeros(count, np.int64), [NOBODY])
    rows: list[ListedImage] = []
    seen: dict[str, int] = {}
    for row, image in enumerate(images):
        name = listed_name(root, os.fspath(image))
        if name in seen:
            raise DataError(
                f"image {row}: {name} is listed already at {seen[name]}; each image has one "
                "class and one client: remove one of the rows"
            )
        seen[name] = row
        split = None if splits is None else splits[row]
        if splits is not None and split not in SPLITS:
            raise DataError(
                f"split: expected one of {', '.join(SPLITS)} for each image, got {split!r} at {row}"
            )
        client = clients.names[int(clients.numbers_N[row])]
        label = labels.names[int(labels.numbers_N[row])]
        rows.append(ListedImage(client, label, name, split, 0))
    data = build_dataset(Listing(Path(root), root, rows), settings)
    if who.partition is None or not len(data.train):
        return data
    return replace(data, train=deal_images(data.train, who.partition, settings.seed))
