"""A searchable collection: an index opened together with the model that made it.

Shape suffixes: Q queries, N images of the collection, D embedding size, C classes.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fedss.errors import DataError, RunFolderError
from fedss.evaluation.expansion import SAME, expand_queries
from fedss.evaluation.inputs import unit_rows
from fedss.evaluation.retrieval import nearest
from fedss.inference.model import load
from fedss.inference.pixels import ImageSource, Read, read_images
from fedss.models import Embedder, fingerprint
from fedss.search.store import (
    VectorStore,
    damaged_store,
    read_metadata,
    read_store,
    read_thumbnail,
    store_exists,
)

INDEX, ENROLLED = "index.sqlite", "enrolled.sqlite"

_BLOCK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Match:
    """An image that was found.

    Attributes:
        position: its place in the collection.
        name: its name.
        label: its class, None where it has none.
        score: cosine of its embedding and the query's.
    """

    position: int
    name: str
    label: str | None
    score: float


@dataclass(frozen=True)
class Collection:
    """Images of an index and of enrolled classes, as they were when it was opened.

    Positions count the images of the index first, then those enrolled.

    Attributes:
        folder: where the index lies.
        source: the folder or CSV of the images.
        root: the folder that names are relative to.
        embedder: the model.
        names: of each image: relative to the source, or as given when it was enrolled.
        labels: the class of each image; None where it has none.
        vectors_ND: float32, rows of length 1.
        indexed: the first so many images are those of ``source``.
        skipped: images of ``source`` that could not be read when the index was built.
        passed_over: files and folders of ``source`` that were none of the images then, by kind.
        remarks: sentences on what else was not read then.
        embedded: how many images were embedded then; the others were there before.
    """

    folder: Path
    source: Path
    root: Path
    embedder: Embedder
    names: tuple[str, ...]
    labels: tuple[str | None, ...]
    vectors_ND: Tensor
    indexed: int
    skipped: tuple[str, ...]
    passed_over: Mapping[str, int]
    remarks: tuple[str, ...]
    embedded: int
    _builds: tuple[str, str]
    _ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def classes(self) -> dict[str, int]:
        """Number of images by class, sorted by name."""
        counts = Counter(label for label in self.labels if label is not None)
        return dict(sorted(counts.items()))

    @cached_property
    def enrolled(self) -> dict[str, int]:
        """Number of enrolled images by class, sorted by name."""
        counts = Counter(label for label in self.labels[self.indexed :] if label is not None)
        return dict(sorted(counts.items()))

    @cached_property
    def prototypes_CD(self) -> Tensor:
        """The mean embedding of each of ``classes``, scaled to length 1 (a zero mean stays)."""
        place = {label: row for row, label in enumerate(self.classes)}
        rows = torch.tensor([-1 if label is None else place[label] for label in self.labels])
        sums_CD = torch.zeros(len(place), self.vectors_ND.shape[1], dtype=torch.float64)
        sums_CD.index_add_(0, rows[rows >= 0], self.vectors_ND[rows >= 0].double())
        return nn.functional.normalize(sums_CD, dim=1).float()

    def images_of(self, label: str) -> list[int]:
        """Positions of a class's images."""
        return [position for position, other in enumerate(self.labels) if other == label]

    def path(self, position: int) -> Path | None:
        """The file of an image; None for an enrolled one, of which the index alone knows."""
        return self.root / self.names[position] if position < self.indexed else None

    def thumbnail(self, position: int) -> bytes:
        """A small JPEG of an image. Any thread may ask.

        Raises:
            RunFolderError: the index was changed meanwhile and the image is gone.
        """
        enrolled = position >= self.indexed
        path = self.folder / (ENROLLED if enrolled else INDEX)
        small = read_thumbnail(path, self._ids[position], self._builds[enrolled])
        if small is None:
            raise RunFolderError(
                f"{path} was changed by another process, and {self.names[position]} is no longer "
                "there: open the index again"
            )
        return small

    def copy_among(self, query: Read, matches: Sequence[Match]) -> Match | None:
        """The match that is the query's own image: to the model, and to the eye.

        Args:
            query: with a thumbnail.
            matches: what was found for it.
        """
        return next(
            (
                match
                for match in matches
                if match.score >= SAME and self.thumbnail(match.position) == query.thumbnail
            ),
            None,
        )

    def embed(self, images: Sequence[ImageSource]) -> Tensor:
        """Embeddings of images: files, their content (a binary file object) or open images.

        Returns:
            float32 [Q, D], rows of length 1.

        Raises:
            DataError: an image that cannot be read (named).
        """
        blocks = read_images(self.embedder, images, thumbnails=False)
        vectors = [read.vector_D for block in blocks for read in block]
        size = self.embedder.spec.embedding_size
        return torch.from_numpy(np.array(vectors, np.float32).reshape(-1, size))

    def search(self, query_QD: Tensor, k: int = 10, expand: int = 0) -> list[list[Match]]:
        """The nearest images of each query, best first: exactly what ``fedss.nearest`` finds.

        With ``expand`` each query is first moved towards so many images that it finds
        (:func:`fedss.evaluation.expansion.expand_queries`); scores are cosines with that.

        Scores in float32 tell which images may be among the first k; those are scored exactly.
        Of equal scores the lower position comes first. Scores take 64 MB at a time, or four bytes
        per image where that is more.

        Args:
            query_QD: floating point [Q, D], such as from ``embed``.
            k: how many; all there are, if there are fewer.
            expand: how many images a query is moved towards.

        Raises:
            DataError: k below 1, expand below 0, queries of another size, NaN or infinite.
        """
        if k < 1:
            raise DataError(f"k: expected 1 or more, got {k}")
        if expand < 0:
            raise DataError(f"expand: expected 0 or more, got {expand}")
        query_QD, k = checked_queries(query_QD, self.vectors_ND.shape[1]), min(k, len(self))
        if not len(self):
            return [[] for _ in query_QD]
        if expand:
            query_QD = expand_queries(query_QD, self.vectors_ND, expand)
        gallery_DN = self.vectors_ND.numpy().T
        rows = max(1, _BLOCK_BYTES // (4 * len(self)))
        matches = []
        for block_BD in torch.split(query_QD, rows) if len(query_QD) else ():
            scores_BN = unit_rows(block_BD, "query").numpy() @ gallery_DN
            matches += [
                self._first(query_D, scores_N, k)
                for query_D, scores_N in zip(block_BD, scores_BN, strict=True)
            ]
        return matches

    def _first(self, query_D: Tensor, scores_N: np.ndarray, k: int) -> list[Match]:
        # A sum of D products of rows of length 1 in float32, in any order, is off by D 2^-24 at
        # most (Higham 2002, section 3.1); the rest is for the rounding of rows. The first k and
        # whatever is tied with the last of them are thus within twice this of it.
        doubt = (len(query_D) + 16) * 2.0**-23
        least = float(torch.from_numpy(scores_N).topk(k).values[-1])
        places = np.flatnonzero(scores_N >= least - 2 * doubt)
        scores_1K, index_1K = nearest(query_D[None], self.vectors_ND[torch.from_numpy(places)], k)
        pairs = zip(places[index_1K[0].numpy()].tolist(), scores_1K[0].tolist(), strict=True)
        return [Match(at, self.names[at], self.labels[at], score) for at, score in pairs]


def checked_queries(query_QD: Tensor, size: int) -> Tensor:
    """Queries on the CPU.

    Raises:
        DataError: of another size, NaN or infinite.
    """
    if query_QD.ndim != 2 or query_QD.shape[1] != size:
        raise DataError(f"queries: expected [Q, {size}], got {list(query_QD.shape)}")
    if not bool(torch.isfinite(query_QD).all()):
        raise DataError("queries: expected finite numbers; did training diverge?")
    return query_QD.detach().cpu()


def open_collection(
    folder: str | Path,
    run: str | Path,
    *,
    backbone: nn.Module | str | None = None,
    trust_code: bool = False,
) -> Collection:
    """An index with the model that made it.

    Args:
        folder: where the index lies; ``RUN/index`` unless it was put elsewhere.
        run: the run folder of the model.
        backbone: as for ``fedss.load``.
        trust_code: as for ``fedss.load``.

    Raises:
        RunFolderError: no index, a damaged one, or one made with another model.
        ConfigError: as ``fedss.load``.
    """
    return open_with(Path(folder).absolute(), load(run, backbone, trust_code))


def reopen(collection: Collection) -> Collection:
    """The collection as it is now, with what other processes have done to it.

    Raises:
        RunFolderError: as ``open_collection``.
    """
    return open_with(collection.folder, collection.embedder)


def open_with(folder: Path, embedder: Embedder) -> Collection:
    """``open_collection`` with a model at hand."""
    store = _read(folder / INDEX, embedder)
    enrolled = _read(folder / ENROLLED, embedder) if store_exists(folder / ENROLLED) else None
    try:
        metadata = json.loads(store.metadata["facts"])
        both = [store] if enrolled is None else [store, enrolled]
        return Collection(
            folder=folder,
            source=Path(metadata["source"]),
            root=Path(metadata["root"]),
            embedder=embedder,
            names=tuple(name for part in both for name in part.names),
            labels=tuple(label for part in both for label in part.labels),
            vectors_ND=torch.from_numpy(np.concatenate([part.vectors_ND for part in both])),
            indexed=len(store.names),
            skipped=tuple(metadata["skipped"]),
            passed_over=metadata.get("passed_over", {}),
            remarks=tuple(metadata.get("remarks", ())),
            embedded=metadata["embedded"],
            _builds=(store.metadata["build"], enrolled.metadata["build"] if enrolled else ""),
            _ids=tuple(number for part in both for number in part.ids),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise damaged_store(folder / INDEX, error) from error


def _read(path: Path, embedder: Embedder) -> VectorStore:
    check_model(path, embedder)
    return read_store(path, embedder.spec.embedding_size)


def check_model(path: Path, embedder: Embedder) -> None:
    """Whether a store's vectors are this model's.

    Raises:
        RunFolderError: they are another's, or the file is missing or damaged.
    """
    made_with, current = read_metadata(path).get("model", ""), fingerprint(embedder)
    if made_with != current:
        again = f"delete {path.name} and enrol its classes again"
        if path.name != ENROLLED:
            again = "make it anew (fedss index --replace)"
        raise RunFolderError(
            f"{path} was made with another model (fingerprint {made_with[:12]}, this one has "
            f"{current[:12]}), and vectors of two models cannot be compared: use the run that made "
            f"it, or {again}"
        )
