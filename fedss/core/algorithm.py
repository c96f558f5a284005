"""Algorithm 1 of FedSS (Waghmare et al. 2022, arXiv 2203.04888) on one page.

What the client does of it is in :mod:`fedss.core.client`.

Shape suffixes: K clients of a cohort, D embedding size, P backbone parameters, S requested classes,
U classes touched in a round.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fedss.core.class_rows import ClassRows, add_rows_, read, union, write_
from fedss.core.client import Broadcast, ClientUpdate, RoundPlan, draw_classes, num_negatives
from fedss.core.optimizers import ServerOptimizer, read_rows, step, step_rows_
from fedss.distributed import ALONE, Ranks
from fedss.errors import DivergedError, QuorumError
from fedss.losses.methods import RowMean
from fedss.losses.moments import moments_of
from fedss.losses.softmax import ClassSample, spread_out
from fedss.sampling.samplers import (
    ServerRows,
    check_negatives,
    class_sample,
)
from fedss.seeds import generator


@dataclass(frozen=True)
class ServerState:
    """All that the server keeps between rounds.

    ``class_rows`` is written in place, and so is ``sampler_index``, what the sampler keeps of them.
    """

    backbone_P: Tensor
    backbone_slots: dict[str, Tensor]
    class_rows: ClassRows
    round: int
    sampler_index: Any = None


def without_deltas(update: ClientUpdate) -> ClientUpdate:
    """An update as other ranks hear of it: what it is, not what it changes."""
    nothing = torch.zeros(0)
    return replace(update, backbone_delta_P=nothing, rows_delta_SD=nothing)


def draw_cohort(num_clients: int, cohort_size: int, seed: int, round: int) -> np.ndarray:
    """Line 1: the round's clients, uniformly without replacement, sorted. O(cohort)."""
    rng = generator(seed, "cohort", round)
    return np.sort(rng.choice(num_clients, min(cohort_size, num_clients), replace=False))


def server_rows(state: ServerState) -> ServerRows:
    """What a sampler at the server may look at."""
    rows = state.class_rows
    return ServerRows(rows.num_classes, lambda ids_S: read(rows, ids_S)[0], state.sampler_index)


def deal_classes(
    plan: RoundPlan, state: ServerState, own_K: Sequence[np.ndarray]
) -> list[ClassSample]:
    """Line 2, at the server: the class samples of a cohort that asked for its own classes."""
    deal, counts = plan.sampler.deal, [num_negatives(plan, len(own_P)) for own_P in own_K]
    assert deal is not None
    rows = server_rows(state)
    hands = deal(own_K, counts, rows, generator(plan.seed, "deal", plan.round))
    name, n = plan.sampler.name, plan.num_classes
    return [
        class_sample(own_P, *check_negatives(name, own_P, n, count, hand))
        for own_P, count, hand in zip(own_K, counts, hands, strict=True)
    ]


def choose_classes(
    plan: RoundPlan, state: ServerState, cohort: np.ndarray, own_K: Sequence[np.ndarray]
) -> list[ClassSample]:
    """Line 2: the class samples of a cohort, whoever draws them."""
    if plan.sampler.drawn_by == "server":
        return deal_classes(plan, state, own_K)
    return [draw_classes(plan, k, own_P) for k, own_P in zip(cohort.tolist(), own_K, strict=True)]


def broadcast(state: ServerState, plan: RoundPlan) -> Broadcast:
    """Line 2, at the server: what all clients get. O(P + D^2), whatever n is."""
    rows, moments = state.class_rows, None
    if plan.method.moments:
        assert rows.sums_EE is not None
        moments = moments_of(rows.sums_EE)
    return Broadcast(state.backbone_P, moments)


def select(optimizer: ServerOptimizer, state: ServerState, ids_S: Tensor) -> Tensor:
    """Line 2, at the server: the rows of a class sample, [S, D]. O(S D), whatever n is."""
    return read_rows(optimizer, state.class_rows, ids_S, state.round)[0]


@dataclass(frozen=True)
class MeanUpdate:
    """A round's weighted mean update: the pseudo-gradient of the server optimizer.

    ``rows_held`` is how many rows a client held, on the same weighted average.
    """

    backbone_delta_P: Tensor
    ids_U: Tensor
    rows_delta_UD: Tensor
    rows_held: float


def no_update(state: ServerState) -> ClientUpdate:
    """An update that weighs nothing: that of a rank without a client in this round."""
    dim, ids_S = state.class_rows.dim, torch.zeros(0, dtype=torch.int64)
    zeros_P = torch.zeros_like(state.backbone_P)
    return ClientUpdate(-1, zeros_P, ids_S, torch.zeros(0, dim), 0, 0.0)


def aggregate(
    updates: Sequence[ClientUpdate], row_mean: RowMean, ranks: Ranks = ALONE
) -> MeanUpdate:
    """Line 5: weighted means, row by row by class id. O(sum of S D), whatever n is.

    ``delta_theta = sum_k p_k delta_theta_k`` and ``delta_W_i = sum_{k: i in S_k} p_k delta_W_ki``
    with ``p_k = n_k / sum_j n_j`` over the whole cohort: a client that did not hold row i counts
    as zero. A negative is held with probability q and weighs 1/q in the loss, and the two cancel
    to first order, so that rows move as under the full softmax. With ``row_mean="holders"`` row i
    is divided by the weight of its holders alone.
    Sums run in float64 in client order, so the order of arrival does not change a bit; where
    several ``ranks`` have trained the cohort, each sums up its own, then they add up.
    """
    updates = sorted(updates, key=lambda update: update.client)
    ids_U = union([update.ids_S for update in updates])
    everyone = ranks.gather((sum(update.num_examples for update in updates), ids_U))
    total = sum(num_examples for num_examples, _ in everyone)
    ids_U = union([ids for _, ids in everyone])
    num_parameters, dim = len(updates[0].backbone_delta_P), updates[0].rows_delta_SD.shape[1]
    sizes = [num_parameters, len(ids_U) * dim, len(ids_U)]
    sums = torch.zeros(sum(sizes), dtype=torch.float64)
    backbone_P, flat_rows, holders_U = torch.split(sums, sizes)
    rows_UD, holders_U1 = flat_rows.view(len(ids_U), dim), holders_U[:, None]
    for update in updates:
        ids_S, num_examples = update.ids_S, update.num_examples
        backbone_P.add_(update.backbone_delta_P, alpha=num_examples)
        add_rows_(rows_UD, ids_U, update.rows_delta_SD, ids_S, num_examples)
        add_rows_(holders_U1, ids_U, torch.ones(len(ids_S), 1), ids_S, num_examples)
    ranks.add_up(sums)
    rows_UD /= total if row_mean == "cohort" else holders_U1
    rows_held = float(holders_U.sum()) / total
    return MeanUpdate((backbone_P / total).float(), ids_U, rows_UD.float(), rows_held)


def balance(update: MeanUpdate, num_classes: int) -> MeanUpdate:
    """Line 5, for moments: row steps less what they have in common, and shorter where many move.

    With logits ``s w'h`` the gradients of a full softmax with respect to all rows,
    ``s sum_b (p_bi - y_bi) h_b`` for row i, sum up to zero, since p_b and y_b both sum up to 1;
    with cosines nearly. Rows move against each other. Where absent rows stay, their part is
    missing, and rows are all drawn to the mean embedding. So touched rows give it back, when moved:

        ``step_i = (mean_i - absent / (U + 1) sum_j mean_j) / (1 + absent U / n)``

    Three heuristics: ``absent``, the share of rows that a client does not hold, so that nothing
    changes where all are held; 1 added to U, so that a row that comes alone still moves; and steps
    that are shorter the larger a part of W a round moves, since each row then moves more often.
    (Ours; ``benchmarks/regimes.py`` measures it.)
    """
    rows_UD = update.rows_delta_UD
    absent = 1 - update.rows_held / num_classes
    drift_D = absent * rows_UD.sum(dim=0) / (len(rows_UD) + 1)
    rows_UD = (rows_UD - drift_D) / (1 + absent * len(rows_UD) / num_classes)
    return replace(update, rows_delta_UD=rows_UD)


def apply_update(optimizer: ServerOptimizer, state: ServerState, update: MeanUpdate) -> ServerState:
    """Line 5: the server optimizer's step on the backbone and the touched rows."""
    backbone_P, backbone_slots = step(
        optimizer, state.backbone_P, state.backbone_slots, update.backbone_delta_P, state.round
    )
    rows, ids_U = state.class_rows, update.ids_U
    step_rows_(optimizer, rows, ids_U, update.rows_delta_UD, state.round)
    return replace(
        state, backbone_P=backbone_P, backbone_slots=backbone_slots, round=state.round + 1
    )


def spread_rows_out(
    optimizer: ServerOptimizer, state: ServerState, weight: float, margin: float, neighbours: int
) -> None:
    """FedAwS's server step after a round: ``W -= weight dR/dW``, on every row, in place."""
    rows, ids_N = state.class_rows, torch.arange(state.class_rows.num_classes)
    weight_ND, slots = read_rows(optimizer, rows, ids_N, state.round)
    gradient_ND = spread_out(weight_ND, margin=margin, neighbours=neighbours)
    write_(rows, ids_N, weight_ND - weight * gradient_ND, slots, state.round)


@dataclass(frozen=True)
class Failure:
    """A client of a cohort without an update that could be used.

    ``reason`` is a word to count by; ``detail`` says what came.
    """

    client: int
    reason: str
    detail: str = ""


class Engine(Protocol):
    """Where clients train. The driver in ``experiment.py`` owns everything else."""

    @property
    def ranks(self) -> Ranks:
        """The processes that a cohort is shared out among."""

    def train(
        self, state: ServerState, cohort: np.ndarray, plan: RoundPlan
    ) -> Iterator[ClientUpdate | Failure]:
        """Lines 2 to 4 for each client of the cohort that is this rank's, in any order."""


def run_round(
    engine: Engine,
    optimizer: ServerOptimizer,
    state: ServerState,
    cohort: np.ndarray,
    plan: RoundPlan,
    row_mean: RowMean,
    quorum: float = 1.0,
    lap: Callable[[str], None] = lambda phase: None,
) -> tuple[ServerState, list[ClientUpdate], list[Failure]]:
    """Algorithm 1: the cohort trains, its updates are averaged, the server takes a step.

    ``quorum`` is the part of the cohort without which there is no step, ``lap`` is told when all
    have trained.

    Returns:
        The new state, the same at every rank, and the updates and failures of this rank's clients.

    Raises:
        DivergedError: an update is not finite, and ``state`` is as it was; or the step is not,
            and ``state`` must not be used again.
        QuorumError: too few clients gave an update; ``state`` is as it was.
    """
    updates, failures = [], []
    for result in engine.train(state, cohort, plan):
        if isinstance(result, Failure):
            failures.append(result)
        else:
            updates.append(check_finite(result, plan))
    check_quorum(updates, failures, quorum, plan)
    lap("train")
    mean = aggregate(updates or [no_update(state)], row_mean, engine.ranks)
    mean = balance(mean, plan.num_classes) if plan.method.moments else mean
    state = apply_update(optimizer, state, mean)
    check_finite_state(state, mean.ids_U)
    if plan.sampler.index is not None:
        rows_UD = read(state.class_rows, mean.ids_U)[0]
        plan.sampler.index.update(state.sampler_index, mean.ids_U, rows_UD)
    return state, updates, failures


def check_quorum(
    updates: Sequence[ClientUpdate], failures: Sequence[Failure], quorum: float, plan: RoundPlan
) -> None:
    """Whether enough clients gave an update, at least one of them.

    Raises:
        QuorumError: they did not; names round, numbers and reasons.
    """
    # A client may have failed and given an update: when it sent it twice.
    cohort = len({u.client for u in updates} | {failure.client for failure in failures})
    if failures and len(updates) < max(1.0, quorum * cohort):
        counts = Counter(failure.reason for failure in failures).most_common()
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts)
        details = next((f"; {f.detail}" for f in failures if f.detail), "")
        raise QuorumError(
            f"round {plan.round + 1}: expected updates of at least {quorum:.0%} of {cohort} "
            f"clients, got {len(updates)} ({reasons}{details})",
            failures,
        )


def check_finite(update: ClientUpdate, plan: RoundPlan) -> ClientUpdate:
    """The update itself, if its loss and all its numbers are finite.

    Raises:
        DivergedError: they are not; names round and client.
    """
    numbers = [torch.tensor(update.loss), update.backbone_delta_P, update.rows_delta_SD]
    if not _all_finite(numbers):
        raise DivergedError(
            f"round {plan.round + 1}, client {update.client}: expected a finite loss and update, "
            f"got a loss of {update.loss}; the last checkpoint is kept. Start in another folder "
            f"with a lower client_lr ({plan.local.lr:g} in this round), class_row_lr "
            f"({plan.local.row_lr:g}), server_lr or scale ({plan.scoring.scale:g})",
            update.client,
        )
    return update


MOST_GROWTH = 100.0
"""The loss of a softmax of cosines is at most ``2 s + log n``, a few times the first round's."""


def check_growth(losses: Sequence[float], first_loss: float, plan: RoundPlan) -> None:
    """Whether the losses of a round's clients are of the order of the first round's.

    The median is asked, since any one client may say what it likes. First losses below 1 count as
    1: of next to nothing a multiple tells nothing.

    Raises:
        DivergedError: it is more than ``MOST_GROWTH`` times as large; the state must not be kept.
    """
    now = median(losses)
    if now > MOST_GROWTH * max(first_loss, 1.0):
        raise DivergedError(
            f"round {plan.round + 1}: expected a loss of the order of the first round's "
            f"({first_loss:.3g}), got {now:.3g} at half of the clients or more; the last "
            f"checkpoint is kept. Start in another folder with a lower client_lr "
            f"({plan.local.lr:g} in this round), class_row_lr ({plan.local.row_lr:g}) or server_lr"
        )


def check_finite_state(state: ServerState, ids_U: Tensor) -> None:
    """Whether backbone, touched rows and the optimizer's slots are finite after the server's step.

    Raises:
        DivergedError: they are not; the state must not be kept.
    """
    rows = state.class_rows
    touched = (table.index_select(0, ids_U) for table in (rows.weight_ND, *rows.slots.values()))
    # A slot that is infinite gives steps of zero for good: finite weights alone tell nothing.
    if not _all_finite((state.backbone_P, *state.backbone_slots.values(), *touched)):
        raise DivergedError(
            f"round {state.round}: the server's step gave numbers that are not finite; the last "
            "checkpoint is kept. Start in another folder with a lower server_lr"
        )


def _all_finite(tensors: Iterable[Tensor]) -> bool:
    # A finite sum, which is much faster to have, has finite terms alone.
    return all(bool(tensor.sum().isfinite() or tensor.isfinite().all()) for tensor in tensors)
