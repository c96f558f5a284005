"""Whether what came of a round may be used: enough updates, finite numbers, losses that hold."""

from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import median

import torch
from torch import Tensor

from fedss.core.client import ClientUpdate, RoundPlan
from fedss.core.engine import Failure
from fedss.core.state import ServerState
from fedss.distributed import ALONE, Ranks
from fedss.errors import DivergedError, QuorumError


def collect(
    results: Iterable[ClientUpdate | Failure], plan: RoundPlan
) -> tuple[list[ClientUpdate], list[Failure], DivergedError | None]:
    """The updates and the failures that an engine gave; an update that is not finite is a failure.

    The first of these is also told as the error that it is where too few others remain.
    """
    updates, failures = list[ClientUpdate](), list[Failure]()
    diverged: DivergedError | None = None
    for result in results:
        if isinstance(result, Failure):
            failures.append(result)
            continue
        try:
            updates.append(check_finite(result, plan))
        except DivergedError as error:
            told = f"a loss of {result.loss}, or a change that is not finite"
            failures.append(Failure(result.client, "not finite", told))
            diverged = diverged or error
    return updates, failures, diverged


def check_quorum(
    updates: Sequence[ClientUpdate],
    failures: Sequence[Failure],
    quorum: float,
    plan: RoundPlan,
    diverged: DivergedError | None = None,
    ranks: Ranks = ALONE,
) -> list[Failure]:
    """The failures of all ranks, if a step may be taken with the updates that there are.

    Raises:
        DivergedError: too few clients gave an update, and no other reason than ``diverged``.
        QuorumError: too few clients gave an update; names round, numbers and reasons.
    """
    told = ranks.gather(([update.client for update in updates], list(failures)))
    used = [client for clients, _ in told for client in clients]
    failures = [failure for _, of_rank in told for failure in of_rank]
    # A client may have failed and given an update: when it sent it twice.
    cohort = len({*used} | {failure.client for failure in failures})
    if not failures or len(used) >= max(1.0, quorum * cohort):
        return failures
    if diverged and {failure.reason for failure in failures} == {"not finite"}:
        raise diverged
    ranks.gather(None)  # Another rank may have raised that.
    counts = Counter(failure.reason for failure in failures).most_common()
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts)
    details = next((f"; {f.detail}" for f in failures if f.detail), "")
    raise QuorumError(
        f"round {plan.round + 1}: expected updates of at least {quorum:.0%} of {cohort} "
        f"clients, got {len(used)} ({reasons}{details})",
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

    By the median, since any one client may say what it likes. A first loss below 1 counts as 1.

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


def check_finite_state(state: ServerState, ids_U: Tensor | None) -> None:
    """Whether backbone, touched rows and the optimizer's slots are finite after the server's step.

    ``ids_U`` are the touched rows; None: all.

    Raises:
        DivergedError: they are not; the state must not be kept.
    """
    rows = state.class_rows
    tables = (rows.weight_ND, *rows.slots.values())
    touched = (table if ids_U is None else table.index_select(0, ids_U) for table in tables)
    # A slot that is infinite gives steps of zero for good: finite weights alone tell nothing.
    if not _all_finite((state.backbone_P, *state.backbone_slots.values(), *touched)):
        raise DivergedError(
            f"round {state.round}: the server's step gave numbers that are not finite; the last "
            "checkpoint is kept. Start in another folder with a lower server_lr or server_row_lr"
        )


def _all_finite(tensors: Iterable[Tensor]) -> bool:
    # A finite sum, which is much faster to have, has finite terms alone.
    return all(bool(tensor.sum().isfinite() or tensor.isfinite().all()) for tensor in tensors)
