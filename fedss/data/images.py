"""The one type of image data that everything else reads.

Shape suffixes: N images, C channels, H height, W width.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy as np

from fedss.errors import DataError
from fedss.text import counted

_SAMPLE, _BLOCK = 256, 10_000


@dataclass(frozen=True)
class LazyNames(Sequence[str]):
    """``length`` names, made by ``make`` from their numbers each time that they are asked for.

    None is kept: ``LazyNames(1_000_000, "client {}".format)``.
    """

    length: int
    make: Callable[[int], str]

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[str]:
        return map(self.make, range(self.length))

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        where = range(self.length)[index]
        return self.make(where) if isinstance(where, int) else [self.make(i) for i in where]


@dataclass(frozen=True)
class Images:
    """Labelled images, each held by one client.

    Attributes:
        pixels: uint8 [N, C, H, W], C = 1 or 3, H = W; in memory or a read-only memory map.
            Read by fancy indexing only, so that it never has to sit in memory as a whole.
        labels: int64 [N], index into ``class_names``.
        clients: int64 [N], index into ``client_names``.
        class_names: one name per class, no two the same. Classes of different ``Images`` are the
            same where their names are.
        client_names: one name per client.
        names: one name per image: its file name relative to the data set's root. Any sequence
            will do for all three; ``LazyNames`` is one for names by the million.

    Raises:
        DataError: Any of these is otherwise.
    """

    pixels: np.ndarray
    labels: np.ndarray
    clients: np.ndarray
    class_names: Sequence[str]
    client_names: Sequence[str]
    names: Sequence[str]

    def __repr__(self) -> str:
        count, channels, height, width = self.pixels.shape
        return (
            f"Images({count:,} of {channels} x {height} x {width}, "
            f"{counted(len(self.class_names), 'class')}, "
            f"{counted(len(self.client_names), 'client')})"
        )

    def __post_init__(self) -> None:
        pixels = self.pixels
        if not (isinstance(pixels, np.ndarray) and pixels.ndim == 4 and pixels.dtype == np.uint8):
            raise DataError(
                f"pixels: expected a numpy array, uint8 [N, C, H, W], got {_kind(pixels)}"
            )
        if pixels.shape[1] not in (1, 3) or pixels.shape[2] != pixels.shape[3]:
            raise DataError(
                "pixels: expected square images of 1 or 3 channels, [N, C, H, W] with C = 1 or "
                f"3 and H = W, got {list(pixels.shape)}"
            )
        for name, limit in (("labels", self.class_names), ("clients", self.client_names)):
            values = getattr(self, name)
            if _kind(values) != f"int64 [{len(values)}]":
                raise DataError(
                    f"{name}: expected a numpy array, int64 [N], got {_kind(values)}; convert it "
                    "with np.asarray(values, np.int64)"
                )
            if len(values) and (values.min() < 0 or values.max() >= len(limit)):
                raise DataError(
                    f"{name}: expected numbers from 0 to {len(limit) - 1}, "
                    f"got {values.min()} to {values.max()}"
                )
        for name in ("labels", "clients", "names"):
            if len(getattr(self, name)) != len(pixels):
                raise DataError(
                    f"{name}: expected {len(pixels)} values, one per image, "
                    f"got {len(getattr(self, name))}"
                )
        twice = repeated(self.class_names)
        if twice is not None:
            raise DataError(
                f"class_names: {twice!r} occurs {list(self.class_names).count(twice)} times; "
                "give each class a name of its own"
            )

    def __len__(self) -> int:
        return len(self.pixels)


def repeated(names: Sequence[str]) -> str | None:
    """A name that occurs more than once, or None."""
    # A set of ten million names would take a gigabyte, their hashes take 80 MB.
    hashes = np.fromiter(map(hash, names), np.int64, len(names))
    hashes.sort()
    if (np.diff(hashes) != 0).all():
        return None
    ((name, times),) = Counter(names).most_common(1)
    return name if times > 1 else None


@dataclass(frozen=True)
class RetrievalTask:
    """Images to search with, and images to search in.

    ``gallery=None``: each query is searched among all the other queries.

    Raises:
        DataError: No queries, a query for which no image could be right, or images of
            different shapes.
    """

    query: Images
    gallery: Images | None = None

    def __repr__(self) -> str:
        within = "the others" if self.gallery is None else repr(self.gallery)
        return f"RetrievalTask({self.query!r} among {within})"

    def __post_init__(self) -> None:
        query, gallery = self.query, self.gallery
        if not len(query):
            raise DataError("a retrieval task without query images: give at least two of a class")
        if gallery is not None:
            _check_same_shape({"query": query, "gallery": gallery})
        names = (_labels(query), None if gallery is None else _labels(gallery))
        for position, reason in unanswerable(*names):
            raise DataError(f"retrieval query {query.names[position]!r}: {reason}")


def unanswerable(
    query: Sequence[str], gallery: Sequence[str] | None = None
) -> Iterator[tuple[int, str]]:
    """Queries for which no image could be right: their position and the reason.

    Both sides are class names; without ``gallery`` the other queries are the gallery.
    """
    count, findable = Counter(query), set(gallery or ())
    for position, name in enumerate(query):
        if gallery is None and count[name] == 1:
            yield (
                position,
                f"class {name!r} has a single image to test with, so no other image could be "
                "right; add a second one or remove this one",
            )
        elif gallery is not None and name not in findable:
            yield (
                position,
                f"class {name!r} is not in the gallery, so nothing could be right; add a gallery "
                "image or remove this query",
            )


@dataclass(frozen=True)
class Dataset:
    """Training images by client, and retrieval tasks on classes that training never sees.

    ``test`` is reported; None: there is nothing to test with, as at a site of a federation that
    holds none of the test's images. ``validation``, where a data set has one, is for choosing
    settings. ``train`` may be without images where there are some to test with: then there is
    nothing to train on, but a trained model can be judged. ``skipped`` names the images left out
    because they could not be read (``skip_broken``), ``unpaired`` those that are for testing and
    left out because no other image here could be right (see ``fedss.data.splits.arrange``).
    ``remarks`` are sentences about what is not as it was published, not read, or easily taken for
    something else. ``passed_over`` counts files and folders of a folder that are none of its
    images, by kind. ``decode_again`` reads images by their names at another size, uint8
    [N, C, side, side], and keeps nothing; None where they are no files.

    Raises:
        DataError: No images, or parts with images of different shapes.
    """

    name: str
    train: Images
    test: RetrievalTask | None
    validation: RetrievalTask | None = None
    skipped: tuple[str, ...] = ()
    unpaired: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    passed_over: Mapping[str, int] = field(default_factory=dict)
    decode_again: Callable[[Sequence[str], int], np.ndarray] | None = None

    def __repr__(self) -> str:
        tasks = {"test": self.test, "validation": self.validation}
        told = [f"{name}={task!r}" for name, task in tasks.items() if task is not None]
        return f"Dataset({', '.join([repr(self.name), f'train={self.train!r}', *told])})"

    def __post_init__(self) -> None:
        if not len(self.train) and self.test is None and self.validation is None:
            raise DataError(f"data set {self.name!r} has no training images")
        tasks = {"test": self.test, "validation": self.validation}
        queries = {name: task.query for name, task in tasks.items() if task is not None}
        _check_same_shape({"train": self.train, **queries})

    @staticmethod
    def from_arrays(
        images: Any,
        labels: Any,
        clients: Any = None,
        *,
        class_names: Sequence[str] | None = None,
        **options: Any,
    ) -> "Dataset":
        """Images in an array or tensor, or in a sequence of them or of Pillow's images.

        Args:
            images: [N, C, H, W], [N, H, W, C] or [N, H, W], uint8 or float from 0 to 1. uint8 is
                not copied where training and test are each in one piece (``test_classes=0``, say).
            labels: The class of each, a number or text.
            clients: Who holds each, a number or text; or the partition of the training images, such
                as ``"classes:10"``, see ``deal_images``.
            class_names: The names of classes that are numbers, instead of the numbers.
            **options: Fields of :class:`fedss.data.DataOptions`, such as ``test_classes=0.2``,
                ``image_size=32``, ``partition_clients=100``. Without ``image_size`` images stay as
                large as they are; then they have to be square and of one size.

        Raises:
            DataError: Anything amiss with images or options; says where and what to do.
        """
        from fedss.data.sources import arrays_dataset

        return arrays_dataset(images, labels, clients, class_names, options)

    @staticmethod
    def from_torch(dataset: Any, clients: Any = None, **options: Any) -> "Dataset":
        """A map-style data set of (image, label), as those of torchvision; each is read once.

        Images are what ``read_image`` takes, and are kept in memory, many of them in a nameless
        file in the cache folder; those of an ``ImageFolder`` without transforms are decoded into
        the cache. Names of classes are those of ``dataset.classes``. What the data set changes at
        random is drawn once; for each visit to an image there is ``augment``.

        Args as for :meth:`from_arrays`; of an ``ImageFolder`` the usual ``image_size`` is 64.
        """
        from fedss.data.sources import torch_dataset

        return torch_dataset(dataset, clients, options)

    @staticmethod
    def from_huggingface(
        dataset: Any,
        *,
        image: str = "image",
        label: str = "label",
        client: str | None = None,
        clients: Any = None,
        **options: Any,
    ) -> "Dataset":
        """One split of a data set of Hugging Face; ``image``, ``label``, ``client`` are columns.

        Decoded once, into the cache. Classes have the names of a ``ClassLabel``. In place of the
        column ``client``, ``clients`` is as for :meth:`from_arrays`, and so are the options.
        """
        from fedss.data.sources import huggingface_dataset

        return huggingface_dataset(dataset, image, label, client, clients, options)

    @staticmethod
    def from_dataframe(
        frame: Any,
        *,
        root: str | Path | None = None,
        image: str = "image",
        label: str = "label",
        client: str = "client",
        split: str = "split",
        clients: Any = None,
        **options: Any,
    ) -> "Dataset":
        """Images listed in a DataFrame of pandas or polars, by the names of its columns.

        Files are relative to the folder ``root`` (None: the current one), and read as those of a
        CSV are, with the column ``split``, if there is one (``read_manifest``). Images that are no
        files are read as in :meth:`from_torch`. In place of the column ``client``, ``clients`` is
        as for :meth:`from_arrays`, and so are the options; ``image_size`` is 64 for files.
        """
        from fedss.data.sources import dataframe_dataset

        columns = {"image": image, "label": label, "client": client, "split": split}
        return dataframe_dataset(frame, root, columns, clients, options)


@dataclass(frozen=True)
class ClientIndex:
    """Which images each client holds: ``order_N[start_K[k] : start_K[k + 1]]`` are client k's."""

    images: Images
    order_N: np.ndarray
    start_K: np.ndarray

    @property
    def num_clients(self) -> int:
        """Each holds at least one image."""
        return len(self.start_K) - 1

    def examples(self, client: int) -> np.ndarray:
        """Numbers (int64) of a client's images. O(their count)."""
        return self.order_N[self.start_K[client] : self.start_K[client + 1]]


def holdings(images: Images) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Who holds what: client, class and number of images, each int64 [P], one for each pair of
    client and class that has an image, sorted by client and class. O(N log N), whatever K and n.
    """
    n = len(images.class_names)
    # Not np.unique: on integers it hashes, which takes many times as long and as much memory.
    pairs = np.sort(images.clients * n + images.labels)
    first_P = np.flatnonzero(np.diff(pairs, prepend=-1))
    return pairs[first_P] // n, pairs[first_P] % n, np.diff(first_P, append=len(pairs))


def count_own_classes(images: Images) -> np.ndarray:
    """Number of classes of which each client holds an image, int64 [K]."""
    clients_P, _, _ = holdings(images)
    return np.bincount(clients_P, minlength=len(images.client_names))


def seen_classes(data: Dataset) -> int:
    """How many classes of the test queries are in training too; 0: all are unseen, or no test.

    Compared by name, since each part numbers its classes in its own way.
    """
    if data.test is None:
        return 0
    tested, trained = set(_present_classes(data.test.query)), _present_classes(data.train)
    return sum(name in tested for name in trained)


def index_clients(images: Images) -> ClientIndex:
    """Index images by client.

    Raises:
        DataError: a client without images.
    """
    count_K = np.bincount(images.clients, minlength=len(images.client_names))
    if not count_K.all():
        empty = images.client_names[int(np.argmin(count_K))]
        raise DataError(
            f"client {empty!r} has no training images (one of {int((count_K == 0).sum())} "
            "such clients); leave these clients out"
        )
    order_N = np.argsort(images.clients, kind="stable")
    return ClientIndex(images, order_N, np.concatenate([[0], np.cumsum(count_K)]))


def data_fingerprint(data: Dataset) -> str:
    """SHA-256, in hex, of training, test (queries and gallery) and validation images.

    Covers, of each of these parts: whether it is there, all labels, all clients, the names of all
    classes, clients and images in order, the pixels' shape, and the pixels of up to 256 images
    spread evenly. Does not cover: the pixels of other images (names stand for them), the data
    set's own name, the names of skipped and unpaired images, and where anything is stored.
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
            while block := "".join(islice(lines, _BLOCK)):
                digest.update(block.encode("utf-8", "surrogateescape"))
        if len(images):
            sample = np.unique(np.linspace(0, len(images) - 1, _SAMPLE).astype(np.int64))
            digest.update(np.ascontiguousarray(images.pixels[sample]).tobytes())
    return digest.hexdigest()


def _labels(images: Images) -> list[str]:
    return [images.class_names[label] for label in images.labels.tolist()]


def _present_classes(images: Images) -> Iterator[str]:
    """The names of the classes that an image has, each once."""
    present = np.flatnonzero(np.bincount(images.labels)).tolist()
    return (images.class_names[label] for label in present)


def _kind(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {list(value.shape)}"
    return f"a {type(value).__name__}"


def _check_same_shape(parts: Mapping[str, Images]) -> None:
    shapes = {name: list(images.pixels.shape[1:]) for name, images in parts.items()}
    if len({str(shape) for shape in shapes.values()}) > 1:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise DataError(f"pixels: expected one shape [C, H, W] in all parts, got {listed}")
