"""Algorithm 1 of FedSS (Waghmare et al. 2022, arXiv 2203.04888) on one page.

:func:`run_round` is the page; below it is what it calls. What a client does is in
:mod:`fedss.core.client`.

Shape suffixes: K clients of a cohort, D embedding size, P backbone parameters, S requested classes,
U classes touched in a round.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fedss.choices import Aggregate, RowMean
from fedss.core.checks import check_finite_state, check_quorum, collect
from fedss.core.class_rows import add_rows_, read, union, with_sums, write_
from fedss.core.client import (
    Broadcast,
    ClientUpdate,
    RoundPlan,
    clip_update,
    num_negatives,
    shared_classes,
)
from fedss.core.defence import Defence, cap_weights, middle_backbone, middle_rows, refuse_large
from fedss.core.engine import Engine, Failure
from fedss.core.optimizers import ServerOptimizer, current_rows, step, step_rows_
from fedss.core.privacy import Noise, next_norm, noised
from fedss.core.state import ServerState
from fedss.distributed import ALONE, Ranks
from fedss.losses.methods import Method
from fedss.losses.softmax import ClassSample
from fedss.privacy import sampling_rate
from fedss.sampling.samplers import ServerRows, check_negatives, class_sample
from fedss.seeds import generator

NO_CLIENTS = np.zeros(0, np.int64)
"""No client."""


@dataclass(frozen=True)
class Server:
    """How the server runs each round of a run.

    ``optimizer`` takes the mean update for a gradient, ``row_mean`` is that of :func:`aggregate`.
    Without the updates of the part ``quorum`` of a cohort there is no step. ``on_phase`` is told
    when all clients have trained. ``defence`` is against clients that misbehave; those that are
    ``absent`` in a round (0-based), sorted, are not drawn. ``noise`` hides what one client can
    change, if it is given.
    """

    optimizer: ServerOptimizer
    cohort_size: int = 1
    row_mean: RowMean = "cohort"
    quorum: float = 1.0
    on_phase: Callable[[str], None] = lambda phase: None
    defence: Defence = Defence()
    absent: Callable[[int], np.ndarray] = lambda round: NO_CLIENTS
    noise: Noise | None = None


def run_round(
    server: Server,
    engine: Engine,
    state: ServerState,
    plan: RoundPlan,
    cohort: np.ndarray | None = None,
) -> tuple[ServerState, list[ClientUpdate], list[Failure]]:
    """Algorithm 1, lines 1 to 5.

    ``state`` has backbone and class rows after ``plan.round`` rounds; its rows are written in
    place. ``cohort``, int64, are the clients to train; None: line 1 draws them.

    Returns:
        The new state, the same at every rank, the updates of this rank's clients, and the failures
        of all clients.

    Raises:
        DivergedError: too few updates are finite, and ``state`` is as it was; or the step is not,
            and ``state`` must not be used again.
        QuorumError: too few clients gave an update; ``state`` is as it was.
    """
    # Line 1: the server draws a cohort.
    if cohort is None:
        num_clients = engine.num_clients(plan.round)
        size, absent, noise = server.cohort_size, server.absent(plan.round), server.noise
        cohort = draw_cohort(num_clients, size, plan.seed, plan.round, absent, noise)

    # Line 2: each client asks for its class sample, and gets the backbone and these class rows.
    # Line 3: it trains them on its images.
    # Line 4: it returns what changed, and its number of examples.
    state = with_moments(state, plan)
    ranks, defence = engine.ranks, server.defence
    results = clipped(engine.train(state, cohort, plan) if len(cohort) else (), state, plan)
    updates, failures, diverged = collect(results, plan)
    updates, refused, norms = refuse_large(updates, state.norms, defence, ranks)
    failures = check_quorum(updates, failures + refused, server.quorum, plan, diverged, ranks)
    updates = cap_weights(updates, defence.weight_cap, ranks)
    state = replace(state, norms=norms)
    server.on_phase("train")

    # Line 5: the weighted mean of the changes is the gradient of the server optimizer.
    if defence.aggregate == "mean":
        total = None if server.noise is None else server.noise.cohort_size
        mean = aggregate(updates or [no_update(state)], server.row_mean, ranks, total)
    else:
        mean = aggregate_middle(updates, server.row_mean, defence.aggregate, ranks)
    state, mean = hide(server.noise, state, plan, mean, ranks.gather(count_within(updates)))
    mean = adjust_rows(plan.method, mean, plan.num_classes)
    mean = mean if plan.requests == "own" else only_changed(mean)
    state = apply_update(server.optimizer, state, mean)
    step_all_rows_(server.optimizer, plan.method, state)

    check_finite_state(state, None if plan.method.server_step else mean.ids_U)
    return state, updates, failures


def draw_cohort(
    num_clients: int,
    cohort_size: int,
    seed: int,
    round: int,
    absent: np.ndarray = NO_CLIENTS,
    noise: Noise | None = None,
) -> np.ndarray:
    """Line 1: the round's clients, uniformly without replacement, sorted. O(cohort).

    Those that are ``absent`` are left out, unless all are; that costs O(clients).

    Where ``noise`` is to hide them, each is drawn for itself, with the same probability
    (Poisson sampling): ``cohort_size`` of them on average, and keyed as the noise is. Of these the
    absent ones are left out.
    """
    rng = generator(seed, "cohort", round, secret=None if noise is None else noise.key)
    if noise is not None:
        size = rng.binomial(num_clients, sampling_rate(cohort_size, num_clients))
        return np.setdiff1d(rng.choice(num_clients, size, replace=False), absent)
    if 0 < len(absent) < num_clients:
        present = np.setdiff1d(np.arange(num_clients), absent)
        return np.sort(rng.choice(present, min(cohort_size, len(present)), replace=False))
    return np.sort(rng.choice(num_clients, min(cohort_size, num_clients), replace=False))


def clipped(
    results: Iterable[ClientUpdate | Failure], state: ServerState, plan: RoundPlan
) -> Iterator[ClientUpdate | Failure]:
    """Line 4, at the server: what came, no update longer than clients are to send."""
    for result in results:
        if not isinstance(result, Failure):
            result = clip_update(result, plan.clipping, state.clip)
        yield result


def broadcast(state: ServerState, plan: RoundPlan) -> Broadcast:
    """Line 2, at the server: what all clients get. O(P + D^2), whatever n is."""
    make, sums_EE = plan.method.payload, state.class_rows.sums_EE
    if make is None:
        return Broadcast(state.backbone_P, clip=state.clip)
    assert sums_EE is not None
    return Broadcast(state.backbone_P, make(sums_EE), state.clip)


def with_moments(state: ServerState, plan: RoundPlan) -> ServerState:
    """The state with sums of all class rows, if the method needs them. O(n D^2) the first time."""
    if not plan.method.moments or state.class_rows.sums_EE is not None:
        return state
    return replace(state, class_rows=with_sums(state.class_rows))


def select(optimizer: ServerOptimizer, state: ServerState, ids_S: Tensor) -> Tensor:
    """Line 2, at the server: the rows of a class sample, [S, D]. O(S D), whatever n is."""
    return current_rows(optimizer, state.class_rows, ids_S, state.round)[0]


def deal_classes(
    plan: RoundPlan, state: ServerState, own_K: Sequence[np.ndarray]
) -> list[ClassSample]:
    """Line 2, at the server: the class samples of a cohort that asked for its own classes."""
    sampler, rows = plan.sampler, state.class_rows
    assert sampler.deal is not None
    counts = [num_negatives(plan, len(own_P)) for own_P in own_K]
    seen = ServerRows(rows.num_classes, lambda ids_S: read(rows, ids_S)[0])
    drawn = sampler.deal(own_K, counts, seen, generator(plan.seed, "deal", plan.round))
    return [
        class_sample(
            own_P, *check_negatives(sampler.name, own_P, plan.num_classes, count, negatives)
        )
        for own_P, count, negatives in zip(own_K, counts, drawn, strict=True)
    ]


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
    updates: Sequence[ClientUpdate],
    row_mean: RowMean,
    ranks: Ranks = ALONE,
    total: float | None = None,
) -> MeanUpdate:
    """Line 5: weighted means, row by row by class id. O(sum of S D), whatever n is.

    ``delta_theta = sum_k p_k delta_theta_k`` and ``delta_W_i = sum_{k: i in S_k} p_k delta_W_ki``
    with ``p_k = n_k / sum_j n_j`` over the whole cohort: a client that did not hold row i counts
    as zero. A negative is held with probability q and weighs 1/q in the loss, and the two cancel
    to first order, so that rows move as under the full softmax. With ``row_mean="holders"`` row i
    is divided by the weight of its holders alone. ``total``, if given, takes the place of
    ``sum_j n_j``.
    Sums run in float64 in client order, so the order of arrival does not change a bit; where
    several ``ranks`` have trained the cohort, each sums up its own, then they add up.
    """
    updates = sorted(updates, key=lambda update: update.client)
    ids_U = union([update.ids_S for update in updates])
    everyone = ranks.gather((sum(update.num_examples for update in updates), ids_U))
    if total is None:
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


def aggregate_middle(
    updates: Sequence[ClientUpdate], row_mean: RowMean, aggregate: Aggregate, ranks: Ranks = ALONE
) -> MeanUpdate:
    """Line 5, in place of :func:`aggregate`: means that a few clients cannot move.

    Each coordinate of the backbone is a trimmed mean or median over clients, each of a class row
    that over its holders (Yin et al. 2018, arXiv 1803.01498). All clients weigh the same. With
    ``row_mean="cohort"`` a row is multiplied by its share of holders, as it is there by their
    weight. Where several ranks have trained the cohort, each gets all updates.
    """
    everyone = [update for of_rank in ranks.gather(list(updates)) for update in of_rank]
    everyone.sort(key=lambda update: update.client)
    ids_U = union([update.ids_S for update in everyone])
    rows_UD, holders_U = middle_rows(everyone, ids_U, aggregate)
    if row_mean == "cohort":
        rows_UD *= holders_U[:, None] / len(everyone)
    rows_held = float(holders_U.sum()) / len(everyone)
    backbone_P = middle_backbone(everyone, aggregate)
    return MeanUpdate(backbone_P.float(), ids_U, rows_UD.float(), rows_held)


def count_within(updates: Sequence[ClientUpdate]) -> tuple[int, int]:
    """How many updates were within an adaptive norm, and how many there are."""
    return sum(bool(update.within) for update in updates), len(updates)


def hide(
    noise: Noise | None,
    state: ServerState,
    plan: RoundPlan,
    update: MeanUpdate,
    within: Sequence[tuple[int, int]],
) -> tuple[ServerState, MeanUpdate]:
    """Line 5: the mean update in noise, if there is any, and the state with the next round's norm.

    ``within`` is :func:`count_within` of each rank.
    """
    clipping, norm = plan.clipping, state.clip
    assert (noise is not None) == plan.private
    if clipping is None or norm is None:
        return state, update
    if noise is not None:
        # All rows that clients send, whoever trained: those of a round's common set, if it has one.
        shared_R = shared_classes(plan)
        ids_R = torch.arange(plan.num_classes) if shared_R is None else shared_R
        rows_RD = torch.zeros(len(ids_R), state.class_rows.dim)
        rows_RD[torch.searchsorted(ids_R, update.ids_U)] = update.rows_delta_UD
        parts = update.backbone_delta_P, rows_RD
        parts = noised(parts, noise, clipping, norm, plan.seed, plan.round)
        update = MeanUpdate(parts[0], ids_R, parts[1], float(len(ids_R)))
    if clipping.adaptive:
        inside, count = (sum(part) for part in zip(*within, strict=True))
        norm = next_norm(norm, inside, count, noise, plan.seed, plan.round)
    return replace(state, clip=norm), update


def adjust_rows(method: Method, update: MeanUpdate, num_classes: int) -> MeanUpdate:
    """Line 5: row steps as the method wants them (``Method.row_steps``), or as they are."""
    if method.row_steps is None:
        return update
    absent = 1 - update.rows_held / num_classes
    rows_UD = method.row_steps(update.rows_delta_UD, absent, num_classes)
    return replace(update, rows_delta_UD=rows_UD)


def only_changed(update: MeanUpdate) -> MeanUpdate:
    """Line 5: the rows that a round has changed, where clients name rows that they did not train.

    By the mean alone, so that it can be told of a sum, too, whose terms nobody sees.
    """
    changed_U = update.rows_delta_UD.any(dim=1)
    ids_U, rows_UD = update.ids_U[changed_U], update.rows_delta_UD[changed_U]
    return replace(update, ids_U=ids_U, rows_delta_UD=rows_UD)


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


def step_all_rows_(optimizer: ServerOptimizer, method: Method, state: ServerState) -> None:
    """Line 5: the method's own step on all class rows (``Method.server_step``), in place."""
    if method.server_step is not None:
        rows, ids_N = state.class_rows, torch.arange(state.class_rows.num_classes)
        weight_ND, slots = current_rows(optimizer, rows, ids_N, state.round)
        write_(rows, ids_N, method.server_step(weight_ND), slots, state.round)


def without_deltas(update: ClientUpdate) -> ClientUpdate:
    """An update as other ranks hear of it: what it is, not what it changes."""
    nothing = torch.zeros(0)
    return replace(update, backbone_delta_P=nothing, rows_delta_SD=nothing)
