"""Images that are not files, gathered into a ``Dataset``: each read once and held once.

Shape suffixes: N images.
"""

import itertools
import math
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fedss.data.assembly import DataOptions, held_out_remark
from fedss.data.cache import cache_folder, cached_array
from fedss.data.images import Dataset, Images, LazyNames, RetrievalTask
from fedss.data.in_memory import as_nchw, read_image, to_numpy
from fedss.data.manifest import NOBODY
from fedss.data.names import composed, look_alikes
from fedss.data.partition import Partition, deal_images, parse_partition
from fedss.data.splits import hold_out_classes
from fedss.errors import DataError
from fedss.log import Progress, progress_log

_IN_MEMORY = 2**28
_BLOCK = 64


@dataclass(frozen=True)
class Named:
    """The class, or the client, of each image: numbers int64 [N] of ``names``."""

    numbers_N: np.ndarray
    names: Sequence[str]


@dataclass(frozen=True)
class Who:
    """Who holds what: a client for each image, or a partition of the training images."""

    clients: Named | None
    partition: Partition | None


@dataclass(frozen=True)
class Given:
    """Images that are somewhere in a program.

    Attributes:
        title: Name of the data set.
        count: How many there are.
        image: The image of a number, in a form that ``read_image`` reads; called once for each.
        image_size: The side to resize to; None: the images' own, if it is one.
        channels: None: 1 if the images are grayscale, else 3.
        names: A name for each.
        key: What stands for all pixels, where something does: then they are kept in the cache.
    """

    title: str
    count: int
    image: Callable[[int], object]
    image_size: int | None
    channels: int | None
    names: Sequence[str]
    key: tuple[object, ...] | None = None


def number_values(values: Any, what: str, names: Sequence[str] | None = None) -> Named:
    """Classes or clients from whole numbers or text; ``names``, if given, are those of numbers.

    Raises:
        DataError: Neither, a number without a name, or a name of nothing but spaces.
    """
    if isinstance(values, np.ndarray | torch.Tensor):
        array = to_numpy(values)
        if array.ndim != 1:
            raise DataError(f"{what}: expected one value per image, got {list(array.shape)}")
        values = array.tolist()
    found = [_plain(value, what, i) for i, value in enumerate(values)]
    distinct = sorted(set(found), key=lambda value: (isinstance(value, str), value))
    called = {}
    for value in distinct:
        name = str(value)
        if names is not None and isinstance(value, int):
            if not 0 <= value < len(names):
                raise DataError(
                    f"{what}: expected numbers from 0 to {len(names) - 1}, as there are "
                    f"{len(names)} names, got {value} at {found.index(value)}"
                    + ("; -1 often stands for none: leave these images out" if value == -1 else "")
                )
            name = str(names[value])
        called[value] = composed(name)
        if not called[value]:
            raise DataError(f"{what}: a name of nothing but spaces at {found.index(value)}")
    # Names that are one after `composed` are one class, as in folders and CSVs.
    order = {name: i for i, name in enumerate(dict.fromkeys(called.values()))}
    number = {value: order[name] for value, name in called.items()}
    return Named(np.fromiter((number[v] for v in found), np.int64, len(found)), list(order))


def _plain(value: Any, what: str, position: int) -> int | str:
    if hasattr(value, "item"):  # numpy's and torch's numbers
        value = value.item()
    if isinstance(value, int | str) and not isinstance(value, bool):
        return value
    # pandas has a value of its own for nothing, of which not even that can be asked.
    nothing = value is None or (isinstance(value, float) and math.isnan(value))
    shown = "nothing" if nothing else f"{value!r} ({type(value).__name__})"
    hint = ""
    if isinstance(value, float) and not nothing:
        hint = "; where one number is missing, pandas makes all of a column floats"
    raise DataError(
        f"{what}: expected a whole number or text for each image, got {shown} at {position}{hint}"
    )


def who_holds(clients: Any, count: int, options: DataOptions) -> Who:
    """From ``clients``, a client for each image or the text of a partition, and the options.

    Raises:
        DataError: Neither is given, or not one client for each image.
        ConfigError: A partition that cannot be.
    """
    text = options.partition
    if isinstance(clients, str):
        if text is not None:
            raise DataError(f"a partition twice: clients={clients!r} and partition={text!r}")
        text, clients = clients, None
    partition = parse_partition(text, options.partition_clients)
    if clients is None:
        if partition is None:
            raise DataError(
                "who holds which image? Give clients=, a client for each image or a partition "
                "such as 'classes:10', 'class' or 'dirichlet:1' (with partition_clients=)"
            )
        return Who(None, partition)
    named = number_values(clients, "clients")
    check_count(named, "clients", count)
    return Who(named, partition)


def check_count(named: Named, what: str, count: int) -> None:
    """Raise a DataError unless there is one value for each image."""
    if len(named.numbers_N) != count:
        raise DataError(
            f"{what}: expected {count} values, one per image, got {len(named.numbers_N)}"
        )


def gather(given: Given, labels: Named, who: Who, options: DataOptions) -> Dataset:
    """The images of a source whose classes are known before any is read."""
    split = _split(labels, options)
    pixels = _gather_pixels(given, np.concatenate(split[:3]), options)
    return _assemble(given, labels, who, options, split, _parts(pixels, split))


def gather_array(
    given: Given, images: Any, labels: Named, who: Who, options: DataOptions
) -> Dataset:
    """Images in an array or tensor, which is not copied where it can be used as it is."""
    pixels = as_nchw(to_numpy(images))
    _, channels, height, width = pixels.shape
    as_it_is = (
        pixels.dtype == np.uint8
        and height == width == (given.image_size or width)
        and channels == (given.channels or channels)
    )
    if not as_it_is:
        return gather(replace(given, image=pixels.__getitem__), labels, who, options)
    split = _split(labels, options)
    parts = [_take(pixels, rows_N, given.title, options) for rows_N in split[:3]]
    return _assemble(given, labels, who, options, split, parts)


def gather_labelled(
    given: Given, labels: Callable[[], Named], who: Who, options: DataOptions
) -> Dataset:
    """The images of a source that tells a class only with its image.

    ``labels`` is called when all are read.
    """
    pixels = _gather_pixels(replace(given, key=None), np.arange(given.count), options)
    named = labels()
    split = _split(named, options)
    _reorder(pixels, np.concatenate(split))
    return _assemble(given, named, who, options, split, _parts(pixels, split))


def _parts(pixels: np.ndarray, split: Sequence[np.ndarray]) -> list[np.ndarray]:
    """``pixels`` of images in the order of their splits, without the unpaired, cut into splits."""
    ends = itertools.accumulate(len(rows_N) for rows_N in split[:3])
    return [pixels[end - len(rows_N) : end] for rows_N, end in zip(split, ends, strict=False)]


def _take(pixels: np.ndarray, rows_N: np.ndarray, title: str, options: DataOptions) -> np.ndarray:
    """Some images of an array: a part of it if they are in one piece, else a copy."""
    if not len(rows_N) or int(rows_N[-1] - rows_N[0]) == len(rows_N) - 1:
        first = int(rows_N[0]) if len(rows_N) else 0
        return pixels[first : first + len(rows_N)]
    space = _space((len(rows_N), *pixels.shape[1:]), title, options)
    for start in range(0, len(rows_N), _BLOCK):
        block = rows_N[start : start + _BLOCK]
        space[start : start + _BLOCK] = pixels[block]
    return space


def _split(labels: Named, options: DataOptions) -> list[np.ndarray]:
    """Rows to train on, to test with, for validation, and those left out: of held-out classes that
    have a single image. Each in order.
    """
    if not len(labels.numbers_N):
        raise DataError("no images: expected at least one")
    count_n = np.bincount(labels.numbers_N, minlength=len(labels.names)).tolist()
    count = dict(zip(labels.names, count_n, strict=True))
    seed, at_site = options.seed, options.at_site
    kind = dict.fromkeys(count, 0)
    tested = hold_out_classes(count, options.test_classes, seed, at_site=at_site)
    kind |= dict.fromkeys(tested, 1)
    if share := options.validation_classes:
        left = {name: count[name] for name in count if name not in tested}
        validated = hold_out_classes(left, share, seed, at_site=at_site, split="validation")
        kind |= dict.fromkeys(validated, 2)
    alone = 3
    kind |= {name: alone for name in count if kind[name] and count[name] == 1}
    kind_N = np.array([kind[name] for name in labels.names])[labels.numbers_N]
    return [np.flatnonzero(kind_N == k) for k in range(4)]


def _gather_pixels(given: Given, rows_N: np.ndarray, options: DataOptions) -> np.ndarray:
    """The pixels of some images, uint8 [N, C, H, H], in the order of ``rows_N``."""

    def read(row: int) -> np.ndarray:
        try:
            return read_image(given.image(row), given.image_size, given.channels)
        except Exception as error:
            raise DataError(
                f"{given.title}: image {row} ({given.names[row]}) cannot be read: "
                f"{str(error) or type(error).__name__}"
            ) from error

    key = given.key and (*given.key, *rows_N.tolist())
    if given.image_size and given.channels:
        channels, side, first = given.channels, given.image_size, None
    else:
        first = read(int(rows_N[0]))
        channels, side = first.shape[0], first.shape[1]
    shape = len(rows_N), channels, side, side

    def pixels() -> Iterator[np.ndarray]:
        for row in rows_N.tolist():
            image = first if first is not None and row == rows_N[0] else read(row)
            if image.shape[1] != side or len(image) > channels:
                raise DataError(_differs(given, row, int(rows_N[0]), image.shape, shape[1:]))
            yield np.broadcast_to(image, shape[1:])

    if key:
        return cached_array(key, shape, _blocks(pixels()), cache=options.cache, title=given.title)
    space, log = _space(shape, given.title, options), progress_log()
    for done, image in enumerate(pixels(), 1):
        space[done - 1] = image
        if done % _BLOCK == 0 or done == shape[0]:
            log(Progress(given.title, done, shape[0], "images"), False)
    return space


def _blocks(images: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    rest = iter(images)
    while block := list(itertools.islice(rest, _BLOCK)):
        yield np.stack(block)


def _differs(
    given: Given, row: int, first: int, shape: tuple[int, ...], expected: tuple[int, ...]
) -> str:
    if shape[1] != expected[1]:
        what = f"is {shape[1]} pixels wide and high, image {first} {expected[1]}"
        advice = "say image_size=, such as 64, and each is resized to that"
    else:
        what = f"has colour, image {first} is grayscale"
        advice = "say channels=3 or channels=1"
    return f"{given.title}: image {row} ({given.names[row]}) {what}; {advice}"


def _space(shape: tuple[int, ...], title: str, options: DataOptions) -> np.ndarray:
    """Room for pixels: in memory, or if they are many in a file without a name."""
    size = math.prod(shape)
    if size <= _IN_MEMORY:
        return np.empty(shape, np.uint8)
    folder = cache_folder(options.cache)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if size > free:
            raise DataError(
                f"{title}: {shape[0]:,} images of {shape[-1]} x {shape[-2]} pixels take "
                f"{size / 1e9:,.1f} GB, {folder} has {free / 1e9:,.1f} GB: take smaller ones "
                "(image_size), or another folder with cache= or the variable FEDSS_CACHE"
            )
        # It is gone when the last array of it is.
        with tempfile.TemporaryFile(dir=folder) as file:
            space: np.ndarray = np.memmap(file, np.uint8, "w+", shape=shape)
    except OSError as error:
        raise DataError(
            f"cannot write images to {folder}: {error.strerror or error}. Make room there, or "
            "choose another folder with cache= or the variable FEDSS_CACHE"
        ) from error
    return space


def _reorder(pixels: np.ndarray, order_N: np.ndarray) -> None:
    """Put ``pixels[order_N]`` in place of ``pixels``, without a second array of them."""
    order, done = order_N.tolist(), bytearray(len(order_N))
    for start in range(len(order)):
        if done[start] or order[start] == start:
            continue
        held, place = pixels[start].copy(), start
        while not done[place]:
            done[place], source = 1, order[place]
            pixels[place] = held if source == start else pixels[source]
            place = source


def _assemble(
    given: Given,
    labels: Named,
    who: Who,
    options: DataOptions,
    split: Sequence[np.ndarray],
    pixels: Sequence[np.ndarray],
) -> Dataset:
    clients = who.clients or Named(np.zeros(given.count, np.int64), [NOBODY])
    train, test, validation = (
        _images(part, rows_N, labels, clients, given.names) if len(rows_N) else None
        for part, rows_N in zip(pixels, split, strict=False)
    )
    assert train is not None  # or no class could be held out
    held_out = [] if validation is None else [held_out_remark(validation, train)]
    if who.partition is not None:
        train = deal_images(train, who.partition, options.seed)
    return Dataset(
        given.title,
        train,
        None if test is None else RetrievalTask(test),
        None if validation is None else RetrievalTask(validation),
        unpaired=tuple(given.names[row] for row in split[3].tolist()),
        remarks=(
            *held_out,
            *look_alikes(labels.names, "classes"),
            *look_alikes(clients.names, "clients"),
        ),
    )


def _images(
    pixels: np.ndarray, rows_N: np.ndarray, labels: Named, clients: Named, names: Sequence[str]
) -> Images:
    """Some images, with the names of their own classes and clients alone."""
    present, label_N = np.unique(labels.numbers_N[rows_N], return_inverse=True)
    holding, client_N = np.unique(clients.numbers_N[rows_N], return_inverse=True)
    return Images(
        pixels,
        label_N.astype(np.int64),
        client_N.astype(np.int64),
        [labels.names[i] for i in present.tolist()],
        [clients.names[i] for i in holding.tolist()],
        LazyNames(len(rows_N), lambda i: names[int(rows_N[i])]),
    )
