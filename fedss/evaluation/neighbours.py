"""The items of the highest cosine, exactly, in bounded memory, fast.

Blocked: memory is bounded by `BLOCK_BYTES` beyond the embeddings themselves, whatever the size of
the gallery or of a class.

Shape suffixes: Q queries, G gallery items, D embedding size, B queries of one block,
K neighbours kept, T some queries of a block, P pairs of query and gallery item, N rows of either
side.

Why results do not depend on block size, thread count, order of rows or device: rows are normalized
and then rounded to whole multiples of 2^-24 (the resolution of float32 below 1). A product of two
such numbers is a multiple of 2^-48, and by Cauchy-Schwarz no partial sum of a dot product exceeds
1 by more than rounding, so every intermediate of a float64 matrix product is a whole number of
2^-48 far below 2^53 of them: the product is exact in whatever order it is summed. Cosines are thus
off by the rounding of the rows alone (about 1e-7), and two items are tied when their rounded rows
have exactly the same cosine, not when two roundings happen to agree.

Nearly all of the time goes into one matrix product, so that is done in a type that the machine
multiplies fast, and only to screen (`_screened`): what its rounding, which is bounded, leaves in
doubt is scored again in float64, and whatever is still in doubt goes to `_exact`.
"""

import functools
import timeit
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TypeVar

import torch
from torch import Tensor

BLOCK_BYTES = 320 * 2**20
"""What the blocks of queries treated at one time may take; queries (float32) and gallery (twice)
come on top."""

_BLOCK = 384  # queries in a block: more gain nothing
_FEWEST = 64  # fewer make the product slow: rather fewer blocks at one time
_GROUP = 16  # scores whose maximum is looked at in their place
_TILE = 2**18  # numbers turned to float64 at a time
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def block_rows(gallery: int, k: int, workers: int = 1) -> int:
    """How many queries a block may have so that all workers stay below `BLOCK_BYTES` (at least 1).

    Half of it is for screens: 16 bytes per number of a tile, and `_screen_bytes` per query. The
    other half is for what `_exact` takes beyond the scores.
    """
    half = BLOCK_BYTES // 2 // workers
    return max(1, min(_BLOCK, (half - 16 * _TILE) // _screen_bytes(gallery, k)))


def _screen_bytes(gallery: int, k: int) -> int:
    # Up to 4 of scores and 1 of maxima for each gallery item, 32 for each score of a group.
    return 5 * gallery + 32 * _GROUP * _most_candidates(k)


def _most_candidates(k: int) -> int:
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
class Gallery:
    """What is searched: with which screens, from fast and coarse to fine, by how many workers."""

    rows_GD: Tensor
    screens: tuple[_Screen, ...]
    workers: int


def prepare_gallery(rows_GD: Tensor, k: int) -> Gallery:
    """A gallery to be searched for k neighbours or more."""
    screens = []
    if _is_long(rows_GD, k):
        fast = [torch.bfloat16] if rows_GD.device.type == "cpu" and _bfloat16_pays() else []
        for dtype in [*fast, torch.float32] if _float32_is_kept() else fast:
            tiles = torch.split(rows_GD, _tile(rows_GD))
            off = max(float(_moved(rows_ND, rows_ND.to(dtype)).max()) for rows_ND in tiles)
            screens.append(_Screen(rows_GD.to(dtype), off))
    least = 16 * _TILE + _FEWEST * _screen_bytes(len(rows_GD), k)
    affordable = max(1, BLOCK_BYTES // 2 // least)
    return Gallery(rows_GD, tuple(screens), min(workers_on(rows_GD.device), affordable))


def in_workers(
    treat: Callable[[_Item, Tensor], _Result], items: Sequence[_Item], scratch: Sequence[Tensor]
) -> list[_Result]:
    """`treat(item, scratch)` of each item, in their order; as many workers as pieces of scratch.

    Scratch memory is used again: fresh pages cost as much as the product itself. Workers are
    threads, among which torch's threads are shared out: an operation that is split over threads
    waits for the slowest, and there are many small ones here.
    """
    workers = min(len(scratch), len(items))
    if workers == 1:
        return [treat(item, scratch[0]) for item in items]
    inference = torch.is_inference_mode_enabled()
    free: SimpleQueue[Tensor] = SimpleQueue()
    for piece in scratch:
        free.put(piece)

    def treat_on_worker(item: _Item) -> _Result:
        piece = free.get()
        try:
            with torch.inference_mode(inference):  # which a thread does not take over by itself
                return treat(item, piece)
        finally:
            free.put(piece)

    threads = torch.get_num_threads()
    share = threads // workers
    torch.set_num_threads(share)
    try:
        with ThreadPoolExecutor(
            workers, initializer=torch.set_num_threads, initargs=(share,)
        ) as pool:
            return list(pool.map(treat_on_worker, items))
    finally:
        torch.set_num_threads(threads)


def workers_on(device: torch.device) -> int:
    """As many as torch has threads, on a CPU."""
    return torch.get_num_threads() if device.type == "cpu" else 1


def search(
    query_QD: Tensor,
    gallery: Gallery,
    alone: bool,
    blocks: Sequence[tuple[Tensor, int]],
    use: Callable[[Tensor, Tensor, Tensor], _Result],
) -> list[_Result]:
    """`use(rows_B, scores_BK, index_BK)` for each block, that is, rows of queries and k.

    With `alone` the queries are the gallery, and none finds itself.
    """
    items = len(gallery.rows_GD)
    longest = max(len(rows_B) for rows_B, _ in blocks)
    size = max(items, longest * _padded(items) // 2)

    def treat(block: tuple[Tensor, int], room: Tensor) -> _Result:
        rows_B, k = block
        own_B = rows_B if alone else None
        return use(rows_B, *_top(query_QD[rows_B], gallery, own_B, k, room))

    workers = min(gallery.workers, len(blocks))
    rooms = [gallery.rows_GD.new_empty(size, dtype=torch.float64) for _ in range(workers)]
    return in_workers(treat, blocks, rooms)


def _top(
    query_BD: Tensor, gallery: Gallery, own_B: Tensor | None, k: int, room: Tensor
) -> tuple[Tensor, Tensor]:
    """What `_exact` gives, faster: each screen settles what it can and passes on the rest."""
    values_BK, index_BK = _room_for(query_BD, k)
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


def _moved(rows_ND: Tensor, rounded_ND: Tensor) -> Tensor:
    """How far rounding moved each row, float64 [N]."""
    difference_ND = rows_ND - rounded_ND.float()
    moved_N: Tensor = torch.linalg.vector_norm(difference_ND, dim=1, dtype=torch.float64)
    return moved_N


def _doubt(screen: _Screen, query_BD: Tensor, rounded_BD: Tensor) -> Tensor:
    """The e of `_screened`, float64 [B]; 5% more for the second order, twice for truncated sums."""
    return 1.05 * (screen.off + _moved(query_BD, rounded_BD)) + query_BD.shape[1] * 2.0**-23


@functools.cache
def _bfloat16_pays() -> bool:
    """Whether this processor multiplies bfloat16 faster than float32; changes no result."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        rows_ND = torch.ones(4096, 64, dtype=dtype, device="cpu")
        multiply = functools.partial(torch.mm, rows_ND, rows_ND[:_BLOCK].T)
        seconds[dtype] = min(timeit.repeat(multiply, number=1, repeat=5))
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
    place_P = _from_cut_up(levels, cut_B, _most_candidates(k)).sort().values
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
    query_BD: Tensor, gallery: Gallery, own_B: Tensor | None, k: int, room: Tensor
) -> tuple[Tensor, Tensor]:
    """Top k of one block by (score descending, index ascending), from float64 scores of all.

    float64 and int64 [B, k].
    """
    items = len(gallery.rows_GD)
    values_BK, index_BK = _room_for(query_BD, k)
    # Scores lie in `room`. Beyond, if there are ties in its top k, a query takes per gallery item
    # 8 bytes for a copy and up to 32 to sort it, and per neighbour kept at most 96 of float64 and
    # int64 columns.
    affordable = BLOCK_BYTES // 2 // gallery.workers // (40 * items + 96 * (k + 1))
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


def _room_for(query_BD: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values_BK = torch.empty(len(query_BD), k, dtype=torch.float64, device=query_BD.device)
    return values_BK, torch.empty_like(values_BK, dtype=torch.int64)


def _by_position(scores_BG: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest by (score descending, index ascending)."""
    # topk promises no order among equals. One neighbour more than asked for shows whether the cut
    # after the k-th falls between equals, too.
    values_BK, index_BK = scores_BG.topk(min(k + 1, scores_BG.shape[1]), dim=1)
    rows_T = (values_BK[:, 1:] == values_BK[:, :-1]).any(1).nonzero().squeeze(1)
    values_BK, index_BK = values_BK[:, :k], index_BK[:, :k]
    if len(rows_T):
        # + 0.0 turns -0.0 into 0.0, which some sorts tell apart.
        scores_TG = scores_BG.index_select(0, rows_T).add_(0.0)
        order_TG = scores_TG.argsort(dim=1, descending=True, stable=True)
        index_BK[rows_T] = order_TG[:, :k]
        values_BK[rows_T] = scores_TG.gather(1, order_TG[:, :k])
    return values_BK, index_BK
