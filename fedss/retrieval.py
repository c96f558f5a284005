"""Retrieval on embeddings: nearest neighbours by cosine, R@1, R@5, MAP@10 and MAP@R.

Works on tensors and knows nothing federated. Exact and blocked: memory is bounded by
`BLOCK_BYTES` beyond the embeddings themselves, whatever the size of the gallery or of a class.

Shape suffixes: Q queries, G gallery items, D embedding size, B queries of one block,
K neighbours kept, T queries of a block whose top K cuts through a tie, N rows of either side.

Why results do not depend on block size, thread count, order of rows or device: rows are normalised
and then rounded to whole multiples of 2^-24 (the resolution of float32 below 1). A product of two
such numbers is a multiple of 2^-48, and by Cauchy-Schwarz no partial sum of a dot product exceeds
1 by more than rounding, so every intermediate of a float64 matrix product is a whole number of
2^-48 far below 2^53 of them: the product is exact in whatever order it is summed. Cosines are thus
off by the rounding of the rows alone (about 1e-7), and two items are tied when their rounded rows
have exactly the same cosine, not when two roundings happen to agree.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_BYTES = 320 * 2**20
"""What one block of queries may take; gallery and queries (float64) come on top."""

_GRID = 2.0**24
_DEPTH = 10


@dataclass(frozen=True)
class RetrievalMetrics:
    """Means over the queries that have something to find.

    `recall_at_k` is the share of queries with at least one relevant item among the first k;
    `map_at_10` and `map_at_r` are defined in `evaluate_retrieval`. `queries` were used, `skipped`
    had no relevant item in the gallery and are left out of every mean.
    """

    recall_at_1: float
    recall_at_5: float
    map_at_10: float
    map_at_r: float
    queries: int
    skipped: int


def nearest(
    query_QD: Tensor, gallery_GD: Tensor | None = None, k: int = 5
) -> tuple[Tensor, Tensor]:
    """The k gallery items of the highest cosine for every query, exactly.

    Ties are settled by position: of equal cosines the lower gallery index comes first, also where
    the cut after the k-th item falls between equals.

    Args:
        query_QD: floating point [Q, D]; rows need not be normalised, a zero row has cosine 0 with
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
    unit_QD, unit_GD = _both_sides(query_QD, gallery_GD)
    alone = gallery_GD is None
    candidates = len(unit_GD) - alone
    if not 1 <= k <= candidates:
        raise ValueError(
            f"k must lie between 1 and the number of candidates, {candidates}, but is {k}: "
            f"ask for min(k, {candidates}) neighbours"
        )
    device = unit_QD.device
    scores_QK = torch.empty(len(unit_QD), k, dtype=torch.float32, device=device)
    index_QK = torch.empty(len(unit_QD), k, dtype=torch.int64, device=device)
    step = block_rows(len(unit_GD), k)
    scratch_BG = unit_GD.new_empty(min(step, len(unit_QD)), len(unit_GD))
    for start in range(0, len(unit_QD), step):
        rows_B = torch.arange(start, min(start + step, len(unit_QD)), device=device)
        scores_BK, index_BK = _top(
            unit_QD[rows_B], unit_GD, rows_B if alone else None, k, scratch_BG
        )
        scores_QK[rows_B] = scores_BK.to(torch.float32)
        index_QK[rows_B] = index_BK
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
    in `nearest`; a collapsed model, whose rows are all equal, thus scores by the order of its
    gallery, which is what chance gives if that order is shuffled.

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
    if (gallery_GD is None) != (gallery_labels_G is None):
        raise ValueError("give gallery embeddings and gallery labels together, or neither")
    unit_QD, unit_GD = _both_sides(query_QD, gallery_GD)
    alone = gallery_labels_G is None
    labels_Q = _checked_labels(query_labels_Q, unit_QD, "query")
    labels_G = (
        labels_Q
        if gallery_labels_G is None
        else _checked_labels(gallery_labels_G, unit_GD, "gallery")
    )
    relevant_Q = _count_of_label(labels_Q, labels_G) - int(alone)
    used_Q = relevant_Q > 0
    if not bool(used_Q.any()):
        where = "another picture of its class" if alone else "a picture of its class in the gallery"
        raise ValueError(
            f"no query has {where} ({len(unit_QD)} queries, {len(unit_GD)} gallery items): "
            "evaluate on classes of two pictures or more"
        )

    # From many relevant items to few: only the blocks that need a long list of neighbours pay for
    # it, and the first query of a block tells how long its list must be.
    order_Q = relevant_Q.argsort(descending=True, stable=True)[: int(used_Q.sum())]
    relevant_Q = relevant_Q[order_Q]
    candidates = len(unit_GD) - alone
    hits: dict[str, list[float]] = {"1": [], "5": [], "10": [], "r": []}
    # One buffer for all blocks: fresh pages for every block cost as much as the product itself.
    most = min(block_rows(len(unit_GD), min(_DEPTH, candidates)), len(order_Q))
    scratch_BG = unit_GD.new_empty(most, len(unit_GD))
    start = 0
    while start < len(order_Q):
        k = min(max(_DEPTH, int(relevant_Q[start])), candidates)
        step = block_rows(len(unit_GD), k)
        rows_B = order_Q[start : start + step]
        relevant_B = relevant_Q[start : start + step]
        _, index_BK = _top(unit_QD[rows_B], unit_GD, rows_B if alone else None, k, scratch_BG)
        relevance_BK = labels_G[index_BK] == labels_Q[rows_B, None]
        rank_K = torch.arange(1, k + 1, dtype=torch.float64, device=unit_QD.device)
        # A running sum, not a sum over a slice: its first R terms do not depend on how many more
        # columns this block happens to have.
        precision_BK = (relevance_BK.cumsum(1) / rank_K * relevance_BK).cumsum(1)
        at_10_B = precision_BK[:, min(_DEPTH, k) - 1] / relevant_B.clamp(max=_DEPTH)
        at_r_B = precision_BK.gather(1, relevant_B[:, None] - 1).squeeze(1) / relevant_B
        hits["1"] += relevance_BK[:, 0].tolist()
        hits["5"] += relevance_BK[:, :5].any(1).tolist()
        hits["10"] += at_10_B.tolist()
        hits["r"] += at_r_B.tolist()
        start += len(rows_B)
    count = len(order_Q)
    # fsum rounds once: the mean does not depend on the order in which queries came.
    return RetrievalMetrics(
        recall_at_1=math.fsum(hits["1"]) / count,
        recall_at_5=math.fsum(hits["5"]) / count,
        map_at_10=math.fsum(hits["10"]) / count,
        map_at_r=math.fsum(hits["r"]) / count,
        queries=count,
        skipped=len(unit_QD) - count,
    )


def block_rows(gallery: int, k: int) -> int:
    """How many queries to treat at once so that a block stays below `BLOCK_BYTES` (at least 1).

    A query takes per gallery item 8 bytes of scores and, if its top k cuts through a tie, 8 for a
    copy and up to 24 for masks, counts and the integers they are counted in; per neighbour kept at
    most 96 bytes of float64 and int64 columns.
    """
    return max(1, BLOCK_BYTES // (40 * gallery + 96 * (k + 1)))


def _top(
    query_BD: Tensor, gallery_GD: Tensor, own_B: Tensor | None, k: int, scratch_BG: Tensor
) -> tuple[Tensor, Tensor]:
    """Exact top k of one block by (score descending, index ascending); float64 and int64 [B, k]."""
    scores_BG = torch.mm(query_BD, gallery_GD.T, out=scratch_BG[: len(query_BD)])
    if own_B is not None:
        scores_BG.scatter_(1, own_B[:, None], -torch.inf)
    # topk promises no order among equals. One neighbour more than asked for shows whether the cut
    # after the k-th falls between equals; if so the set itself has to be settled.
    values_BK, index_BK = scores_BG.topk(min(k + 1, scores_BG.shape[1]), dim=1)
    cut_B = values_BK[:, k - 1] == values_BK[:, -1]
    if values_BK.shape[1] == k:
        cut_B = torch.zeros_like(cut_B)
    values_BK, index_BK = values_BK[:, :k], index_BK[:, :k]
    unsettled_B = cut_B | (values_BK[:, 1:] == values_BK[:, :-1]).any(1)
    if not bool(unsettled_B.any()):
        return values_BK, index_BK

    rows_T = cut_B.nonzero().squeeze(1)
    if len(rows_T):
        scores_TG = scores_BG[rows_T]
        last_T1 = values_BK[rows_T, k - 1 :]
        level_TG = scores_TG == last_T1
        chosen_TG = scores_TG > last_T1
        room_T1 = k - chosen_TG.sum(1, keepdim=True)
        chosen_TG |= level_TG & (level_TG.cumsum(1, dtype=torch.int32) <= room_T1)
        index_TK = chosen_TG.nonzero()[:, 1].reshape(-1, k)
        index_BK[rows_T] = index_TK
        values_BK[rows_T] = scores_TG.gather(1, index_TK)
    rows_T = unsettled_B.nonzero().squeeze(1)
    index_TK = index_BK[rows_T].sort(1).values
    # + 0.0 turns -0.0 into 0.0, which some sorts tell apart.
    values_TK = scores_BG[rows_T[:, None], index_TK] + 0.0
    values_TK, order_TK = values_TK.sort(dim=1, descending=True, stable=True)
    values_BK[rows_T] = values_TK
    index_BK[rows_T] = index_TK.gather(1, order_TK)
    return values_BK, index_BK


def _both_sides(query_QD: Tensor, gallery_GD: Tensor | None) -> tuple[Tensor, Tensor]:
    """Queries and gallery checked and normalised; one tensor twice if there is no gallery."""
    unit_QD = _unit_rows(query_QD, "query")
    if gallery_GD is None:
        if len(unit_QD) < 2:
            raise ValueError("one query without a gallery has nothing to be compared with")
        return unit_QD, unit_QD
    unit_GD = _unit_rows(gallery_GD, "gallery")
    if unit_QD.shape[1] != unit_GD.shape[1]:
        raise ValueError(
            f"queries have {unit_QD.shape[1]} dimensions and gallery items {unit_GD.shape[1]}: "
            "embed both with the same model"
        )
    return unit_QD, unit_GD


def _unit_rows(rows_ND: Tensor, side: str) -> Tensor:
    """Rows of length 1 in whole multiples of 2^-24, as float64; zero rows stay zero."""
    if rows_ND.ndim != 2 or rows_ND.numel() == 0:
        raise ValueError(
            f"{side} embeddings must be [rows, dimensions] with at least one of each, "
            f"not {list(rows_ND.shape)}"
        )
    if not rows_ND.is_floating_point():
        raise ValueError(f"{side} embeddings must be floating point, not {rows_ND.dtype}")
    rows_ND = rows_ND.detach()
    if rows_ND.device.type == "mps":
        rows_ND = rows_ND.cpu()
    rows_ND = rows_ND.to(torch.float64, copy=True)
    norms_N1 = torch.linalg.vector_norm(rows_ND, dim=1, keepdim=True)
    if not bool(norms_N1.isfinite().all()):
        first = int((~norms_N1.squeeze(1).isfinite()).nonzero()[0])
        raise ValueError(f"{side} embedding {first} holds NaN or infinite values: did it diverge?")
    norms_N1[norms_N1 == 0] = 1.0
    return rows_ND.div_(norms_N1).mul_(_GRID).round_().div_(_GRID)


def _checked_labels(labels_N: Tensor, rows_ND: Tensor, side: str) -> Tensor:
    if labels_N.shape != rows_ND.shape[:1]:
        raise ValueError(
            f"{side} labels must be one per row, [{len(rows_ND)}], not {list(labels_N.shape)}"
        )
    if labels_N.is_floating_point() or labels_N.is_complex() or labels_N.dtype == torch.bool:
        raise ValueError(f"{side} labels must be integers, not {labels_N.dtype}")
    return labels_N.to(rows_ND.device, torch.int64)


def _count_of_label(labels_Q: Tensor, labels_G: Tensor) -> Tensor:
    """How many gallery items carry each query's label, int64 [Q]."""
    values, counts = torch.unique(labels_G, return_counts=True)
    place_Q = torch.searchsorted(values, labels_Q).clamp(max=len(values) - 1)
    return torch.where(values[place_Q] == labels_Q, counts[place_Q], 0)
