"""Retrieval on embeddings: nearest neighbours by cosine, R@1, R@5, MAP@10 and MAP@R.

Works on tensors and knows nothing federated. Exact, and in bounded memory; see
:mod:`fedss.evaluation.neighbours`.

Shape suffixes: Q queries, G gallery items, D embedding size, B queries of one block,
K neighbours kept, U queries that are used, C labels.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedss.evaluation.inputs import both_sides, labelled_sides
from fedss.evaluation.neighbours import block_rows, prepare_gallery, search

_DEPTH = 10


@dataclass(frozen=True)
class RetrievalMetrics:
    """Means over the queries that have something to find; see `evaluate_retrieval`.

    `map_at_10_by_class` is the mean over classes of each class's mean AP@10: there a class of few
    queries counts as much as one of many. `queries` were used, of so many `classes`; `skipped` had
    no relevant item in the gallery and are left out of every mean.
    """

    recall_at_1: float
    recall_at_5: float
    map_at_10: float
    map_at_r: float
    map_at_10_by_class: float
    queries: int
    classes: int
    skipped: int


ByLabel = tuple[np.ndarray, np.ndarray, np.ndarray]
"""The labels that queries were used of, rising, int64 [C]; how many queries of each, int64 [C]; and
their mean AP@10, float64 [C]."""


def nearest(
    query_QD: Tensor, gallery_GD: Tensor | None = None, k: int = 5
) -> tuple[Tensor, Tensor]:
    """The k gallery items of the highest cosine for every query, exactly.

    Ties are settled by position: of equal cosines the lower gallery index comes first, also where
    the cut after the k-th item falls between equals.

    Args:
        query_QD: floating point [Q, D]; rows need not be normalized, a zero row has cosine 0 with
            everything.
        gallery_GD: floating point [G, D] on the same device. None: the queries are the gallery
            and no query finds itself (its own position is left out, equal rows are not).
        k: how many, at most G (G - 1 when `gallery_GD` is None).

    Returns:
        scores_QK float32 [Q, k], descending, and index_QK int64 [Q, k], on the queries' device
        (on the CPU for MPS, which has no float64).

    Raises:
        ValueError: no rows or columns, sizes that differ, NaN or infinite values, not floating
            point, k out of range.

    >>> scores_QK, index_QK = nearest(torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]]), k=1)
    >>> index_QK.squeeze(1).tolist()
    [2, 2, 1]
    """
    unit_QD, unit_GD = both_sides(query_QD, gallery_GD)
    alone = gallery_GD is None
    candidates = len(unit_GD) - alone
    if not 1 <= k <= candidates:
        raise ValueError(
            f"k must lie between 1 and the number of candidates, {candidates}, but is {k}: "
            f"ask for min(k, {candidates}) neighbours"
        )
    scores_QK = unit_QD.new_empty(len(unit_QD), k)
    index_QK = torch.empty_like(scores_QK, dtype=torch.int64)
    gallery = prepare_gallery(unit_GD, k)

    def keep(rows_B: Tensor, scores_BK: Tensor, index_BK: Tensor) -> None:
        scores_QK[rows_B] = scores_BK.to(torch.float32)
        index_QK[rows_B] = index_BK

    rows_Q = torch.arange(len(unit_QD), device=unit_QD.device)
    blocks = torch.split(rows_Q, block_rows(len(unit_GD), k, gallery.workers))
    search(unit_QD, gallery, alone, [(rows_B, k) for rows_B in blocks], keep)
    return scores_QK, index_QK


def evaluate_retrieval(
    query_QD: Tensor,
    query_labels_Q: Tensor,
    gallery_GD: Tensor | None = None,
    gallery_labels_G: Tensor | None = None,
) -> RetrievalMetrics:
    """R@1, R@5, MAP@10 and MAP@R of embeddings under cosine.

    For a query with R relevant gallery items (those of its own class, itself left out), rel(i) = 1
    if the i-th neighbour is relevant and P(i) = (1/i) sum_{j<=i} rel(j)::

        R@k   = max_{i<=k} rel(i)
        AP@10 = 1/min(R, 10) * sum_{i<=min(10, G)} P(i) rel(i)
        AP@R  = 1/R          * sum_{i<=R}          P(i) rel(i)

    and the metrics are means over the queries with R > 0. Ties: the lower gallery index first, as
    in `nearest`.

    AP@R is that of Musgrave et al. 2020 (arXiv 2003.08505); AP@10 that of Google Landmarks
    retrieval (Weyand et al. 2020, arXiv 2004.01804, with 10 in place of 100).

    Args:
        query_QD: floating point [Q, D], as in `nearest`.
        query_labels_Q: integers [Q], any values.
        gallery_GD: floating point [G, D], or None: each query against all the others.
        gallery_labels_G: integers [G], given if and only if `gallery_GD` is.

    Raises:
        ValueError: as in `nearest`; labels that are not integers or not one per row; gallery
            without labels or labels without gallery; no query with a relevant item.
    """
    return evaluate_by_label(query_QD, query_labels_Q, gallery_GD, gallery_labels_G)[0]


def evaluate_by_label(
    query_QD: Tensor,
    query_labels_Q: Tensor,
    gallery_GD: Tensor | None = None,
    gallery_labels_G: Tensor | None = None,
) -> tuple[RetrievalMetrics, ByLabel]:
    """:func:`evaluate_retrieval`, and what it found of each class; same arguments and errors."""
    sides = labelled_sides(query_QD, query_labels_Q, gallery_GD, gallery_labels_G)
    labels_Q, labels_G = sides.labels_Q, sides.labels_G
    relevant_Q = _count_of_label(labels_Q, labels_G) - int(sides.alone)
    used_Q = relevant_Q > 0
    if not bool(used_Q.any()):
        where = "another image of its class"
        where = where if sides.alone else "an image of its class in the gallery"
        raise ValueError(
            f"no query has {where} ({len(labels_Q)} queries, {len(labels_G)} gallery items): "
            "evaluate on classes of two images or more"
        )

    # From many relevant items to few: only the blocks that need a long list of neighbours pay for
    # it, and the first query of a block tells how long its list must be.
    order_U = relevant_Q.argsort(descending=True, stable=True)[: int(used_Q.sum())]
    candidates = len(labels_G) - sides.alone
    gallery = prepare_gallery(sides.gallery_GD, min(_DEPTH, candidates))
    blocks: list[tuple[Tensor, int]] = []
    left_U = order_U
    while len(left_U):
        k = min(max(_DEPTH, int(relevant_Q[left_U[0]])), candidates)
        step = block_rows(len(labels_G), k, gallery.workers)
        blocks.append((left_U[:step], k))
        left_U = left_U[step:]

    def judge(rows_B: Tensor, _: Tensor, index_BK: Tensor) -> list[list[float]]:
        """R@1, R@5, AP@10 and AP@R of each query."""
        relevance_BK, relevant_B = labels_G[index_BK] == labels_Q[rows_B, None], relevant_Q[rows_B]
        k = relevance_BK.shape[1]
        rank_K = torch.arange(1, k + 1, dtype=torch.float64, device=relevance_BK.device)
        # A running sum, not a sum over a slice: its first R terms do not depend on how many more
        # columns this block happens to have.
        precision_BK = (relevance_BK.cumsum(1) / rank_K * relevance_BK).cumsum(1)
        at_10_B = precision_BK[:, min(_DEPTH, k) - 1] / relevant_B.clamp(max=_DEPTH)
        at_r_B = precision_BK.gather(1, relevant_B[:, None] - 1).squeeze(1) / relevant_B
        columns = (relevance_BK[:, 0], relevance_BK[:, :5].any(1), at_10_B, at_r_B)
        return [column_B.tolist() for column_B in columns]

    judged = search(sides.query_QD, gallery, sides.alone, blocks, judge)
    columns = [list(itertools.chain(*column)) for column in zip(*judged, strict=True)]
    by_label = _by_label(labels_Q[order_U].cpu().numpy(), np.array(columns[2]))
    labels_C, _, map_at_10_C = by_label
    # fsum rounds once: the mean does not depend on the order in which queries came.
    first, among_5, at_10, at_r = (math.fsum(column) / len(order_U) for column in columns)
    metrics = RetrievalMetrics(
        recall_at_1=first,
        recall_at_5=among_5,
        map_at_10=at_10,
        map_at_r=at_r,
        map_at_10_by_class=math.fsum(map_at_10_C) / len(labels_C),
        queries=len(order_U),
        classes=len(labels_C),
        skipped=len(labels_Q) - len(order_U),
    )
    return metrics, by_label


def _by_label(labels_U: np.ndarray, precision_U: np.ndarray) -> ByLabel:
    """Means over the queries of each label, whatever the order of queries."""
    order_U = np.lexsort((precision_U, labels_U))
    labels_C, first_C, queries_C = np.unique(
        labels_U[order_U], return_index=True, return_counts=True
    )
    return labels_C, queries_C, np.add.reduceat(precision_U[order_U], first_C) / queries_C


def _count_of_label(labels_Q: Tensor, labels_G: Tensor) -> Tensor:
    """How many gallery items carry each query's label, int64 [Q]."""
    values, counts = torch.unique(labels_G, return_counts=True)
    place_Q = torch.searchsorted(values, labels_Q).clamp(max=len(values) - 1)
    return torch.where(values[place_Q] == labels_Q, counts[place_Q], 0)
