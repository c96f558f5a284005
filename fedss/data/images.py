"""The one type of picture data that everything else reads.

Shape suffixes: N pictures, C channels, H height, W width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedss.errors import DataError


@dataclass(frozen=True)
class Images:
    """Labelled pictures, each held by one client.

    Attributes:
        pixels: uint8 [N, C, H, W], C = 1 or 3; an array in memory or a read-only memory map.
            Read by fancy indexing only, so that it never has to sit in memory as a whole.
        labels: int64 [N], index into ``class_names``.
        clients: int64 [N], index into ``client_names``.
        class_names: one name per class.
        client_names: one name per client.
        names: one name per picture: its file name relative to the data set's root.
    """

    pixels: np.ndarray
    labels: np.ndarray
    clients: np.ndarray
    class_names: Sequence[str]
    client_names: Sequence[str]
    names: Sequence[str]

    def __post_init__(self) -> None:
        count = len(self.pixels)
        if self.pixels.ndim != 4 or self.pixels.dtype != np.uint8:
            raise ValueError(
                f"pixels: expected uint8 [N, C, H, W], got {self.pixels.dtype} {self.pixels.shape}"
            )
        for field in ("labels", "clients", "names"):
            if len(getattr(self, field)) != count:
                raise ValueError(
                    f"{field}: expected {count} values, one per picture, "
                    f"got {len(getattr(self, field))}"
                )
        for field, limit in (("labels", self.class_names), ("clients", self.client_names)):
            values = getattr(self, field)
            if count and (values.min() < 0 or values.max() >= len(limit)):
                raise ValueError(
                    f"{field}: expected numbers from 0 to {len(limit) - 1}, "
                    f"got {values.min()} to {values.max()}"
                )

    def __len__(self) -> int:
        return len(self.pixels)


@dataclass(frozen=True)
class RetrievalTask:
    """Pictures to search with, and pictures to search in.

    ``gallery=None``: each query is searched among all the other queries.
    """

    query: Images
    gallery: Images | None = None


@dataclass(frozen=True)
class Dataset:
    """Training pictures by client, and retrieval tasks on classes that training never sees.

    ``test`` is reported; ``validation``, where a data set has one, is for choosing settings.
    ``skipped`` names the pictures left out because they could not be read (``skip_broken``).
    """

    name: str
    train: Images
    test: RetrievalTask
    validation: RetrievalTask | None = None
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class ClientIndex:
    """Which pictures each client holds: ``order_N[start_K[k] : start_K[k + 1]]`` are client k's."""

    images: Images
    order_N: np.ndarray
    start_K: np.ndarray

    @property
    def num_clients(self) -> int:
        """Number of clients; each holds at least one picture."""
        return len(self.start_K) - 1

    def examples(self, client: int) -> np.ndarray:
        """Numbers (int64) of a client's pictures. O(their count)."""
        return self.order_N[self.start_K[client] : self.start_K[client + 1]]


def own_classes(images: Images) -> np.ndarray:
    """Number of classes of which each client holds a picture, int64 [K]."""
    n = len(images.class_names)
    pairs = np.unique(images.clients * n + images.labels)
    return np.bincount(pairs // n, minlength=len(images.client_names))


def index_clients(images: Images) -> ClientIndex:
    """Index pictures by client.

    Raises:
        DataError: a client without pictures.
    """
    count_K = np.bincount(images.clients, minlength=len(images.client_names))
    if not count_K.all():
        empty = images.client_names[int(np.argmin(count_K))]
        raise DataError(
            f"client {empty!r} has no training pictures (one of {int((count_K == 0).sum())} "
            "such clients); leave these clients out"
        )
    order_N = np.argsort(images.clients, kind="stable")
    return ClientIndex(images, order_N, np.concatenate([[0], np.cumsum(count_K)]))
