"""Server optimizers on (backbone, touched class rows). A round's mean update is their gradient.

What happens to an untouched row:

- ``sgd``: nothing.
- ``momentum``: a dense optimizer would let it coast on its momentum. The steps it misses are
  geometric, so they are taken at once, in closed form, when the row is next read or touched: the
  result is the dense optimizer's (to rounding), at O(touched rows) per round.
- ``adam``: nothing, as in ``torch.optim.SparseAdam``: neither the row nor its moments move.

A method may also take a step on all rows at once (:class:`fedss.moments.RowMap`); untouched rows
catch up with it in the same way, when they are next read.

Class rows are put back on the unit sphere in the rounds that touch them (``normalize_rows``).
Logits use cosines, so this changes no prediction; but rows grow as they train, and a longer row
turns less per step. For momentum the law is then: equal to the dense optimizer that normalises the
touched rows, and no others, after its step.

Shape suffixes: P backbone parameters, U touched classes, S requested classes, D embedding size.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fedss.class_rows import ClassRows, grow, id_blocks, read, write_
from fedss.moments import (
    RowHistory,
    RowMap,
    catch_up,
    check_spread,
    forget_,
    record_step_,
    second_moment,
)

ServerOptimizerKind = Literal["sgd", "momentum", "adam"]


@dataclass(frozen=True)
class ServerOptimizer:
    """A server optimizer (Reddi et al. 2021, arXiv 2003.00295, algorithm 2), minus its state.

    With the mean update ``g`` of a round (a direction of descent, so it is added):

    - ``sgd`` (FedAvg): ``w += lr g``
    - ``momentum`` (FedAvgM): ``v = momentum v + g``, ``w += lr v``
    - ``adam`` (FedAdam): ``m = b1 m + (1 - b1) g``, ``v = b2 v + (1 - b2) g^2``,
      ``w += lr m' / (sqrt(v') + epsilon)``; ``m'``, ``v'`` are bias-corrected as in
      ``torch.optim.Adam`` (Reddi et al. leave that out), b1 is ``momentum``.

    ``normalize_rows``: touched class rows get length 1 after their step.
    """

    kind: ServerOptimizerKind = "momentum"
    lr: float = 1.0
    momentum: float = 0.9
    second_momentum: float = 0.99
    epsilon: float = 1e-3
    normalize_rows: bool = True

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the values kept for each parameter."""
        return {"sgd": (), "momentum": ("momentum",), "adam": ("momentum", "square")}[self.kind]


def step(
    optimizer: ServerOptimizer,
    weight: Tensor,
    slots: Mapping[str, Tensor],
    update: Tensor,
    round: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """One dense step: the new weight and slots; the arguments are left as they are.

    Args:
        optimizer: what to do.
        weight: parameters of any shape.
        slots: the optimizer's values, each of the same shape.
        update: the round's mean update, same shape.
        round: number of rounds complete before this one.
    """
    if optimizer.kind == "sgd":
        return weight + optimizer.lr * update, {}
    if optimizer.kind == "momentum":
        velocity = optimizer.momentum * slots["momentum"] + update
        return weight + optimizer.lr * velocity, {"momentum": velocity}
    beta1, beta2, t = optimizer.momentum, optimizer.second_momentum, round + 1
    mean = beta1 * slots["momentum"] + (1 - beta1) * update
    square = beta2 * slots["square"] + (1 - beta2) * update.square()
    denominator = (square / (1 - beta2**t)).sqrt() + optimizer.epsilon
    weight = weight + optimizer.lr / (1 - beta1**t) * mean / denominator
    return weight, {"momentum": mean, "square": square}


def read_rows(
    optimizer: ServerOptimizer, rows: ClassRows, ids_S: Tensor, round: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Rows and slots as they stand after ``round`` rounds; nothing is written. O(S D).

    A row last written after round u has missed ``k = round - u`` steps of momentum:
    ``w + lr (b + b^2 + ... + b^k) v = w + lr b (1 - b^k) / (1 - b) v``, and ``v b^k``. (Ours.)
    With a history of steps on all rows it is O(S D^2 log round), by :func:`transition`.

    Returns:
        rows_SD and one [S, D] tensor per slot.
    """
    if rows.history is not None:
        return _split(optimizer, _whole_state(optimizer, rows, ids_S, round))
    rows_SD, slots, updated_S = read(rows, ids_S)
    beta = optimizer.momentum
    if optimizer.kind == "momentum" and beta > 0:
        missed_S1 = (round - updated_S)[:, None].double()
        decay_S1 = torch.exp(missed_S1 * math.log(beta))
        coast_S1 = optimizer.lr * beta * (1 - decay_S1) / (1 - beta)
        velocity_SD = slots["momentum"]
        rows_SD = rows_SD + (coast_S1 * velocity_SD).to(rows_SD.dtype)
        slots["momentum"] = (decay_S1 * velocity_SD).to(velocity_SD.dtype)
    return rows_SD, slots


def step_rows_(
    optimizer: ServerOptimizer,
    rows: ClassRows,
    ids_U: Tensor,
    update_UD: Tensor,
    round: int,
    row_map: RowMap | None = None,
) -> None:
    """One step of the touched rows, in place; no other row is read or written. O(U D).

    Args:
        optimizer: what to do.
        rows: W and its slots.
        ids_U: int64, sorted, unique touched classes.
        update_UD: their mean updates.
        round: number of rounds complete before this one.
        row_map: a mean update of every row, touched ones too, beside their own. Others take it
            when they are next read.
    """
    history = rows.history
    assert (row_map is None) == (history is None), "a step of all rows needs their history"
    if row_map is not None and history is not None:
        before_UZ = _whole_state(optimizer, rows, ids_U, round)
        rows_UD, slots = _split(optimizer, before_UZ)
        update_UD = update_UD + row_map.shift_D + rows_UD @ row_map.matrix_DD
    else:
        rows_UD, slots = read_rows(optimizer, rows, ids_U, round)
    rows_UD, slots = step(optimizer, rows_UD, slots, update_UD, round)
    rows_UD = F.normalize(rows_UD, dim=1) if optimizer.normalize_rows else rows_UD
    write_(rows, ids_U, rows_UD, slots, round + 1)
    if row_map is not None and history is not None:
        after_UZ = _whole_state(optimizer, rows, ids_U, round + 1)
        record_step_(history, partial(transition, optimizer), row_map, round, before_UZ, after_UZ)
        if rows.num_classes <= len(history.second_ZZ):
            # Counted anew at no more than the cost of a step: where few rows learn fast, those that
            # nobody held for a while grow, and their share in the sums would leave its rounding.
            all_N = torch.arange(rows.num_classes)
            states_NZ = _whole_state(optimizer, rows, all_N, round + 1)
            history.second_ZZ.copy_(second_moment(states_NZ))
        else:
            check_spread(history, round)
        if round % _FORGET_EVERY == 0:
            forget_(history, int(rows.updated_N.min()))


_FORGET_EVERY = 16


def transition(optimizer: ServerOptimizer, map_DE: Tensor) -> Tensor:
    """What a round without an update of its own does to a row's state ``z = (w, v, 1)``.

    With the map ``g = B w + c`` as its update, momentum makes ``v' = beta v + B w + c`` and
    ``w' = w + lr v'``; ``sgd`` is the same without v. (``adam`` is not linear.)

    Args:
        optimizer: sgd or momentum.
        map_DE: [D, D + 1], B and c.

    Returns:
        T float64 [Z, Z], ``z' = T z``; Z is 2 D + 1 for momentum, D + 1 for sgd.
    """
    map_DE = map_DE.double()
    dim, lr, beta = len(map_DE), optimizer.lr, optimizer.momentum
    identity, row_1Z = torch.eye(dim, dtype=torch.float64), [0.0] * (dim * len(optimizer.slots))
    last = torch.tensor([[0.0] * dim + row_1Z + [1.0]], dtype=torch.float64)
    if optimizer.kind == "sgd":
        top = torch.cat([identity + lr * map_DE[:, :dim], lr * map_DE[:, dim:]], dim=1)
        return torch.cat([top, last])
    velocity = torch.cat([map_DE[:, :dim], beta * identity, map_DE[:, dim:]], dim=1)
    weight = torch.cat([identity, torch.zeros(dim, dim + 1)], dim=1) + lr * velocity
    return torch.cat([weight, velocity, last])


def join_states(rows_SD: Tensor, slots: Mapping[str, Tensor]) -> Tensor:
    """``z = (w, slots, 1)`` of each row, float64 [S, Z]."""
    one_S1 = torch.ones(len(rows_SD), 1)
    return torch.cat([rows_SD, *slots.values(), one_S1], dim=1).double()


def with_history(rows: ClassRows) -> ClassRows:
    """Rows that were never written, ready for steps of all of them. O(n D^2), once."""
    total_ZZ: Tensor | None = None
    for ids_S in id_blocks(rows.num_classes):
        rows_SD, slots, _ = read(rows, ids_S)
        part_ZZ = second_moment(join_states(rows_SD, slots))
        total_ZZ = part_ZZ if total_ZZ is None else total_ZZ + part_ZZ
    assert total_ZZ is not None
    return replace(rows, history=RowHistory(total_ZZ))


def add_classes(rows: ClassRows, num_classes: int, round: int) -> ClassRows:
    """The same table with classes added behind those that are there.

    Where a method steps all rows, new ones take the steps from here on.

    Args:
        rows: W and its slots; not to be used again.
        num_classes: n, with the new ones.
        round: number of rounds complete, 1 or more.
    """
    first, rows = rows.num_classes, grow(rows, num_classes)
    history = rows.history
    if history is not None:
        ids_S = torch.arange(first, num_classes)
        rows_SD, slots, _ = read(rows, ids_S)
        write_(rows, ids_S, rows_SD, slots, round)
        rows_SD, slots, _ = read(rows, ids_S)
        history.second_ZZ.add_(second_moment(join_states(rows_SD, slots)))
    return rows


def _split(optimizer: ServerOptimizer, z_SZ: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    rows_SD, *slots = z_SZ[:, :-1].float().chunk(1 + len(optimizer.slots), dim=1)
    return rows_SD.contiguous(), dict(zip(optimizer.slots, slots, strict=True))


def _whole_state(optimizer: ServerOptimizer, rows: ClassRows, ids_S: Tensor, round: int) -> Tensor:
    assert rows.history is not None
    rows_SD, slots, since_S = read(rows, ids_S)
    z_SZ = join_states(rows_SD, slots)
    return catch_up(rows.history, partial(transition, optimizer), z_SZ, since_S, round)
