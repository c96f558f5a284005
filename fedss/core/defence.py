"""What one client can do to a round at most: how far it may move the weights, what it may count
for, and means that a few clients cannot move.

Shape suffixes: K clients of a cohort, P backbone parameters, S requested classes, T the rows of all
clients one below the other, U classes touched in a round, D embedding size, R rows with as many
holders, H their holders, B a block of columns.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median_low

import torch
from torch import Tensor

from fedss.choices import Aggregate
from fedss.core.client import ClientUpdate
from fedss.core.engine import Failure
from fedss.distributed import ALONE, Ranks

Norms = tuple[float, float]
"""Norms of an update: the backbone's change, and that of all its class rows together."""

ROUNDS = 10
"""Rounds whose norms are remembered: norms fall with the learning rate."""

FEWEST = 3
"""Clients of a round that say together what is usual; of two, nobody knows which one to believe."""

TRIM = 0.2
"""Share of the values that a trimmed mean leaves out at each end."""

_PARTS = ("the backbone", "class rows")


@dataclass(frozen=True)
class Defence:
    """What a server does about clients that misbehave.

    Attributes:
        norm_bound: an update is refused if it is longer than so many times the usual one, in
            backbone or class rows; 0: none is.
        weight_cap: no client weighs more than so many times the median one of its round; 0: any.
        aggregate: ``mean`` weighs clients by their images; ``trimmed`` and ``median`` are those of
            each coordinate, of clients that weigh the same.
    """

    norm_bound: float = 0.0
    weight_cap: float = 0.0
    aggregate: Aggregate = "mean"


def refuse_large(
    updates: Sequence[ClientUpdate],
    known: Sequence[Norms],
    defence: Defence,
    ranks: Ranks = ALONE,
) -> tuple[list[ClientUpdate], list[Failure], tuple[Norms, ...]]:
    """Line 4, at the server: the updates of a usual length, and failures for the others.

    What is usual is the median of the norms of the last rounds and of this one. Each is the median
    of a round, which less than half of its clients cannot move far. ``known`` are those of earlier
    rounds, of accepted updates alone; the third result is ``known`` for the next round, the same at
    all ranks. Norms of 0 do not count: clients may have nothing to say of a part.
    """
    if not defence.norm_bound:
        return list(updates), [], tuple(known)
    mine = [_norms(update) for update in updates]
    everyone = [norms for of_rank in ranks.gather(mine) for norms in of_rank]
    bounds = _bounds(everyone, known, defence.norm_bound)
    kept, refused = list[ClientUpdate](), list[Failure]()
    for update, norms in zip(updates, mine, strict=True):
        large = [i for i in range(len(_PARTS)) if norms[i] > bounds[i]]
        if not large:
            kept.append(update)
            continue
        told = f"a change of {_PARTS[large[0]]} of norm {norms[large[0]]:.3g}, expected at most "
        told += f"{bounds[large[0]]:.3g}: norm_bound is {defence.norm_bound:g}"
        refused.append(Failure(update.client, "norm", told))
    accepted = [norms for norms in everyone if all(map(float.__le__, norms, bounds))]
    usual = _medians(accepted, 1)
    if usual != (0.0, 0.0):
        known = [*known, usual]
    return kept, refused, tuple(known[-ROUNDS:])


def _norms(update: ClientUpdate) -> Norms:
    # In float64 the squares of all finite float32 are finite.
    rows = update.rows_delta_SD.double().norm()
    return float(update.backbone_delta_P.double().norm()), float(rows)


def _bounds(norms: Sequence[Norms], known: Sequence[Norms], factor: float) -> Norms:
    """The largest norms that are accepted; infinite where nothing says what is usual."""
    usual = [*known, _medians(norms, FEWEST)][-ROUNDS:]
    backbone, rows = ([norms[i] for norms in usual if norms[i] > 0] for i in range(len(_PARTS)))
    return (
        factor * median_low(backbone) if backbone else torch.inf,
        factor * median_low(rows) if rows else torch.inf,
    )


def _medians(norms: Sequence[Norms], fewest: int) -> Norms:
    """Medians of the norms above 0; 0 where there are fewer than ``fewest``."""
    backbone, rows = ([of_one[i] for of_one in norms if of_one[i] > 0] for i in range(len(_PARTS)))
    return (
        median_low(backbone) if len(backbone) >= fewest else 0.0,
        median_low(rows) if len(rows) >= fewest else 0.0,
    )


def cap_weights(
    updates: Sequence[ClientUpdate], cap: float, ranks: Ranks = ALONE
) -> list[ClientUpdate]:
    """Updates that stand for at most ``cap`` times as many examples as the round's median one."""
    counts = [n for of_rank in ranks.gather([u.num_examples for u in updates]) for n in of_rank]
    if not cap or not counts:
        return list(updates)
    most = max(1, int(cap * median_low(counts)))
    return [replace(u, num_examples=most) if u.num_examples > most else u for u in updates]


def middle(values_KB: Tensor, aggregate: Aggregate) -> Tensor:
    """The mean of the middle values of each column, float64 [B].

    Of K values a ``trimmed`` mean leaves out ``int(TRIM K)`` at each end, a ``median`` all but the
    one or two in the middle.
    """
    count = values_KB.shape[0]
    out = {"mean": 0, "trimmed": int(TRIM * count), "median": (count - 1) // 2}[aggregate]
    return values_KB.double().sort(dim=0).values[out : count - out].mean(dim=0)


def middle_backbone(updates: Sequence[ClientUpdate], aggregate: Aggregate) -> Tensor:
    """:func:`middle` of the clients' changes of the backbone, float64 [P]. O(P K log K)."""
    # A block at a time: beside the updates themselves hardly any memory is needed.
    parts = zip(*(torch.split(u.backbone_delta_P, _BLOCK) for u in updates), strict=True)
    return torch.cat([middle(torch.stack(part_K), aggregate) for part_K in parts])


def middle_rows(
    updates: Sequence[ClientUpdate], ids_U: Tensor, aggregate: Aggregate
) -> tuple[Tensor, Tensor]:
    """:func:`middle` of each row's changes among its holders, [U, D], and their numbers, [U]."""
    rows_TD = torch.cat([update.rows_delta_SD for update in updates])
    place_T = torch.searchsorted(ids_U, torch.cat([update.ids_S for update in updates]))
    holders_U = torch.bincount(place_T, minlength=len(ids_U))
    order_T, first_U = torch.argsort(place_T, stable=True), holders_U.cumsum(0) - holders_U
    middle_UD = torch.zeros(len(ids_U), rows_TD.shape[1], dtype=torch.float64)
    for holders, some_R in _by_holders(holders_U):
        of_row_HR = first_U[some_R] + torch.arange(holders)[:, None]
        middle_UD[some_R] = middle(rows_TD[order_T[of_row_HR]], aggregate)
    return middle_UD, holders_U


def _by_holders(holders_U: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Places of rows with as many holders, in blocks."""
    for holders in torch.unique(holders_U).tolist():
        for some_R in torch.split((holders_U == holders).nonzero()[:, 0], max(1, _ROWS // holders)):
            yield holders, some_R


_BLOCK, _ROWS = 65536, 4096
