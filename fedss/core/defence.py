"""What one client can do to a round at most: how far it may move the weights, what it may count
for, and means that a few clients cannot move.

Shape suffixes: K clients of a cohort, P backbone parameters, S requested classes, T the rows of all
clients one below the other, U classes touched in a round, D embedding size, R rows with as many
holders, H their holders, B a block of columns.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median_high, median_low

import torch
from torch import Tensor

from fedss.choices import Aggregate
from fedss.core.client import ClientUpdate
from fedss.core.engine import Failure
from fedss.core.state import Norms
from fedss.distributed import ALONE, Ranks

Usual = tuple[float, float]
"""The median of some norms, and their spread: half of them are off it by this factor or less."""

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
        norm_bound: an update is refused if it is longer than so many times the usual one, times
            the cube of the usual spread, in backbone or class rows; 0: none is.
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

    What is usual is the median over the last rounds and this one of what was usual in each, which
    less than half of its clients cannot move far. Where clients are alike, so are their norms;
    where few images are still told apart wrongly, norms lie far apart, and the bound is as wide.
    ``known`` are earlier rounds, of accepted updates alone; the third result is ``known`` for the
    next round, the same at all ranks. Norms of 0 do not count: clients may have nothing to say of a
    part.
    """
    if not defence.norm_bound:
        return list(updates), [], tuple(known)
    mine = [_norms(update) for update in updates]
    everyone = [norms for of_rank in ranks.gather(mine) for norms in of_rank]
    rounds = [*known, _usual(everyone, FEWEST)][-ROUNDS:]
    bounds = [defence.norm_bound * _longest([of_one[i] for of_one in rounds]) for i in (0, 1)]
    kept, refused = list[ClientUpdate](), list[Failure]()
    for update, norms in zip(updates, mine, strict=True):
        large = [i for i in (0, 1) if norms[i] > bounds[i]]
        if not large:
            kept.append(update)
            continue
        part, norm, bound = _PARTS[large[0]], norms[large[0]], bounds[large[0]]
        told = f"a change of {part} of norm {norm:.3g}, expected at most {bound:.3g}: norm_bound is"
        refused.append(Failure(update.client, "norm", f"{told} {defence.norm_bound:g}"))
    usual = _usual([n for n in everyone if n[0] <= bounds[0] and n[1] <= bounds[1]], 1)
    if any(median for median, _ in usual):
        known = [*known, usual]
    return kept, refused, tuple(known[-ROUNDS:])


def _norms(update: ClientUpdate) -> tuple[float, float]:
    # In float64 the squares of all finite float32 are finite.
    rows = update.rows_delta_SD.double().norm()
    return float(update.backbone_delta_P.double().norm()), float(rows)


def _usual(norms: Sequence[tuple[float, float]], fewest: int) -> Norms:
    """What is usual among so many clients or more."""

    def of_part(norms: Sequence[float]) -> Usual:
        norms = [norm for norm in norms if norm > 0]
        if len(norms) < fewest:
            return 0.0, 0.0
        median = median_low(norms)
        return median, median_high([max(norm / median, median / norm) for norm in norms])

    return of_part([norm for norm, _ in norms]), of_part([norm for _, norm in norms])


def _longest(rounds: Sequence[Usual]) -> float:
    """The longest norm that is usual; infinite where nobody knows."""
    rounds = [usual for usual in rounds if usual[0] > 0]
    if not rounds:
        return math.inf
    median, spread = (median_high(values) for values in zip(*rounds, strict=True))
    return float(median * spread**3)


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
