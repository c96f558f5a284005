"""Algorithm 1 of FedSS (Waghmare et al. 2022, arXiv 2203.04888) on one page.

Shape suffixes: N the client's pictures, B a batch, D embedding size, P backbone parameters,
S requested classes, U classes touched in a round.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from fedss.class_rows import ClassRows, add_rows_, read, rows_of, union, write_
from fedss.errors import DivergedError
from fedss.methods import Method
from fedss.moments import Moments, RowMap, absent_classes, absent_step, mean_map, moments_now
from fedss.optimizers import ServerOptimizer, read_rows, step, step_rows_
from fedss.samplers import (
    Sampler,
    ServerRows,
    check_negatives,
    class_sample,
    limit,
    own_budget,
    whole_sample,
)
from fedss.seeds import generator
from fedss.softmax import ClassSample, Scoring, spread_out

RowMean = Literal["cohort", "holders"]


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


@dataclass(frozen=True)
class Broadcast:
    """What every client of a round receives: the backbone and, for ``moments``, W's moments."""

    backbone_P: Tensor
    moments: Moments | None


@dataclass(frozen=True)
class Submodel:
    """What a client works on: the broadcast, and its class rows; nothing else of W."""

    broadcast: Broadcast
    ids_S: Tensor
    rows_SD: Tensor


@dataclass(frozen=True)
class ClientUpdate:
    """What a client returns: its changes, and how many examples they stand for.

    With moments, ``row_map`` is its step of the rows that it did not hold.
    ``traffic`` is filled in by the engine: bytes of its messages, by direction and part.
    """

    client: int
    backbone_delta_P: Tensor
    ids_S: Tensor
    rows_delta_SD: Tensor
    num_examples: int
    loss: float
    row_map: RowMap | None = None
    traffic: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class LocalTraining:
    """How a client trains: SGD over ``epochs`` of its pictures, or exactly ``steps`` batches.

    ``lr`` is the backbone's learning rate, ``row_lr`` the class rows'.
    """

    epochs: int
    steps: int | None
    batch_size: int
    lr: float
    row_lr: float


@dataclass(frozen=True)
class RoundPlan:
    """What every client of a round is told.

    ``sample_size`` is |S| where negatives are sampled, ``cover`` their number where the method
    does not need them.
    """

    round: int
    seed: int
    method: Method
    sampler: Sampler
    num_classes: int
    sample_size: int
    cover: int
    scoring: Scoring
    local: LocalTraining


class Trainable(Protocol):
    """One trainable copy of the backbone; its parameters and gradients are flat vectors."""

    @property
    def theta_P(self) -> Tensor:
        """The parameters, written in place."""

    @property
    def grad_P(self) -> Tensor:
        """Their gradients; ``backward`` adds to them."""

    def embed(self, example_B: np.ndarray) -> Tensor:
        """Unit-norm embeddings [B, D] of training pictures, by their numbers."""


def draw_cohort(num_clients: int, cohort_size: int, seed: int, round: int) -> np.ndarray:
    """Line 1: the round's clients, uniformly without replacement, sorted. O(cohort)."""
    rng = generator(seed, "cohort", round)
    return np.sort(rng.choice(num_clients, min(cohort_size, num_clients), replace=False))


def own_classes(plan: RoundPlan, client: int, label_N: np.ndarray) -> np.ndarray:
    """Line 2, at the client: the classes of its pictures, or a random part that fits the sample."""
    rng = generator(plan.seed, "own classes", plan.round, client)
    budget = {
        "all": plan.num_classes,
        "sampled": own_budget(plan.sample_size, plan.num_classes),
        "cover": plan.sample_size,
        "none": plan.sample_size,
    }[plan.method.negatives]
    return limit(np.unique(label_N), budget, rng)


def num_negatives(plan: RoundPlan, num_own: int) -> int:
    """Line 2: how many negatives a client with that many own classes gets, at most."""
    others = plan.num_classes - num_own
    wanted = {
        "all": others,
        "sampled": plan.sample_size - num_own,
        "cover": plan.cover,
        "none": 0,
    }[plan.method.negatives]
    return min(wanted, others)


def draw_classes(plan: RoundPlan, client: int, own_P: np.ndarray) -> ClassSample:
    """Line 2, at the client: its class sample, if it draws for itself. It asks for ``ids_S``."""
    if plan.method.negatives == "all":
        return whole_sample(own_P, plan.num_classes)
    draw, count = plan.sampler.draw, num_negatives(plan, len(own_P))
    assert draw is not None
    round = 0 if plan.sampler.fixed else plan.round
    rng = generator(plan.seed, "classes", round, client)
    drawn = draw(own_P, plan.num_classes, count, rng)
    name = plan.sampler.name
    return class_sample(own_P, *check_negatives(name, own_P, plan.num_classes, count, drawn))


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
        assert rows.history is not None
        moments = moments_now(rows.history, rows.num_classes, rows.dim)
    return Broadcast(state.backbone_P, moments)


def select(optimizer: ServerOptimizer, state: ServerState, ids_S: Tensor) -> Tensor:
    """Line 2, at the server: the rows of a class sample, [S, D]. O(S D), whatever n is."""
    return read_rows(optimizer, state.class_rows, ids_S, state.round)[0]


def batches(
    num_examples: int, local: LocalTraining, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """Positions of each mini-batch: every epoch in a new order, its last batch may be smaller."""
    taken = 0
    for _ in range(local.epochs if local.steps is None else local.steps):
        order = rng.permutation(num_examples)
        for start in range(0, num_examples, local.batch_size):
            if taken == local.steps:
                return
            taken += 1
            yield order[start : start + local.batch_size]


def train_client(
    plan: RoundPlan,
    client: int,
    model: Trainable,
    submodel: Submodel,
    sample: ClassSample,
    example_N: np.ndarray,
    label_N: np.ndarray,
) -> ClientUpdate:
    """Lines 3 and 4: local SGD on the submodel, and the changes it made.

    Args:
        plan: the round's plan.
        client: number of the client.
        model: where the backbone is trained.
        submodel: what the server sent.
        sample: the class sample of which ``submodel`` has the rows.
        example_N: int64, numbers of the client's pictures; those of own classes are used.
        label_N: int64, their class ids.
    """
    used_N = np.isin(label_N, sample.ids_S[sample.own_S].numpy())
    example_N, label_N = example_N[used_N], label_N[used_N]
    backbone_P, moments = submodel.broadcast.backbone_P, submodel.broadcast.moments
    model.theta_P.copy_(backbone_P)
    rows_SD, absent = submodel.rows_SD.clone().requires_grad_(), None
    if moments is not None:
        absent = absent_classes(moments, plan.num_classes, submodel.rows_SD)
    target_N = np.searchsorted(sample.ids_S.numpy(), label_N)
    rng = generator(plan.seed, "batches", plan.round, client)
    losses = []
    for batch_B in batches(len(example_N), plan.local, rng):
        model.grad_P.zero_()
        h_BD = model.embed(example_N[batch_B])
        target_B = torch.from_numpy(target_N[batch_B])
        loss_B = plan.method.objective(h_BD, rows_SD, target_B, sample, plan.scoring, absent)
        loss = loss_B.mean()
        loss.backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            model.theta_P.sub_(model.grad_P, alpha=plan.local.lr)
            rows_SD.sub_(rows_SD.grad, alpha=plan.local.row_lr)  # type: ignore[arg-type]
        rows_SD.grad = None
        losses.append(loss.detach())
    row_map = None
    if moments is not None:
        row_map = absent_step(absent, rows_SD.shape[1], plan.local.row_lr)
    return ClientUpdate(
        client,
        model.theta_P - backbone_P,
        submodel.ids_S,
        rows_SD.detach() - submodel.rows_SD,
        len(example_N),
        float(torch.stack(losses).mean()),
        row_map,
    )


def on_top_of_map(
    optimizer: ServerOptimizer, state: ServerState, updates: Sequence[ClientUpdate]
) -> list[ClientUpdate]:
    """Line 5, for moments: each client's row deltas less what its map does to these rows.

    The server will apply the mean map to all rows, and a client's own map is only meant for those
    that it did not hold.
    """
    if updates[0].row_map is None:
        return list(updates)
    ids_U = union([update.ids_S for update in updates])
    rows_UD = select(optimizer, state, ids_U)
    taken_off = []
    for update in updates:
        assert update.row_map is not None
        rows_SD = rows_of(rows_UD, ids_U, update.ids_S)
        mapped_SD = update.row_map.shift_D + rows_SD @ update.row_map.matrix_DD
        taken_off.append(replace(update, rows_delta_SD=update.rows_delta_SD - mapped_SD))
    return taken_off


@dataclass(frozen=True)
class MeanUpdate:
    """A round's weighted mean update: the pseudo-gradient of the server optimizer."""

    backbone_delta_P: Tensor
    ids_U: Tensor
    rows_delta_UD: Tensor
    row_map: RowMap | None = None


def aggregate(updates: Sequence[ClientUpdate], row_mean: RowMean) -> MeanUpdate:
    """Line 5: weighted means, row by row by class id. O(sum of S D), whatever n is.

    ``delta_theta = sum_k p_k delta_theta_k`` and ``delta_W_i = sum_{k: i in S_k} p_k delta_W_ki``
    with ``p_k = n_k / sum_j n_j`` over the whole cohort: a client that did not hold row i counts
    as zero. A negative is held with probability q and weighs 1/q in the loss, and the two cancel
    to first order, so that rows move as under the full softmax. With ``row_mean="holders"`` row i
    is divided by the weight of its holders alone. Steps of all rows are averaged over the cohort.
    Sums run in float64 in client order, so the order of arrival does not change a bit.
    """
    updates = sorted(updates, key=lambda update: update.client)
    total = sum(update.num_examples for update in updates)
    ids_U = union([update.ids_S for update in updates])
    backbone_P = torch.zeros_like(updates[0].backbone_delta_P, dtype=torch.float64)
    rows_UD = torch.zeros(len(ids_U), updates[0].rows_delta_SD.shape[1], dtype=torch.float64)
    holders_U1 = torch.zeros(len(ids_U), 1, dtype=torch.float64)
    for update in updates:
        ids_S, num_examples = update.ids_S, update.num_examples
        backbone_P.add_(update.backbone_delta_P, alpha=num_examples)
        add_rows_(rows_UD, ids_U, update.rows_delta_SD, ids_S, num_examples)
        add_rows_(holders_U1, ids_U, torch.ones(len(ids_S), 1), ids_S, num_examples)
    rows_UD /= total if row_mean == "cohort" else holders_U1
    maps = [(u.row_map, u.num_examples / total) for u in updates if u.row_map is not None]
    row_map = mean_map(maps) if maps else None
    return MeanUpdate((backbone_P / total).float(), ids_U, rows_UD.float(), row_map)


def apply_update(optimizer: ServerOptimizer, state: ServerState, update: MeanUpdate) -> ServerState:
    """Line 5: the server optimizer's step on the backbone and the touched rows."""
    backbone_P, backbone_slots = step(
        optimizer, state.backbone_P, state.backbone_slots, update.backbone_delta_P, state.round
    )
    rows, ids_U = state.class_rows, update.ids_U
    step_rows_(optimizer, rows, ids_U, update.rows_delta_UD, state.round, update.row_map)
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


class Engine(Protocol):
    """Where clients train. The driver in ``experiment.py`` owns everything else."""

    def train(
        self, state: ServerState, cohort: np.ndarray, plan: RoundPlan
    ) -> Iterator[ClientUpdate]:
        """Lines 2 to 4 for each client of the cohort, in any order."""


def run_round(
    engine: Engine,
    optimizer: ServerOptimizer,
    state: ServerState,
    cohort: np.ndarray,
    plan: RoundPlan,
    row_mean: RowMean,
) -> tuple[ServerState, list[ClientUpdate]]:
    """Algorithm 1: the cohort trains, its updates are averaged, the server takes a step.

    Raises:
        DivergedError: an update is not finite, and ``state`` is as it was; or the step is not,
            and ``state`` must not be used again.
    """
    updates = [check_finite(update, plan) for update in engine.train(state, cohort, plan)]
    mean = aggregate(on_top_of_map(optimizer, state, updates), row_mean)
    state = apply_update(optimizer, state, mean)
    check_finite_state(state, mean.ids_U)
    if plan.sampler.index is not None:
        rows_UD = read(state.class_rows, mean.ids_U)[0]
        plan.sampler.index.update(state.sampler_index, mean.ids_U, rows_UD)
    return state, updates


def check_finite(update: ClientUpdate, plan: RoundPlan) -> ClientUpdate:
    """The update itself, if its loss and all its numbers are finite.

    Raises:
        DivergedError: they are not; names round and client.
    """
    numbers = [torch.tensor(update.loss), update.backbone_delta_P, update.rows_delta_SD]
    if update.row_map is not None:
        numbers += [update.row_map.shift_D, update.row_map.matrix_DD]
    if not _all_finite(numbers):
        raise DivergedError(
            f"round {plan.round + 1}, client {update.client}: expected a finite loss and update, "
            f"got a loss of {update.loss}; the last checkpoint is kept. Start in another folder "
            f"with a lower client_lr ({plan.local.lr:g} in this round), class_row_lr "
            f"({plan.local.row_lr:g}) or server_lr",
            update.client,
        )
    return update


def check_finite_state(state: ServerState, ids_U: Tensor) -> None:
    """Whether the backbone and the touched rows are finite after the server's step.

    Raises:
        DivergedError: they are not; the state must not be kept.
    """
    if not _all_finite((state.backbone_P, state.class_rows.weight_ND.index_select(0, ids_U))):
        raise DivergedError(
            f"round {state.round}: the server's step gave weights that are not finite; the last "
            "checkpoint is kept. Start in another folder with a lower server_lr"
        )


def _all_finite(tensors: Iterable[Tensor]) -> bool:
    # A finite sum, which is much faster to have, has finite terms alone.
    return all(bool(tensor.sum().isfinite() or tensor.isfinite().all()) for tensor in tensors)
