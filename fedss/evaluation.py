"""Retrieval with an embedding: figures, and pictures to look at."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedss.data import RetrievalTask
from fedss.models import Embedder, embed_pixels
from fedss.retrieval import RetrievalMetrics, evaluate_retrieval, nearest
from fedss.seeds import generator

_PANEL_QUERIES, _PANEL_NEIGHBOURS = 48, 5


def evaluate(embedder: Embedder, task: RetrievalTask) -> RetrievalMetrics:
    """Retrieval with a trained model; see :func:`fedss.evaluate_retrieval`."""
    return evaluate_embedding(partial(embed_pixels, embedder), task)


Embed = Callable[[np.ndarray], Tensor]
Embedded = tuple[Tensor, Tensor | None]
"""Embeddings of a task's queries, and of its gallery where there is one."""


@dataclass(frozen=True)
class Evaluation:
    """How a model does.

    Attributes:
        metrics: retrieval figures; None where nobody can tell.
        embedded: what they were computed from, where the pictures are here.
    """

    metrics: dict[str, Any] | None
    embedded: Embedded | None = None


def evaluate_embedding(embed: Embed, task: RetrievalTask) -> RetrievalMetrics:
    """Retrieval under any function from uint8 pixels to embeddings."""
    return score(task, *embed_task(embed, task))


def embed_task(embed: Embed, task: RetrievalTask) -> Embedded:
    """A task's pictures under a model."""
    gallery = task.gallery
    return embed(task.query.pixels), None if gallery is None else embed(gallery.pixels)


def score(task: RetrievalTask, query_QD: Tensor, gallery_GD: Tensor | None) -> RetrievalMetrics:
    """Retrieval with embeddings of a task's pictures."""
    query, gallery = task.query, task.gallery
    if gallery is None:
        return evaluate_retrieval(query_QD, torch.from_numpy(query.labels))
    # Labels are numbers within each set; names hold across both.
    number = {name: i for i, name in enumerate(gallery.class_names)}
    renumbered = np.array([number.get(name, -1 - i) for i, name in enumerate(query.class_names)])
    return evaluate_retrieval(
        query_QD,
        torch.from_numpy(renumbered[query.labels]),
        gallery_GD,
        torch.from_numpy(gallery.labels),
    )


def panels(task: RetrievalTask, embedded: Embedded, seed: int) -> bytes:
    """Some queries and their nearest pictures, for the report; the same queries for every run.

    Returns:
        An ``.npz`` file of what :func:`find_neighbours` finds.
    """
    buffer = io.BytesIO()
    arrays: dict[str, Any] = find_neighbours(task, embedded, seed, _PANEL_QUERIES)
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def find_neighbours(
    task: RetrievalTask, embedded: Embedded, seed: int, queries: int
) -> dict[str, np.ndarray]:
    """Some queries, drawn by the seed, and their five nearest pictures.

    Returns:
        pixels uint8 [Q, 6, C, H, W], query first, labels int64 [Q, 6], class_names str [Q, 6],
        scores (cosines) float32 [Q, 5] and query_index int64 [Q].
    """
    query, gallery = task.query, task.gallery or task.query
    among_queries = task.gallery is None
    count = min(_PANEL_NEIGHBOURS, len(gallery) - among_queries)
    chosen = generator(seed, "panels").permutation(len(query))[:queries]
    all_QD, gallery_GD = embedded
    found_QK = nearest(
        all_QD[chosen], all_QD if gallery_GD is None else gallery_GD, count + among_queries
    )
    scores_QK, index_QK = (t.cpu().numpy() for t in found_QK)
    # A query in the gallery is among its own neighbours, or as many others are just as near.
    other_QK = index_QK != chosen[:, None] if among_queries else np.ones_like(index_QK, bool)
    others = [np.flatnonzero(other_K)[:count] for other_K in other_QK]
    found = np.stack([index_K[k] for index_K, k in zip(index_QK, others, strict=True)])
    scores = np.stack([scores_K[k] for scores_K, k in zip(scores_QK, others, strict=True)])
    pixels = np.concatenate([query.pixels[chosen][:, None], gallery.pixels[found]], axis=1)
    query_names = [query.class_names[i] for i in query.labels[chosen]]
    found_names = [[gallery.class_names[i] for i in labels] for labels in gallery.labels[found]]
    names = np.array([[own, *others] for own, others in zip(query_names, found_names, strict=True)])
    # Labels are numbers within each set; the report compares them, so they are numbered by name.
    labels = np.unique(names, return_inverse=True)[1].reshape(names.shape)
    return {
        "pixels": pixels,
        "labels": labels,
        "class_names": names,
        "scores": scores,
        "query_index": chosen,
    }
