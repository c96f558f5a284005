"""Server optimizers on (backbone, touched class rows). A round's mean update is their gradient.

What happens to an untouched row:

- ``sgd``: nothing.
- ``momentum``: a dense optimizer would let it coast on its momentum. The steps it misses are
  geometric, so they are taken at once, in closed form, when the row is next read or touched: the
  result is the dense optimizer's (to rounding), at O(touched rows) per round.
- ``adam``: nothing, as in ``torch.optim.SparseAdam``: neither the row nor its moments move.

Class rows are put back on the unit sphere in the rounds that touch them (``normalize_rows``).
Logits use cosines, so this changes no prediction; but rows grow as they train, and a longer row
turns less per step. For momentum the law is then: equal to the dense optimizer that normalizes the
touched rows, and no others, after its step.

Shape suffixes: P backbone parameters, U touched classes, S requested classes, D embedding size.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from fedss.choices import ServerOptimizerKind
from fedss.core.class_rows import ClassRows, read, write_


@dataclass(frozen=True)
class ServerOptimizer:
    """A server optimizer (Reddi et al. 2021, arXiv 2003.00295, algorithm 2), minus its state.

    With the mean update ``g`` of a round (a direction of descent, so it is added):

    - ``sgd`` (FedAvg): ``w += lr g``
    - ``momentum`` (FedAvgM): ``v = momentum v + g``, ``w += lr v``
    - ``adam`` (FedAdam): ``m = b1 m + (1 - b1) g``, ``v = b2 v + (1 - b2) g^2``,
      ``w += lr m' / (sqrt(v') + epsilon)``; ``m'``, ``v'`` are bias-corrected as in
      ``torch.optim.Adam`` (Reddi et al. leave that out), b1 is ``momentum``.

    ``normalize_rows``: touched class rows get length 1 after their step. ``row_kind`` and
    ``row_lr``: how class rows are stepped, if not as the backbone is.
    """

    kind: ServerOptimizerKind = "momentum"
    lr: float = 1.0
    momentum: float = 0.9
    second_momentum: float = 0.99
    epsilon: float = 1e-3
    normalize_rows: bool = True
    row_kind: ServerOptimizerKind | None = None
    row_lr: float | None = None

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the values kept for each parameter of the backbone."""
        return {"sgd": (), "momentum": ("momentum",), "adam": ("momentum", "square")}[self.kind]

    @property
    def of_rows(self) -> "ServerOptimizer":
        """What steps the class rows; its ``slots`` are kept for each of them."""
        lr = self.lr if self.row_lr is None else self.row_lr
        return replace(self, kind=self.row_kind or self.kind, lr=lr)


def step(
    optimizer: ServerOptimizer,
    weight: Tensor,
    slots: Mapping[str, Tensor],
    update: Tensor,
    round: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """One dense step: the new weight and slots; the arguments are left as they are.

    Slots and the round's mean update have the shape of ``weight``; ``round`` rounds are complete
    before this one.
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


def current_rows(
    optimizer: ServerOptimizer, rows: ClassRows, ids_S: Tensor, round: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Rows and slots as they stand after ``round`` rounds; nothing is written. O(S D).

    A row last written after round u has missed ``k = round - u`` steps of momentum:
    ``w + lr (b + b^2 + ... + b^k) v = w + lr b (1 - b^k) / (1 - b) v``, and ``v b^k``. (Ours.)
    """
    rows_SD, slots, updated_S = read(rows, ids_S)
    optimizer, beta = optimizer.of_rows, optimizer.momentum
    if optimizer.kind == "momentum" and beta > 0:
        missed_S1 = (round - updated_S)[:, None].double()
        decay_S1 = torch.exp(missed_S1 * math.log(beta))
        coast_S1 = optimizer.lr * beta * (1 - decay_S1) / (1 - beta)
        velocity_SD = slots["momentum"]
        rows_SD = rows_SD + (coast_S1 * velocity_SD).to(rows_SD.dtype)
        slots["momentum"] = (decay_S1 * velocity_SD).to(velocity_SD.dtype)
    return rows_SD, slots


def step_rows_(
    optimizer: ServerOptimizer, rows: ClassRows, ids_U: Tensor, update_UD: Tensor, round: int
) -> None:
    """One step of the touched rows, in place; no other row is read or written. O(U D).

    ``ids_U`` are int64, sorted and unique; ``round`` rounds are complete before this one.
    """
    rows_UD, slots = current_rows(optimizer, rows, ids_U, round)
    rows_UD, slots = step(optimizer.of_rows, rows_UD, slots, update_UD, round)
    rows_UD = F.normalize(rows_UD, dim=1) if optimizer.normalize_rows else rows_UD
    write_(rows, ids_U, rows_UD, slots, round + 1)
