"""Moments: the softmax without negatives, at the client and at the server.

The server sends every client the mean and covariance of all class rows. The client takes the rows
that it holds out of them, trains on :func:`fedss.softmax.moments_softmax`, and returns with its
deltas the step that its loss wants of every absent row. By the chain rule this is one affine map,
the same for all of them: with ``mu = 1/c sum_j w_j`` and
``Sigma = 1/c sum_j (w_j - mu)(w_j - mu)'`` over the c absent rows,

    dL/dw_j = 1/c (g + 2 G (w_j - mu)),    g = dL/dmu,  G = dL/dSigma (symmetric).

(The part of dSigma that comes through mu is ``sum_j (w_j - mu) = 0``.) So a client of any number of
classes moves all n rows for D + D(D+1)/2 numbers, and the server keeps the maps until a row is next
read: neither time nor bytes of a round grow with n. (Ours; ``docs/methods.md`` has what came
before.)

Shape suffixes: N all classes, S held classes, U touched classes, D embedding size, Z numbers of a
row's whole state: the row, what a linear server optimizer keeps for it, and a 1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedss.errors import DivergedError
from fedss.ranks import ALONE, Ranks
from fedss.softmax import AbsentClasses


@dataclass(frozen=True)
class Moments:
    """Mean float32 [D] and covariance float32 [D, D] of all n class rows."""

    mean_D: Tensor
    covariance_DD: Tensor


@dataclass(frozen=True)
class RowMap:
    """One step of every class row, ``w += shift + matrix w``; the matrix is symmetric."""

    shift_D: Tensor
    matrix_DD: Tensor


def absent_classes(moments: Moments, num_classes: int, rows_SD: Tensor) -> AbsentClasses | None:
    """The moments of the classes that a client does not hold; None if it holds all.

    ``mu' = (n mu - sum_S w) / (n - |S|)`` and likewise for second moments: exact. Cost O(S D^2).

    Args:
        moments: of all class rows.
        num_classes: n.
        rows_SD: the rows held, as received.

    Returns:
        Leaves of autograd: their ``grad`` sums up over local steps.
    """
    count = num_classes - len(rows_SD)
    if count == 0:
        return None
    mean_D, rows_SD = moments.mean_D.double(), rows_SD.double()
    second_DD = moments.covariance_DD.double() + torch.outer(mean_D, mean_D)
    mean_D = (num_classes * mean_D - rows_SD.sum(dim=0)) / count
    second_DD = (num_classes * second_DD - rows_SD.T @ rows_SD) / count
    covariance_DD = second_DD - torch.outer(mean_D, mean_D)
    return AbsentClasses(
        count, mean_D.float().requires_grad_(), covariance_DD.float().requires_grad_()
    )


def absent_step(absent: AbsentClasses | None, dim: int, row_lr: float) -> RowMap:
    """The SGD step of absent rows for the gradients that local training left in ``absent``.

    ``-row_lr dL/dw_j = shift + matrix w_j`` with ``matrix = -2 row_lr / c G`` and
    ``shift = -row_lr / c g - matrix mu``. Local training counts as if absent rows had stayed where
    they were (linearised). Zero where no class is absent.
    """
    if absent is None or absent.mean_D.grad is None or absent.covariance_DD.grad is None:
        return RowMap(torch.zeros(dim), torch.zeros(dim, dim))
    gradient_DD = absent.covariance_DD.grad
    matrix_DD = -row_lr / absent.count * (gradient_DD + gradient_DD.T)
    shift_D = -row_lr / absent.count * absent.mean_D.grad
    return RowMap(shift_D - matrix_DD @ absent.mean_D.detach(), matrix_DD)


def mean_map(weighted: Sequence[tuple[RowMap, float]], ranks: Ranks = ALONE) -> RowMap:
    """``sum_k p_k map_k``, summed in float64, here and then over the ranks."""
    shift_D = torch.stack([p * row_map.shift_D.double() for row_map, p in weighted]).sum(dim=0)
    matrix_DD = torch.stack([p * row_map.matrix_DD.double() for row_map, p in weighted]).sum(dim=0)
    return RowMap(ranks.add_up(shift_D).float(), ranks.add_up(matrix_DD).float())


MOST_SPREAD = 1e6
"""Rows start and are kept near length 1. At this mean square sums in float64 are off by 1e-10."""


@dataclass(frozen=True)
class RowHistory:
    """The steps that rounds took on every row, until each row has taken them. Written in place.

    With a linear server optimizer, a round without an update of its own takes the state
    ``z = (w, slots, 1)`` of every row to ``T z``, one matrix T [Z, Z] for all rows. Products of T
    over dyadic ranges of rounds are kept, so a row that was last written R rounds ago catches up
    in O(log R) products.

    Attributes:
        second_ZZ: float64, ``sum_j z_j z_j'`` over all n rows as they would stand now.
        maps: by round, what its T is made of: float32 [D, D + 1], matrix and shift.
        products: by (level, index), T over the rounds from ``index 2^level`` on, ``2^level`` many.
    """

    second_ZZ: Tensor
    maps: dict[int, Tensor] = field(default_factory=dict)
    products: dict[tuple[int, int], Tensor] = field(default_factory=dict)


Transition = Callable[[Tensor], Tensor]
"""From a round's map [D, D + 1] to its T [Z, Z], float64."""


def second_moment(z_SZ: Tensor) -> Tensor:
    """``sum_j z_j z_j'``, float64 [Z, Z]."""
    z_SZ = z_SZ.double()
    return z_SZ.T @ z_SZ


def moments_now(history: RowHistory, num_classes: int, dim: int) -> Moments:
    """Mean and covariance of all rows. O(D^2), whatever n is."""
    mean_D = history.second_ZZ[:dim, -1] / num_classes
    second_DD = history.second_ZZ[:dim, :dim] / num_classes
    return Moments(mean_D.float(), (second_DD - torch.outer(mean_D, mean_D)).float())


def catch_up(
    history: RowHistory, transition: Transition, z_SZ: Tensor, since_S: Tensor, round: int
) -> Tensor:
    """States of rows as they stand after ``round`` rounds, last written after ``since_S``."""
    z_SZ, at_S = z_SZ.clone(), since_S.clone()
    while len(at_S) and (start := int(at_S.min())) < round:
        level = 0
        while start % (2 << level) == 0 and start + (2 << level) <= round:
            level += 1
        here_S = at_S == start
        z_SZ[here_S] = z_SZ[here_S] @ _product(history, transition, level, start >> level).T
        at_S[here_S] = start + (1 << level)
    return z_SZ


def _product(history: RowHistory, transition: Transition, level: int, index: int) -> Tensor:
    if level == 0:
        return transition(history.maps[index])
    if (level, index) not in history.products:
        later = _product(history, transition, level - 1, 2 * index + 1)
        history.products[level, index] = later @ _product(history, transition, level - 1, 2 * index)
    return history.products[level, index]


def record_step_(
    history: RowHistory,
    transition: Transition,
    row_map: RowMap,
    round: int,
    before_UZ: Tensor,
    after_UZ: Tensor,
) -> None:
    """Take note of a round: its map goes to all rows, but touched ones are ``after_UZ`` now.

    ``second = T second T' - sum_U (T z)(T z)' + sum_U z' z'``. O(Z^3 + U Z^2).

    Args:
        history: written in place.
        transition: what a map does to a row's state.
        row_map: the round's mean step of every row.
        round: number of rounds complete before this one.
        before_UZ: float64, states of the touched rows before this round.
        after_UZ: float64, the same after it.
    """
    map_ = torch.cat([row_map.matrix_DD, row_map.shift_D[:, None]], dim=1)
    T = transition(map_)
    history.second_ZZ.copy_(T @ history.second_ZZ @ T.T)
    history.second_ZZ.sub_(second_moment(before_UZ @ T.T)).add_(second_moment(after_UZ))
    history.maps[round] = map_


def check_spread(history: RowHistory, round: int) -> None:
    """Whether the sums still tell: what rounding leaves of rows that are taken out of them must be
    small beside unit vectors.

    Raises:
        DivergedError: the mean square of a row's state is above ``MOST_SPREAD``.
    """
    squares_Z = history.second_ZZ.diagonal()
    if not float(squares_Z[:-1].sum()) <= MOST_SPREAD * float(squares_Z[-1]):
        raise DivergedError(
            f"round {round + 1}: class rows that no client held have grown to a length of over "
            f"{MOST_SPREAD**0.5:,.0f}, and their moments would no longer be exact. The last "
            "checkpoint is kept; start in another folder with a lower class_row_lr or server_lr"
        )


def forget_(history: RowHistory, oldest: int) -> None:
    """Drop what no row needs any more: all rows were written after round ``oldest`` or later."""
    for round in [r for r in history.maps if r < oldest]:
        del history.maps[round]
    for level, index in [k for k in history.products if (k[1] << k[0]) < oldest]:
        del history.products[level, index]
