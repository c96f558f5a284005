"""Retrieval on embeddings: nearest neighbours by cosine, R@1, R@5, MAP@10 and MAP@R.

Works on tensors and knows nothing federated. Exact and blocked: memory is bounded by
`BLOCK_BYTES` beyond the embeddings themselves, whatever the size of the gallery or of a class.

Shape suffixes: Q queries, G gallery items, D embedding size, B queries of one block,
K neighbours kept, T some queries of a block, P pairs of query and gallery item, N rows of either
side.

Why results do not depend on block size, thread count, order of rows or device: rows are normalised
and then rounded to whole multiples of 2^-24 (the resolution of float32 below 1). A product of two
such numbers is a multiple of 2^-48, and by Cauchy-Schwarz no partial sum of a dot product exceeds
1 by more than rounding, so every intermediate of a float64 matrix product is a whole number of
2^-48 far below 2^53 of them: the product is exact in whatever order it is summed. Cosines are thus
off by the rounding of the rows alone (about 1e-7), and two items are tied when their rounded rows
have exactly the same cosine, not when two roundings happen to agree.

Where the time goes: nearly all of it is one matrix product, so that is done in a type that the
machine multiplies fast, and only to screen (`_screened`): what its rounding, which is bounded,
leaves in doubt is scored again in float64, and whatever is still in doubt goes to `_exact`. Every
way gives the same bits.
"""

import functools
import itertools
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

BLOCK_BYTES = 320 * 2**20
"""What the blocks of queries treated at one time may take; queries (float32) and gallery (twice)
come on top."""

_GRID = 2.0**24
_DEPTH = 10
_BLOCK = 384  # queries in a block: more gain nothing
_FEWEST = 64  # fewer make the product slow: rather fewer blocks at one time
_GROUP = 16  # scores whose maximum is looked at in their place
_TILE = 2**18  # numbers turned to float64 at a time
_FAR, _BACK = 400, 600  # exponents of 2: float64 goes from -1074 to 1024, and squares need half


@dataclass(frozen=True)
class RetrievalMetrics:
    """Means over the queries that have something to find.

    `recall_at_k` is the share of queries with at least one relevant item among the first k;
    `map_at_10` and `map_at_r` are defined in `evaluate_retrieval`. `map_at_10_by_class` is the mean
    over classes of each class's mean AP@10: there a class of few queries counts as much as one of
    many. `queries` were used, of so many `classes`; `skipped` had no relevant item in the gallery
    and are left out of every mean.
    """

    recall_at_1: float
    recall_at_5: float
    map_at_10: float
    map_at_r: float
    map_at_10_by_class: float
    queries: int
    classes: int
    skipped: int


@dataclass(frozen=True)
class LabelScores:
    """Retrieval of each of C labels that queries were used of, in rising order.

    Attributes:
        labels_C: int64 [C].
        queries_C: queries that were used of each, int64 [C].
        map_at_10_C: their mean AP@10, float64 [C].
    """

    labels_C: np.ndarray
    queries_C: np.ndarray
    map_at_10_C: np.ndarray


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
    unit_QD, unit_GD = both_sides(query_QD, gallery_GD)
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
    gallery = _searched(unit_GD, k)

    def keep(rows_B: Tensor, scores_BK: Tensor, index_BK: Tensor) -> None:
        scores_QK[rows_B] = scores_BK.to(torch.float32)
        index_QK[rows_B] = index_BK

    step = block_rows(len(unit_GD), k, gallery.workers)
    blocks = [
        (rows_B, k) for rows_B in torch.split(torch.arange(len(unit_QD), device=device), step)
    ]
    _search(unit_QD, gallery, alone, blocks, keep)
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
    return evaluate_by_label(query_QD, query_labels_Q, gallery_GD, gallery_labels_G)[0]


def evaluate_by_label(
    query_QD: Tensor,
    query_labels_Q: Tensor,
    gallery_GD: Tensor | None = None,
    gallery_labels_G: Tensor | None = None,
) -> tuple[RetrievalMetrics, LabelScores]:
    """:func:`evaluate_retrieval`, and what it found of each class; same arguments and errors."""
    if (gallery_GD is None) != (gallery_labels_G is None):
        raise ValueError("give gallery embeddings and gallery labels together, or neither")
    unit_QD, unit_GD = both_sides(query_QD, gallery_GD)
    alone = gallery_labels_G is None
    labels_Q = checked_labels(query_labels_Q, unit_QD, "query")
    labels_G = (
        labels_Q
        if gallery_labels_G is None
        else checked_labels(gallery_labels_G, unit_GD, "gallery")
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
    candidates = len(unit_GD) - alone
    gallery = _searched(unit_GD, min(_DEPTH, candidates))
    blocks: list[tuple[Tensor, int]] = []
    left_Q = order_Q
    while len(left_Q):
        k = min(max(_DEPTH, int(relevant_Q[left_Q[0]])), candidates)
        step = block_rows(len(unit_GD), k, gallery.workers)
        blocks.append((left_Q[:step], k))
        left_Q = left_Q[step:]

    def judge(rows_B: Tensor, _: Tensor, index_BK: Tensor) -> list[list[float]]:
        k = index_BK.shape[1]
        relevant_B = relevant_Q[rows_B]
        relevance_BK = labels_G[index_BK] == labels_Q[rows_B, None]
        rank_K = torch.arange(1, k + 1, dtype=torch.float64, device=unit_QD.device)
        # A running sum, not a sum over a slice: its first R terms do not depend on how many more
        # columns this block happens to have.
        precision_BK = (relevance_BK.cumsum(1) / rank_K * relevance_BK).cumsum(1)
        at_10_B = precision_BK[:, min(_DEPTH, k) - 1] / relevant_B.clamp(max=_DEPTH)
        at_r_B = precision_BK.gather(1, relevant_B[:, None] - 1).squeeze(1) / relevant_B
        columns = (relevance_BK[:, 0], relevance_BK[:, :5].any(1), at_10_B, at_r_B)
        return [column_B.tolist() for column_B in columns]

    count = len(order_Q)
    columns = [
        list(itertools.chain(*column))
        for column in zip(*_search(unit_QD, gallery, alone, blocks, judge), strict=True)
    ]
    by_label = _by_label(labels_Q[order_Q].cpu().numpy(), np.array(columns[2]))
    # fsum rounds once: the mean does not depend on the order in which queries came.
    first, among_5, at_10, at_r = (math.fsum(column) / count for column in columns)
    metrics = RetrievalMetrics(
        recall_at_1=first,
        recall_at_5=among_5,
        map_at_10=at_10,
        map_at_r=at_r,
        map_at_10_by_class=math.fsum(by_label.map_at_10_C) / len(by_label.labels_C),
        queries=count,
        classes=len(by_label.labels_C),
        skipped=len(unit_QD) - count,
    )
    return metrics, by_label


def _by_label(labels_U: np.ndarray, precision_U: np.ndarray) -> LabelScores:
    """Means over the queries of each label, whatever the order of queries."""
    order_U = np.lexsort((precision_U, labels_U))
    labels_C, first_C, queries_C = np.unique(
        labels_U[order_U], return_index=True, return_counts=True
    )
    sums_C = np.add.reduceat(precision_U[order_U], first_C)
    return LabelScores(labels_C, queries_C, sums_C / queries_C)


def block_rows(gallery: int, k: int, workers: int = 1) -> int:
    """How many queries a block may have so that all workers stay below `BLOCK_BYTES` (at least 1).

    Half of it is for screens: 16 bytes per number of a tile, and `_screen_bytes` per query. The
    other half is for what `_exact` takes beyond the scores.
    """
    half = BLOCK_BYTES // 2 // workers
    return max(1, min(_BLOCK, (half - 16 * _TILE) // _screen_bytes(gallery, k)))


def _screen_bytes(gallery: int, k: int) -> int:
    """Per gallery item up to 4 bytes of scores and 1 of maxima; per candidate and score of its
    group up to 32 of scores and places.
    """
    return 5 * gallery + 32 * _GROUP * _most(k)


def _most(k: int) -> int:
    """How many candidates of one query a screen puts up with."""
    return 4 * k + 32


def _padded(gallery: int) -> int:
    return -(-gallery // _GROUP**2) * _GROUP**2


def _tile(rows_ND: Tensor) -> int:
    return max(1, _TILE // rows_ND.shape[1])


@dataclass(frozen=True)
class _Screen:
    """The gallery in a type that is multiplied fast; `off` is how far rounding moved a row."""

    rows_GD: Tensor
    off: float


@dataclass(frozen=True)
class _Gallery:
    """What is searched: with which screens, from fast and coarse to fine, by how many workers."""

    rows_GD: Tensor
    screens: tuple[_Screen, ...]
    workers: int


def _searched(rows_GD: Tensor, k: int) -> _Gallery:
    """A gallery to be searched for k neighbours or more."""
    on_cpu = rows_GD.device.type == "cpu"
    dtypes = []
    if _is_long(rows_GD, k):
        if on_cpu and _bfloat16_pays():
            dtypes.append(torch.bfloat16)
        if _float32_is_kept():
            dtypes.append(torch.float32)
    screens = []
    for dtype in dtypes:
        tiles = torch.split(rows_GD, _tile(rows_GD))
        off = max(float(_off(rows_ND, rows_ND.to(dtype)).max()) for rows_ND in tiles)
        screens.append(_Screen(rows_GD.to(dtype), off))
    least = 16 * _TILE + _FEWEST * _screen_bytes(len(rows_GD), k)
    affordable = max(1, BLOCK_BYTES // 2 // least)
    return _Gallery(
        rows_GD, tuple(screens), min(torch.get_num_threads(), affordable) if on_cpu else 1
    )


Item = TypeVar("Item")
Found = TypeVar("Found")


def shared_out(treat: Callable[[Item], Found], items: Sequence[Item], workers: int) -> list[Found]:
    """`treat` of each item, in their order.

    Workers are threads, among which torch's threads are shared out. An operation that is split over
    threads waits for the slowest, and there are many small ones here: with anything else running on
    the machine that took twenty times as long.
    """
    workers = min(workers, len(items))
    if workers == 1:
        return [treat(item) for item in items]
    inference = torch.is_inference_mode_enabled()

    def treat_there(item: Item) -> Found:
        with torch.inference_mode(inference):  # which a thread does not take over by itself
            return treat(item)

    threads = torch.get_num_threads()
    share = threads // workers
    torch.set_num_threads(share)
    try:
        with ThreadPoolExecutor(
            workers, initializer=torch.set_num_threads, initargs=(share,)
        ) as pool:
            return list(pool.map(treat_there, items))
    finally:
        torch.set_num_threads(threads)


def _search(
    query_QD: Tensor,
    gallery: _Gallery,
    alone: bool,
    blocks: Sequence[tuple[Tensor, int]],
    use: Callable[[Tensor, Tensor, Tensor], Found],
) -> list[Found]:
    """`use(rows_B, scores_BK, index_BK)` for each block, that is, rows of queries and k."""
    items = len(gallery.rows_GD)
    longest = max(len(rows_B) for rows_B, _ in blocks)
    workers = min(gallery.workers, len(blocks))
    # Memory for scores is used again: fresh pages cost as much as the product itself.
    rooms: SimpleQueue[Tensor] = SimpleQueue()
    for _ in range(workers):
        size = max(items, longest * _padded(items) // 2)
        rooms.put(gallery.rows_GD.new_empty(size, dtype=torch.float64))

    def treat(block: tuple[Tensor, int]) -> Found:
        rows_B, k = block
        room = rooms.get()
        try:
            own_B = rows_B if alone else None
            return use(rows_B, *_top(query_QD[rows_B], gallery, own_B, k, room))
        finally:
            rooms.put(room)

    return shared_out(treat, blocks, workers)


def _top(
    query_BD: Tensor, gallery: _Gallery, own_B: Tensor | None, k: int, room: Tensor
) -> tuple[Tensor, Tensor]:
    """What `_exact` gives, faster: each screen settles what it can and passes on the rest."""
    values_BK = torch.empty(len(query_BD), k, dtype=torch.float64, device=query_BD.device)
    index_BK = torch.empty(len(query_BD), k, dtype=torch.int64, device=query_BD.device)
    left_T = torch.arange(len(query_BD), device=query_BD.device)
    for screen in gallery.screens if _is_long(gallery.rows_GD, k) else ():
        own_T = None if own_B is None else own_B[left_T]
        settled_T, values_TK, index_TK = _screened(
            query_BD[left_T], gallery.rows_GD, own_T, k, screen, room
        )
        values_BK[left_T[settled_T]] = values_TK
        index_BK[left_T[settled_T]] = index_TK
        left_T = left_T[~settled_T]
        if not len(left_T):
            return values_BK, index_BK
    own_T = None if own_B is None else own_B[left_T]
    values_BK[left_T], index_BK[left_T] = _exact(query_BD[left_T], gallery, own_T, k, room)
    return values_BK, index_BK


def _is_long(items: Tensor, k: int) -> bool:
    """Whether a few times k groups are few among the items."""
    return len(items) >= 4 * _GROUP * k


def _off(rows_ND: Tensor, rounded_ND: Tensor) -> Tensor:
    """How far rounding moved each row, float64 [N]."""
    off_N: Tensor = torch.linalg.vector_norm(
        rows_ND - rounded_ND.float(), dim=1, dtype=torch.float64
    )
    return off_N


def _doubt(screen: _Screen, query_BD: Tensor, rounded_BD: Tensor) -> Tensor:
    """The e of `_screened`, float64 [B]; 5% more for the second order, twice for truncated sums."""
    return 1.05 * (screen.off + _off(query_BD, rounded_BD)) + query_BD.shape[1] * 2.0**-23


@functools.cache
def _bfloat16_pays() -> bool:
    """Whether this processor multiplies bfloat16 faster than float32, as torch does not tell.

    The answer changes no result, only how soon it is there.
    """
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        rows_ND = torch.ones(4096, 64, dtype=dtype, device="cpu")
        tries = []
        for _ in range(5):
            start = time.perf_counter()
            torch.mm(rows_ND, rows_ND[:_BLOCK].T)
            tries.append(time.perf_counter() - start)
        seconds[dtype] = min(tries)
    return seconds[torch.bfloat16] < seconds[torch.float32]


def _float32_is_kept() -> bool:
    """Whether torch multiplies float32 as float32, not rounded to TF32 or bfloat16."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set backend by backend, which this function cannot tell
        return False


def _screened(
    query_BD: Tensor,
    gallery_GD: Tensor,
    own_B: Tensor | None,
    k: int,
    screen: _Screen,
    room: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Which queries a screen settles, bool [B]; and what `_exact` gives for these T, [T, k].

    With x, y rows and z, w their rounded forms, the sum v = z.w, taken in float32 in any order, is
    off by at most

        e = |x - z| |y| + |z| |y - w| + D 2^-24

    up to terms of second order (Cauchy-Schwarz; Higham 2002, section 3.1; rows have length 1), and
    is then rounded to the screen's type, f = fl(v), with unit roundoff u. If k items have f >= t,
    then v >= t (1 - u) for them, so that the first k score t (1 - u) - e or more. For these and
    whatever is tied with them v >= t (1 - u) - 2e, and so f >= c for any number c of that type up
    to there, as rounding keeps order. The items with f >= c are candidates and scored again. Here
    c = fl(t (1 - 2u) - 2e), where one u is for its own rounding.
    """
    gallery, queries = len(gallery_GD), len(query_BD)
    dtype = screen.rows_GD.dtype
    rounded_BD = query_BD.to(dtype)
    scores_GB = room.view(dtype)[: _padded(gallery) * queries].view(-1, queries)
    # With `out`, also because autocast would otherwise turn float32 into bfloat16.
    torch.mm(screen.rows_GD, rounded_BD.T, out=scores_GB[:gallery])

    # Read as integers, positive floats keep their order and negative ones come below, if not in
    # order; maxima are found faster.
    integer = torch.int16 if dtype == torch.bfloat16 else torch.int32
    bits_GB = scores_GB.view(integer)
    bits_GB[gallery:] = torch.iinfo(integer).min
    if own_B is not None:
        bits_GB.scatter_(0, own_B[None], torch.iinfo(integer).min)
    # Maxima of groups, of groups of groups, ... say where the largest are, at the speed of memory.
    # A topk over all scores would take as long as the product.
    levels = [bits_GB]
    while len(levels[-1]) % _GROUP == 0 and _is_long(levels[-1], k):
        levels.append(levels[-1].view(_GROUP, -1, queries).amax(0))
    t_B = levels[-1].T.topk(k, dim=1).values[:, -1].contiguous().view(dtype).double()
    cut_B = t_B * (1 - torch.finfo(dtype).eps) - 2 * _doubt(screen, query_BD, rounded_BD)
    cut_B = torch.where(cut_B > 0, cut_B.to(dtype).view(integer), torch.iinfo(integer).max)

    # In order of position, in which stable sorts by score and then by query leave equals.
    place_P = _from_cut_up(levels, cut_B, _most(k)).sort().values
    index_P, column_P = place_P // queries, place_P % queries
    values_P = place_P.new_empty(len(place_P), dtype=torch.float64)
    step = _tile(gallery_GD)
    for start in range(0, len(place_P), step):
        pairs = slice(start, start + step)
        rows_PD = gallery_GD.index_select(0, index_P[pairs]).double()
        values_P[pairs] = rows_PD.mul_(query_BD.index_select(0, column_P[pairs])).sum(1)
    # + 0.0 turns -0.0 into 0.0, which some sorts tell apart.
    order_P = values_P.add_(0.0).argsort(descending=True, stable=True)
    order_P = order_P[column_P[order_P].argsort(stable=True)]
    count_B = torch.bincount(column_P, minlength=queries)
    first_B = count_B.cumsum(0) - count_B
    settled_B = count_B > 0
    order_TK = order_P[first_B[settled_B, None] + torch.arange(k, device=order_P.device)]
    return settled_B, values_P[order_TK], index_P[order_TK]


def _from_cut_up(levels: list[Tensor], cut_B: Tensor, most: int) -> Tensor:
    """Where levels[0] [N, B] reaches `cut_B`, as row * B + column; nothing of crowded columns.

    The next level holds the maxima of groups of its rows that lie equally far apart, and so on; a
    column is crowded if on some level more than `most` reach the cut.
    """
    level_NB, *maxima = levels
    size = level_NB.numel()
    if maxima:
        group_P1 = _from_cut_up(maxima, cut_B, most)[:, None]
        apart = maxima[0].numel()
        place_PM = group_P1 + torch.arange(0, size, apart, device=cut_B.device)
        cut_PM = cut_B[group_P1 % len(cut_B)]
    else:
        place_PM = torch.arange(size, device=cut_B.device).view_as(level_NB)
        cut_PM = cut_B
    # index_select on one dimension: on the CPU ten times as fast as gather.
    near_PM = level_NB.view(-1).index_select(0, place_PM.view(-1)).view_as(place_PM)
    place_P = place_PM[near_PM >= cut_PM]
    column_P = place_P % len(cut_B)
    crowded_B = torch.bincount(column_P, minlength=len(cut_B)) > most
    return place_P[~crowded_B[column_P]]


def _exact(
    query_BD: Tensor, gallery: _Gallery, own_B: Tensor | None, k: int, room: Tensor
) -> tuple[Tensor, Tensor]:
    """Top k of one block by (score descending, index ascending), from float64 scores of all.

    float64 and int64 [B, k].
    """
    items = len(gallery.rows_GD)
    values_BK = torch.empty(len(query_BD), k, dtype=torch.float64, device=query_BD.device)
    index_BK = torch.empty(len(query_BD), k, dtype=torch.int64, device=query_BD.device)
    # Scores lie in `room`. Beyond, if its top k cuts through a tie, a query takes per gallery item
    # 8 bytes for a copy and up to 24 for masks, counts and the integers they are counted in, and
    # per neighbour kept at most 96 of float64 and int64 columns.
    affordable = BLOCK_BYTES // 2 // gallery.workers // (32 * items + 96 * (k + 1))
    step = max(1, min(affordable, len(room) // items))
    for start in range(0, len(query_BD), step):
        part = slice(start, start + step)
        query_TD = query_BD[part].double()
        scores_TG = room[: len(query_TD) * items].view(-1, items)
        for first in range(0, items, _tile(gallery.rows_GD)):
            tile = slice(first, first + _tile(gallery.rows_GD))
            torch.mm(query_TD, gallery.rows_GD[tile].double().T, out=scores_TG[:, tile])
        if own_B is not None:
            scores_TG.scatter_(1, own_B[part, None], -torch.inf)
        values_BK[part], index_BK[part] = _by_position(scores_TG, k)
    return values_BK, index_BK


def _by_position(scores_BG: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest by (score descending, index ascending)."""
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


def both_sides(query_QD: Tensor, gallery_GD: Tensor | None) -> tuple[Tensor, Tensor]:
    """Queries and gallery checked and normalised; one tensor twice if there is no gallery."""
    unit_QD = unit_rows(query_QD, "query")
    if gallery_GD is None:
        if len(unit_QD) < 2:
            raise ValueError("one query without a gallery has nothing to be compared with")
        return unit_QD, unit_QD
    unit_GD = unit_rows(gallery_GD, "gallery")
    if unit_QD.shape[1] != unit_GD.shape[1]:
        raise ValueError(
            f"queries have {unit_QD.shape[1]} dimensions and gallery items {unit_GD.shape[1]}: "
            "embed both with the same model"
        )
    return unit_QD, unit_GD


def unit_rows(rows_ND: Tensor, side: str) -> Tensor:
    """Rows of length 1 in whole multiples of 2^-24, float32 without loss; zero rows stay zero."""
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
    # Squares of numbers far from 1 leave float64. A power of two rounds nothing.
    most_N1 = torch.linalg.vector_norm(rows_ND, ord=torch.inf, dim=1, keepdim=True)
    small_N1, large_N1 = (most_N1 > 0) & (most_N1 < 2.0**-_FAR), most_N1 > 2.0**_FAR
    if bool((small_N1 | large_N1).any()):
        near_N1 = torch.ones_like(most_N1).masked_fill_(small_N1, 2.0**_BACK)
        rows_ND.mul_(near_N1.masked_fill_(large_N1, 2.0**-_BACK))
    norms_N1 = torch.linalg.vector_norm(rows_ND, dim=1, keepdim=True)
    if not bool(norms_N1.isfinite().all()):
        first = int((~norms_N1.squeeze(1).isfinite()).nonzero()[0])
        raise ValueError(f"{side} embedding {first} holds NaN or infinite values: did it diverge?")
    norms_N1[norms_N1 == 0] = 1.0
    return rows_ND.div_(norms_N1).mul_(_GRID).round_().div_(_GRID).float()


def checked_labels(labels_N: Tensor, rows_ND: Tensor, side: str) -> Tensor:
    """Labels as int64 where their rows are."""
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
