"""Are two images of one class, and is an image of any class that is known?

Works on tensors and knows nothing federated. Verification (1:1) accepts a pair of images as one
class if their cosine reaches a threshold: ROC, TAR at a FAR, EER. Open-set identification (1:N)
names the nearest enrolled class, or none if its cosine stays below a threshold: DIR at a FPIR.

Shape suffixes: Q queries, G gallery items, D embedding size, N rows, C cells, T thresholds (C + 1),
E enrolled classes.

Cells and thresholds: cosines are counted in cells of 2^-16, cell c from -1 + c 2^-16 (inclusive) to
-1 + (c + 1) 2^-16, the last one for a cosine of 1. A threshold t = -1 + c 2^-16 accepts cell c and
all above, so at a threshold of this grid every rate is exact, a ratio of two whole numbers; only
that thresholds lie on the grid is a choice. The last threshold, `REJECT_ALL`, 1 + 2^-16, accepts
nothing. Cosines are those of `fedss.evaluation.neighbours`, products of rows rounded to 2^-24 that
float64 gives without error, and counts are whole numbers: the result does not depend on blocks,
threads or the order of rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fedss.evaluation.inputs import labelled_sides, unit_rows
from fedss.evaluation.neighbours import in_workers, workers_on
from fedss.seeds import generator

STEP = 2.0**-16
"""The distance between two thresholds."""
REJECT_ALL = 1 + STEP
"""The last threshold: no cosine reaches it."""

FARS = (0.1, 0.01, 0.001, 0.0001)
ERRORS = 30
"""So many false accepts must lie behind a rate for it to be called supported (rule of 30)."""

_CELLS = 2**17 + 1
_ROWS, _COLUMNS = 512, 2048  # of a tile: scores and cells of one take 12 MB
_PER_DECADE = 48


@dataclass(frozen=True)
class PairCounts:
    """How many pairs have a cosine in each cell, int64 [C] on the CPU.

    Genuine: both of one class; impostor: of two classes.
    """

    genuine_C: Tensor
    impostor_C: Tensor


@dataclass(frozen=True)
class OperatingPoint:
    """What a threshold does: the largest TAR of all thresholds whose FAR is at most `far`.

    `supported`: at this FAR at least `ERRORS` false accepts are allowed.
    """

    far: float
    tar: float
    threshold: float
    supported: bool


@dataclass(frozen=True)
class Verification:
    """1:1. `genuine` and `impostor` are numbers of pairs; see `verification`.

    `smallest_far` is the FAR of `ERRORS` false accepts; `roc` goes from there (or from 1) to 1.
    `identification`, 1:N, is None where it was not measured, or nobody can be found or refused.
    """

    eer: float
    eer_threshold: float
    points: tuple[OperatingPoint, ...]
    roc: tuple[OperatingPoint, ...]
    genuine: int
    impostor: int
    smallest_far: float
    identification: "Identification | None" = None


@dataclass(frozen=True)
class Identification:
    """1:N, open set; see `identification`.

    `dir` is the share of searches for an enrolled class that name it, `dir_low` and `dir_high` the
    lowest and highest of any draw, at the lowest `threshold` at which the FPIR over all draws keeps
    to the limit `fpir`; `supported`: this allows `ERRORS` false positives in a draw, on average. In
    each of the `draws` so many classes are `enrolled`; `mated` and `nonmated` are searches over all
    draws for a class that is enrolled or not.
    """

    fpir: float
    dir: float
    dir_low: float
    dir_high: float
    threshold: float
    supported: bool
    draws: int
    enrolled: int
    mated: int
    nonmated: int


def count_pairs(
    query_QD: Tensor,
    query_labels_Q: Tensor,
    gallery_GD: Tensor | None = None,
    gallery_labels_G: Tensor | None = None,
) -> PairCounts:
    """Genuine and impostor pairs by cosine: each query with each gallery item, or each two queries.

    Arguments and errors as in :func:`fedss.evaluation.retrieval.evaluate_retrieval`.
    """
    sides = labelled_sides(query_QD, query_labels_Q, gallery_GD, gallery_labels_G)
    # In the order of labels the genuine pairs of a block of rows lie in a few columns.
    labels_Q, order_Q = sides.labels_Q.sort(stable=True)
    unit_QD = sides.query_QD[order_Q]
    unit_GD, labels_G = unit_QD, labels_Q
    if not sides.alone:
        labels_G, order_G = sides.labels_G.sort(stable=True)
        unit_GD = sides.gallery_GD[order_G]

    def count(first: int, sum_2C: Tensor) -> None:
        rows = slice(first, first + _ROWS)
        labels_B = labels_Q[rows]
        # In units of a cell, and from 0 on, by one column more: exact, as all intermediates are
        # multiples of 2^-32 below 2^18.
        row_BD = F.pad(unit_QD[rows].double(), (0, 1), value=1.0) / STEP
        for start in range(first if sides.alone else 0, len(labels_G), _COLUMNS):
            columns = slice(start, start + _COLUMNS)
            column_MD = F.pad(unit_GD[columns].double(), (0, 1), value=1.0)
            # Rounding may have made a row a bit longer than 1.
            cell_BM = (row_BD @ column_MD.T).to(torch.int32).clamp_(0, _CELLS - 1)
            labels_M = labels_G[columns]
            if sides.alone and start < first + _ROWS:
                # Each two count once: the other way goes into a cell that is left out.
                again_BM = torch.ones_like(cell_BM, dtype=torch.bool).tril_(first - start)
                cell_BM.masked_fill_(again_BM, _CELLS)
            sum_2C[0] += torch.bincount(cell_BM.view(-1), minlength=_CELLS + 1)
            if labels_M[0] <= labels_B[-1] and labels_B[0] <= labels_M[-1]:
                cell_P = cell_BM[labels_B[:, None] == labels_M]
                sum_2C[1] += torch.bincount(cell_P, minlength=_CELLS + 1)

    sums = [
        torch.zeros(2, _CELLS + 1, dtype=torch.int64, device=unit_QD.device)
        for _ in range(workers_on(unit_QD.device))
    ]
    in_workers(count, range(0, len(labels_Q), _ROWS), sums)
    all_C, genuine_C = torch.stack([sum_2C.cpu() for sum_2C in sums]).sum(0)[:, :_CELLS]
    return PairCounts(genuine_C, all_C - genuine_C)


def verification(pairs: PairCounts, fars: Sequence[float] = FARS) -> Verification:
    """ROC, TAR at given FARs, and EER.

    With thresholds t of the grid, over all pairs alike::

        FAR(t) = impostor pairs with cosine >= t / impostor pairs
        TAR(t) = genuine pairs with cosine >= t / genuine pairs,  FRR(t) = 1 - TAR(t)
        TAR at FAR f = max of TAR(t) over all t with FAR(t) <= f,  threshold: the lowest such t
        EER = FAR = FRR where the line through the points (FAR(t), FRR(t)) crosses FAR = FRR

    The EER's line is straight between neighbouring thresholds, and so is its threshold; a TAR at a
    FAR is never interpolated. These are rates of comparisons, in ISO/IEC 19795-1 the false match
    rate and one minus the false non-match rate.

    Rule of 30 (Doddington et al. 2000, Speech Communication 31): with 30 errors or more a rate is
    within 30 % of the true one with 90 % confidence, *if* trials are independent. Pairs that share
    an image or a class are not, so this is the least that is needed.

    Raises:
        ValueError: no genuine or no impostor pair; a FAR that is not above 0 and at most 1.
    """
    for far in fars:
        if not 0 < far <= 1:
            raise ValueError(f"a FAR must be above 0 and at most 1, but is {far}")
    genuine, impostor = int(pairs.genuine_C.sum()), int(pairs.impostor_C.sum())
    if not genuine or not impostor:
        raise ValueError(
            f"verification needs pairs of one class and pairs of two, got {genuine} and {impostor}"
        )
    far_T, tar_T = _accepted_share(pairs.impostor_C), _accepted_share(pairs.genuine_C)
    frr_T = 1 - tar_T
    gap_T = far_T - frr_T  # falls from 1 to -1
    (after,) = _lowest(gap_T, [0.0])
    along = float(gap_T[after - 1] / (gap_T[after - 1] - gap_T[after]))
    smallest = ERRORS / impostor

    def at(fars: Sequence[float]) -> tuple[OperatingPoint, ...]:
        return tuple(
            OperatingPoint(far, float(tar_T[t]), _threshold(t), far >= smallest)
            for far, t in zip(fars, _lowest(far_T, fars), strict=True)
        )

    first = min(smallest, 1.0)
    steps = int(np.ceil(-np.log10(first) * _PER_DECADE))
    return Verification(
        eer=float(far_T[after - 1] + along * (far_T[after] - far_T[after - 1])),
        eer_threshold=_threshold(after - 1 + along),
        points=at(fars),
        roc=at(np.geomspace(first, 1, steps + 1).tolist()),
        genuine=genuine,
        impostor=impostor,
        smallest_far=smallest,
    )


def identification(
    query_QD: Tensor,
    query_labels_Q: Tensor,
    gallery_GD: Tensor | None = None,
    gallery_labels_G: Tensor | None = None,
    fpir: float = 0.01,
    draws: int = 10,
    seed: int = 0,
) -> Identification | None:
    """Open-set identification: does the nearest enrolled class say right who it is, if anybody?

    In each draw half of the classes are enrolled, a class by the mean of the unit embeddings of
    half of its images (at least one); all its other images are mated searches, all images of
    the other classes nonmated ones. With a gallery, half of its classes are enrolled by all of
    their images there, and all queries are searches. With s the cosine with the nearest enrolled
    mean, over all draws together::

        FPIR(t) = nonmated searches with s >= t / nonmated searches
        DIR(t)  = mated searches with s >= t whose nearest mean is of their class / mated searches
        t       = the lowest threshold of the grid with FPIR(t) <= fpir

    DIR at rank 1: Phillips, Grother, Micheals 2011 (Handbook of Face Recognition, 2nd edition,
    chapter 21). FPIR: ISO/IEC 19795-1 and NIST's FRVT 1:N (NISTIR 8271), where 1 - DIR is the FNIR
    at rank 1. An FPIR is that of so many enrolled classes: it grows with their number.

    Embeddings and labels are as in `count_pairs`, `fpir` is a limit above 0 and at most 1. None if
    there is nobody to find, or nobody to refuse: no mated or no nonmated search.

    Raises:
        ValueError: as in `count_pairs`; fpir or draws out of range.
    """
    if not 0 < fpir <= 1 or draws < 1:
        raise ValueError(f"need a FPIR above 0 and at most 1 and a draw, got {fpir} and {draws}")
    sides = labelled_sides(query_QD, query_labels_Q, gallery_GD, gallery_labels_G)
    alone = sides.alone
    # On the CPU, where a sum has an order.
    unit_QD, unit_GD = sides.query_QD.cpu(), sides.gallery_GD.cpu()
    labels_Q, labels_G = sides.labels_Q.cpu().numpy(), sides.labels_G.cpu().numpy()
    right_DC = torch.zeros(draws, _CELLS, dtype=torch.int64)
    false_C = torch.zeros(_CELLS, dtype=torch.int64)
    mated = np.zeros(draws, np.int64)
    for draw in range(draws):
        rng = generator(seed, "open set", draw)
        enrolled_E, rows_R = _enrol(labels_G, alone, rng)
        if not len(enrolled_E):
            continue
        searched_N = np.ones(len(labels_Q), bool)
        if alone:
            searched_N[rows_R] = False
        number_R = torch.from_numpy(np.searchsorted(enrolled_E, labels_G[rows_R]))
        sum_ED = torch.zeros(len(enrolled_E), unit_GD.shape[1], dtype=torch.float64)
        sum_ED.index_add_(0, number_R, unit_GD[torch.from_numpy(rows_R)].double())
        probe_N = torch.from_numpy(np.flatnonzero(searched_N))
        if not len(probe_N):
            continue
        centre_ED = unit_rows(sum_ED, "enrolled").to(query_QD.device).double()
        score_N, nearest_N = _best(unit_QD[probe_N].to(query_QD.device), centre_ED)
        # A cosine a rounding below a threshold may reach it where another program computes it.
        cell_N = ((score_N + 1) / STEP + 1 / 16).to(torch.int64).clamp_(0, _CELLS - 1)
        wanted_N = labels_Q[searched_N]
        known_N = np.isin(wanted_N, enrolled_E)
        right_N = enrolled_E[nearest_N.numpy()] == wanted_N
        right_DC[draw] = torch.bincount(cell_N[torch.from_numpy(right_N)], minlength=_CELLS)
        false_C += torch.bincount(cell_N[torch.from_numpy(~known_N)], minlength=_CELLS)
        mated[draw] = known_N.sum()
    nonmated = int(false_C.sum())
    if not mated.any() or not nonmated:
        return None
    (t,) = _lowest(_accepted_share(false_C), [fpir])
    right_D = right_DC[:, t:].sum(1).numpy()
    share_D = (right_D / np.maximum(mated, 1))[mated > 0]
    return Identification(
        fpir=fpir,
        dir=float(right_D.sum() / mated.sum()),
        dir_low=float(share_D.min()),
        dir_high=float(share_D.max()),
        threshold=_threshold(t),
        supported=fpir * nonmated / draws >= ERRORS,
        draws=draws,
        enrolled=len(enrolled_E),
        mated=int(mated.sum()),
        nonmated=nonmated,
    )


def _enrol(
    labels_G: np.ndarray, alone: bool, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Sorted labels to enrol, and the rows that stand for them."""
    values_E, counts_E = np.unique(labels_G, return_counts=True)
    # A class of one image has none left to search with.
    fit_E = values_E[counts_E > 1] if alone else values_E
    number = min(max(1, len(values_E) // 2), len(fit_E))
    enrolled_E = np.sort(rng.choice(fit_E, number, replace=False))
    order_G = rng.permutation(len(labels_G))
    rows_G = order_G[np.isin(labels_G[order_G], enrolled_E)]
    if not alone:
        return enrolled_E, rows_G
    # Of each class the first half in the order drawn.
    rows_G = rows_G[labels_G[rows_G].argsort(kind="stable")]
    _, first_E, size_E = np.unique(labels_G[rows_G], return_index=True, return_counts=True)
    place_G = np.arange(len(rows_G)) - np.repeat(first_E, size_E)
    return enrolled_E, rows_G[place_G < np.repeat(size_E // 2, size_E)]


def _best(unit_ND: Tensor, centre_ED: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and position of each row's nearest centre, the first of equals; on the CPU.

    For one neighbour among few centres the screens of `nearest` cost more than they save.
    """
    step = max(1, _ROWS * _COLUMNS // len(centre_ED))

    def search(first: int, room: Tensor) -> tuple[Tensor, Tensor]:
        row_BD = unit_ND[first : first + step].double()
        best = torch.mm(row_BD, centre_ED.T, out=room[: len(row_BD)]).max(1)
        return best.values.cpu(), best.indices.cpu()

    rooms = [centre_ED.new_empty(step, len(centre_ED)) for _ in range(workers_on(unit_ND.device))]
    blocks = in_workers(search, range(0, len(unit_ND), step), rooms)
    score_N, nearest_N = (torch.cat(part) for part in zip(*blocks, strict=True))
    return score_N, nearest_N


def _accepted_share(counts_C: Tensor) -> Tensor:
    """The share of what was counted that each threshold accepts, float64 [T]."""
    accepted_T = F.pad(counts_C.flip(0).cumsum(0).flip(0), (0, 1))
    return accepted_T.double() / accepted_T[0]


def _lowest(rate_T: Tensor, limits: Sequence[float]) -> list[int]:
    """For each limit the lowest threshold at which a rate, which falls, keeps to it."""
    limits_L = torch.tensor(limits, dtype=rate_T.dtype)
    keeping_L = torch.searchsorted(rate_T.flip(0), limits_L, right=True)
    return [int(t) for t in len(rate_T) - keeping_L]


def _threshold(t: float) -> float:
    return t * STEP - 1
