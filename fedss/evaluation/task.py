"""Retrieval with an embedding: figures, and images to look at."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedss.data import VALIDATION_CLASSES, Images, RetrievalTask
from fedss.errors import DataError, DivergedError
from fedss.evaluation.confusions import hardest_confusions
from fedss.evaluation.intervals import ClassScores
from fedss.evaluation.retrieval import RetrievalMetrics, evaluate_by_label, nearest
from fedss.evaluation.verification import (
    FARS,
    Verification,
    count_pairs,
    identification,
    verification,
)
from fedss.models import Embedder, embed_pixels
from fedss.seeds import generator

_SHOWN_QUERIES, _SHOWN_NEIGHBOURS = 48, 5


def evaluate(embedder: Embedder, task: RetrievalTask) -> RetrievalMetrics:
    """Retrieval with a trained model; see :func:`fedss.evaluate_retrieval`."""
    return score(task, *embed_task(partial(embed_pixels, embedder), task))


EmbedPixels = Callable[[np.ndarray], Tensor]
Embedded = tuple[Tensor, Tensor | None]
"""Embeddings of a task's queries, and of its gallery where there is one."""


@dataclass(frozen=True)
class Evaluation:
    """Retrieval figures of a model, None where nobody can tell; and, where the images are here, the
    embeddings that they were computed from and the MAP@10 of each class.
    """

    metrics: dict[str, Any] | None
    embedded: Embedded | None = None
    by_class: ClassScores | None = None


def embed_task(embed: EmbedPixels, task: RetrievalTask) -> Embedded:
    """A task's images under any function from uint8 pixels to embeddings."""
    gallery = task.gallery
    return embed(task.query.pixels), None if gallery is None else embed(gallery.pixels)


def score(task: RetrievalTask, query_QD: Tensor, gallery_GD: Tensor | None) -> RetrievalMetrics:
    """Retrieval with embeddings of a task's images."""
    return score_classes(task, (query_QD, gallery_GD))[0]


def score_classes(task: RetrievalTask, embedded: Embedded) -> tuple[RetrievalMetrics, ClassScores]:
    """:func:`score`, and that of each class by its name, in the order of names."""
    metrics, (labels_C, queries_C, map_at_10_C) = evaluate_by_label(*_labelled(task, embedded))
    names = (task.gallery or task.query).class_names
    of_name = {names[label]: c for c, label in enumerate(labels_C.tolist())}
    order = [of_name[name] for name in sorted(of_name)]
    return metrics, ClassScores(tuple(sorted(of_name)), queries_C[order], map_at_10_C[order])


def judge(task: RetrievalTask, embedded: Embedded) -> Evaluation:
    """How a model does, by its embeddings of a task's images.

    Raises:
        DivergedError: NaN or infinite ones.
    """
    if not all(bool(h_ND.isfinite().all()) for h_ND in embedded if h_ND is not None):
        raise DivergedError(
            "the model gives NaN or infinite embeddings of the test images: expected finite "
            "weights, and none so large that they overflow"
        )
    metrics, by_class = score_classes(task, embedded)
    return Evaluation(dataclasses.asdict(metrics), embedded, by_class)


def count_classes(images: Images) -> dict[str, int]:
    """Number of images of each class that has any, in the order of names."""
    labels, counts = np.unique(images.labels, return_counts=True)
    pairs = zip(labels.tolist(), counts.tolist(), strict=True)
    return dict(sorted((images.class_names[label], count) for label, count in pairs))


def check_tellable(task: RetrievalTask, name: str, test_classes: float, split: str) -> None:
    """Refuse a test of the data set ``name``, on its ``split``, in which every image is right.

    Raises:
        DataError: all that is searched is of one class.
    """
    (first, *others) = count_classes(task.gallery or task.query)
    if not others:
        now = f", now {test_classes}" if split == "test" else f" = {VALIDATION_CLASSES}"
        raise DataError(
            f"data set {name!r}: all {split} images are of one class, {first!r}, so that every "
            "result is right and nothing is tested. List images of several classes with the split "
            f"{split!r}, or hold out more classes ({split}_classes{now}; of few classes chance "
            "decides how many that is, and another data_seed holds out others)"
        )


def verify(
    task: RetrievalTask, embedded: Embedded, seed: int, fars: Sequence[float] = FARS
) -> Verification | None:
    """Verification, and identification where there is anybody to find and to refuse.

    None where no two images are of two classes. ``seed`` is that of the draws of enrolled classes.
    """
    sides = _labelled(task, embedded)
    pairs = count_pairs(*sides)
    if not pairs.impostor_C.any():
        return None
    return replace(verification(pairs, fars), identification=identification(*sides, seed=seed))


@dataclass(frozen=True)
class Neighbours:
    """Queries and what is found for them: Q queries, each followed by its nearest K.

    ``pixels`` uint8 [Q, 1 + K, C, H, W], ``labels`` int64 and ``class_names`` str [Q, 1 + K], query
    first; ``scores`` are cosines, float32 [Q, K]; ``query_index`` int64 [Q], the same for all runs
    on one data set.
    """

    pixels: np.ndarray
    labels: np.ndarray
    class_names: np.ndarray
    scores: np.ndarray
    query_index: np.ndarray

    @property
    def right(self) -> np.ndarray:
        """bool [Q, K]: whether a neighbour has the query's class."""
        return np.asarray(self.labels[:, 1:] == self.labels[:, :1])


@dataclass(frozen=True)
class ConfusedClasses:
    """P pairs of classes that are taken for each other, the hardest first.

    ``pixels`` uint8 [P, 2, C, H, W]: a query and its wrong nearest image, of the classes ``shown``
    str [P, 2], with the cosines ``scores`` float64 [P]. ``class_names`` str [P, 2]. ``confused``
    and ``queries`` int64 [P, 2]: the queries of each class whose nearest is of the other, and all.
    """

    pixels: np.ndarray
    shown: np.ndarray
    class_names: np.ndarray
    confused: np.ndarray
    queries: np.ndarray
    scores: np.ndarray


@dataclass(frozen=True)
class Findings:
    """What else is found with a task's embeddings, beside its figures of retrieval."""

    neighbours: Neighbours
    confused: ConfusedClasses
    verification: Verification | None


def findings(task: RetrievalTask, embedded: Embedded, seed: int) -> Findings:
    """What a run keeps of its last evaluation, for the report and for search."""
    return Findings(
        find_neighbours(task, embedded, seed),
        find_confused(task, embedded),
        verify(task, embedded, seed),
    )


def find_neighbours(
    task: RetrievalTask, embedded: Embedded, seed: int, queries: int = _SHOWN_QUERIES
) -> Neighbours:
    """Some queries, drawn by the seed (the same for every run), and their five nearest images."""
    query, gallery = task.query, task.gallery or task.query
    query_QD, gallery_GD = embedded
    among_queries = gallery_GD is None
    count = min(_SHOWN_NEIGHBOURS, len(gallery) - among_queries)
    chosen = generator(seed, "panels").permutation(len(query))[:queries]
    among_GD = query_QD if gallery_GD is None else gallery_GD
    nearest_QK = nearest(query_QD[torch.from_numpy(chosen)], among_GD, count + among_queries)
    scores_QK, index_QK = (t.cpu().numpy() for t in nearest_QK)
    # A query in the gallery is among its own neighbours, or as many others are just as near.
    own_QK = index_QK == chosen[:, None] if among_queries else np.zeros_like(index_QK, bool)
    others_QK = own_QK.argsort(axis=1, kind="stable")[:, :count]
    shown = np.take_along_axis(index_QK, others_QK, axis=1)
    scores = np.take_along_axis(scores_QK, others_QK, axis=1)
    pixels = np.concatenate([query.pixels[chosen][:, None], gallery.pixels[shown]], axis=1)
    query_names = [query.class_names[i] for i in query.labels[chosen]]
    neighbour_names = [[gallery.class_names[i] for i in labels] for labels in gallery.labels[shown]]
    names = np.array(
        [[own, *others] for own, others in zip(query_names, neighbour_names, strict=True)]
    )
    # Labels are numbers within each set; the report compares them, so they are numbered by name.
    labels = np.unique(names, return_inverse=True)[1].reshape(names.shape)
    return Neighbours(pixels, labels, names, scores, chosen)


def find_confused(task: RetrievalTask, embedded: Embedded) -> ConfusedClasses:
    """The classes most often taken for each other; see `hardest_confusions`."""
    query, gallery = task.query, task.gallery or task.query
    confusions = hardest_confusions(*_labelled(task, embedded))
    pairs = [((query, c.query), (gallery, c.neighbour)) for c in confusions]

    def table(values: list[Any], dtype: type, *shape: int) -> np.ndarray:
        return np.array(values, dtype).reshape(len(confusions), 2, *shape)

    pixels = [[images.pixels[i] for images, i in pair] for pair in pairs]
    shown = [[images.class_names[images.labels[i]] for images, i in pair] for pair in pairs]
    return ConfusedClasses(
        pixels=table(pixels, np.uint8, *query.pixels.shape[1:]),
        shown=table(shown, str),
        class_names=table([[gallery.class_names[k] for k in c.classes] for c in confusions], str),
        confused=table([c.confused for c in confusions], np.int64),
        queries=table([c.queries for c in confusions], np.int64),
        scores=np.array([c.score for c in confusions], np.float64),
    )


def _labelled(
    task: RetrievalTask, embedded: Embedded
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Both sides with labels that mean the same class on either: the gallery's, if there is one."""
    query, gallery, (query_QD, gallery_GD) = task.query, task.gallery, embedded
    if gallery is None:
        return query_QD, torch.from_numpy(query.labels), None, None
    # Labels are numbers within each set; names hold across both.
    number = {name: i for i, name in enumerate(gallery.class_names)}
    renumbered = np.array([number.get(name, -1 - i) for i, name in enumerate(query.class_names)])
    labels_Q = torch.from_numpy(renumbered[query.labels])
    return query_QD, labels_Q, gallery_GD, torch.from_numpy(gallery.labels)
