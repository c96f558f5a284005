"""A client's part of Algorithm 1, lines 2 to 4: it asks for classes, trains, returns its changes.

Shape suffixes: N the client's images, B a batch, D embedding size, P backbone parameters,
S requested classes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fedss.choices import RowRequests
from fedss.core.privacy import Clipping, clip_parts
from fedss.data.augment import Augmentation, change, draw_parameters
from fedss.losses.methods import Method
from fedss.losses.softmax import AbsentClasses, ClassSample, Scoring
from fedss.sampling.samplers import (
    Sampler,
    check_negatives,
    class_sample,
    draw_common,
    limit,
    own_budget,
    rest_of_common,
    whole_sample,
)
from fedss.seeds import generator


@dataclass(frozen=True)
class Broadcast:
    """What every client of a round receives: the backbone and, by name, a method's payload.

    ``clip`` is the largest norm of an update in this round, where there is one.
    """

    backbone_P: Tensor
    payload: Mapping[str, Tensor] = field(default_factory=dict)
    clip: float | None = None


def to_device(sent: Broadcast, device: torch.device) -> Broadcast:
    """The same on a device."""
    payload = {name: part.to(device, non_blocking=True) for name, part in sent.payload.items()}
    return replace(sent, backbone_P=sent.backbone_P.to(device, non_blocking=True), payload=payload)


@dataclass(frozen=True)
class Submodel:
    """What a client works on: the broadcast, and its class rows; nothing else of W."""

    broadcast: Broadcast
    ids_S: Tensor
    rows_SD: Tensor


@dataclass(frozen=True)
class ClientUpdate:
    """What a client returns: its changes, and how many examples they stand for.

    ``traffic`` is filled in by the engine: bytes of its messages, by direction and part.
    ``within``: where the largest norm adapts, whether the update had no larger one.
    """

    client: int
    backbone_delta_P: Tensor
    ids_S: Tensor
    rows_delta_SD: Tensor
    num_examples: int
    loss: float
    traffic: Mapping[str, int] = field(default_factory=dict)
    within: bool | None = None


@dataclass(frozen=True)
class LocalTraining:
    """How a client trains: SGD over ``epochs`` of its images, or exactly ``steps`` batches.

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
    does not need them. ``augmentation`` changes training images, at the client. ``secret`` is the
    key of clients' draws, which the server has not; None: whoever knows the seed can repeat them.
    ``requests`` says of which rows a client asks and sends changes: those of its class sample
    (``own``), ``all``, or a set of ``sample_size`` classes that all clients of the round have in
    ``common``.
    ``clipping`` bounds updates; None: nothing does.
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
    augmentation: Augmentation | None = None
    secret: bytes | None = field(default=None, repr=False)
    requests: RowRequests = "own"
    clipping: Clipping | None = None

    @property
    def private(self) -> bool:
        """Whether noise hides what one client can change."""
        return self.clipping is not None and self.clipping.private


def client_generator(plan: RoundPlan, purpose: str, client: int) -> np.random.Generator:
    """The generator of one draw at a client in the plan's round."""
    return generator(plan.seed, purpose, plan.round, client, plan.secret)


class Trainable(Protocol):
    """One trainable copy of the backbone; its parameters and gradients are flat vectors.

    All of it lies on one device; images come from the CPU.
    """

    def images(self, example: np.ndarray) -> Tensor:
        """Training images by their numbers, uint8 [..., C, H, W], on the CPU."""

    @property
    def theta_P(self) -> Tensor:
        """The parameters, written in place."""

    @property
    def grad_P(self) -> Tensor:
        """Their gradients; ``backward`` adds to them."""

    def embed(self, pixels_BCHW: Tensor) -> Tensor:
        """Unit-norm embeddings [B, D] of images, uint8 on the CPU."""

    def embed_stacked(self, theta_KP: Tensor, pixels_KBCHW: Tensor) -> Tensor:
        """Unit-norm embeddings [K, B, D] of images, those of row k under weights k."""


def limit_own_classes(plan: RoundPlan, client: int, label_N: np.ndarray) -> np.ndarray:
    """Line 2, at the client: the classes of its images, or a random part that fits the sample;
    of a set that is common to a round, those that it has."""
    if plan.method.local_rows:
        return np.unique(label_N)
    if plan.requests == "common":
        return np.intersect1d(label_N, common_classes(plan))
    n, size = plan.num_classes, plan.sample_size
    budgets = {"all": n, "sampled": own_budget(size, n)}
    rng = client_generator(plan, "own classes", client)
    return limit(np.unique(label_N), budgets.get(plan.method.negatives, size), rng)


@dataclass(frozen=True)
class ClassRequest:
    """Line 2, at the client: what it asks for. ``sample`` is None where the server draws.

    ``shared_R``: the classes that all clients of the round ask for; None: each for its own.
    """

    own_P: np.ndarray
    sample: ClassSample | None
    shared_R: Tensor | None = None

    @property
    def ids_S(self) -> Tensor:
        """What the server hears: shared classes, or the class sample, or own classes where it draws
        the others.
        """
        if self.shared_R is not None:
            return self.shared_R
        return torch.from_numpy(self.own_P) if self.sample is None else self.sample.ids_S


def shared_classes(plan: RoundPlan) -> Tensor | None:
    """Line 2: the classes that every client of the round asks for, sorted; None: they differ."""
    if plan.method.local_rows:
        return torch.arange(0)  # all rows stay with the clients
    if plan.requests == "common":
        return torch.from_numpy(common_classes(plan))
    return torch.arange(plan.num_classes) if plan.requests == "all" else None


def common_classes(plan: RoundPlan) -> np.ndarray:
    """The class set of a round, int64, sorted: drawn by the seed, so that server and clients each
    know it, and a server that is true about seed and round cannot choose it.
    """
    rng = generator(plan.seed, "common classes", plan.round)
    return draw_common(plan.num_classes, plan.sample_size, rng)


def request_classes(plan: RoundPlan, client: int, label_N: np.ndarray) -> ClassRequest:
    """Line 2, at the client: it asks for its own classes and, if it draws them, negatives."""
    own_P, shared_R = limit_own_classes(plan, client, label_N), shared_classes(plan)
    if plan.sampler.drawn_by == "server":
        return ClassRequest(own_P, None)
    if plan.requests == "common":
        assert shared_R is not None
        rest = rest_of_common(np.unique(label_N), plan.num_classes, shared_R.numpy())
        return ClassRequest(own_P, class_sample(own_P, *rest), shared_R)
    return ClassRequest(own_P, draw_classes(plan, client, own_P), shared_R)


def num_negatives(plan: RoundPlan, num_own: int) -> int:
    """Line 2: how many negatives a client with that many own classes gets, at most."""
    others = plan.num_classes - num_own
    wanted = {"all": others, "sampled": plan.sample_size - num_own, "cover": plan.cover, "none": 0}
    return min(wanted[plan.method.negatives], others)


def draw_classes(plan: RoundPlan, client: int, own_P: np.ndarray) -> ClassSample:
    """Line 2, at the client: its class sample, if it draws for itself. It asks for ``ids_S``."""
    sampler, n = plan.sampler, plan.num_classes
    if plan.method.negatives == "all":
        return whole_sample(own_P, n)
    assert sampler.draw is not None
    count = num_negatives(plan, len(own_P))
    rng = client_generator(replace(plan, round=0) if sampler.fixed else plan, "classes", client)
    drawn = sampler.draw(own_P, n, count, rng)
    return class_sample(own_P, *check_negatives(sampler.name, own_P, n, count, drawn))


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


@dataclass
class Learner:
    """A client at work: what it trains on, and what it trains beside the backbone.

    Its tensors lie where the backbone is trained. ``batches`` has, for each local step, the numbers
    of the images, the positions of their labels in S, and the parameters by which the images
    are changed, [B, A]. ``rows_SD`` and ``losses`` change. What it learns is returned ``weight``
    times. ``example_N`` and ``target_N`` are all images that it may use and their labels in S.
    """

    client: int
    submodel: Submodel
    sample: ClassSample
    num_examples: int
    batches: Sequence[tuple[np.ndarray, Tensor, np.ndarray]]
    rows_SD: Tensor
    absent: AbsentClasses | None
    losses: list[Tensor]
    example_N: np.ndarray
    target_N: Tensor
    weight: float = 1.0


def prepare(
    plan: RoundPlan,
    client: int,
    submodel: Submodel,
    sample: ClassSample,
    example_N: np.ndarray,
    label_N: np.ndarray,
    device: torch.device,
) -> Learner:
    """Line 3, before the first step; arguments as for :func:`train_client`."""
    used_N = np.isin(label_N, sample.ids_S[sample.own_S].numpy())
    num_examples, weight = int(used_N.sum()), 1.0
    if plan.requests == "common":
        # An own class is in the set with probability m / n. With the share of its images that the
        # set has, divided by m / n, an update stands for all of them, over the sets (Horvitz and
        # Thompson). How many that were, round after round, would tell which classes are own.
        weight = num_examples / len(label_N) * plan.num_classes / len(sample.ids_S)
        num_examples = len(label_N)
    example_N, label_N = example_N[used_N], label_N[used_N]
    target_N = np.searchsorted(sample.ids_S.numpy(), label_N)
    rng = client_generator(plan, "batches", client)
    order = list(batches(len(example_N), plan.local, rng))
    sizes = [*map(len, order)]
    drawn_NA = np.empty((sum(sizes), 0))
    if plan.augmentation is not None:
        rng = client_generator(plan, "augment", client)
        drawn_NA = draw_parameters(plan.augmentation, sum(sizes), rng)
    sent = to_device(submodel.broadcast, device)
    # A client may have no image of a class in the round's set.
    target = torch.from_numpy(target_N[np.concatenate([np.zeros(0, np.int64), *order])])
    target, rows_SD, *of_sample = (
        tensor.to(device, non_blocking=True)
        for tensor in (target, submodel.rows_SD, sample.ids_S, sample.log_q_S, sample.own_S)
    )
    targets, drawn = torch.split(target, sizes), np.split(drawn_NA, np.cumsum(sizes))[:-1]
    absent = None
    if plan.method.absent is not None:
        absent = plan.method.absent(sent.payload, plan.num_classes, rows_SD)
    return Learner(
        client,
        Submodel(sent, submodel.ids_S, rows_SD),
        ClassSample(*of_sample),
        num_examples,
        [*zip((example_N[batch_B] for batch_B in order), targets, drawn, strict=True)],
        rows_SD.clone().requires_grad_(),
        absent,
        [],
        example_N,
        torch.from_numpy(target_N).to(device, non_blocking=True),
        weight,
    )


def make_rows_(model: Trainable, learner: Learner) -> None:
    """Line 3, where class rows stay with the clients: rows of own classes, made anew.

    ``w_i = sum_{y(x) = i} h(x) / |.|`` under the backbone that was sent, which ``model`` has.
    """
    target_N, dim = learner.target_N, learner.rows_SD.shape[1]
    with torch.no_grad():
        parts = np.array_split(learner.example_N, -(-len(target_N) // 256))
        h_ND = torch.cat([model.embed(model.images(part)) for part in parts])
        sums_SD = h_ND.new_zeros(len(learner.sample.ids_S), dim).index_add_(0, target_N, h_ND)
    learner.rows_SD = F.normalize(sums_SD, dim=1).requires_grad_()


def training_images(
    plan: RoundPlan, model: Trainable, example: np.ndarray, drawn: np.ndarray
) -> Tensor:
    """Line 3: images by their numbers [...], as the client trains on them: [..., C, H, W]."""
    pixels = model.images(example)
    return pixels if plan.augmentation is None else change(plan.augmentation, pixels, drawn)


def batch_loss(plan: RoundPlan, learner: Learner, h_BD: Tensor, target_B: Tensor) -> Tensor:
    """Line 3: the mean loss of a batch, to be differentiated."""
    rows_SD, sample, absent = learner.rows_SD, learner.sample, learner.absent
    loss = plan.method.objective(h_BD, rows_SD, target_B, sample, plan.scoring, absent).mean()
    learner.losses.append(loss.detach())
    return loss


@torch.no_grad()
def step_own_rows_(plan: RoundPlan, learner: Learner) -> None:
    """Line 3: a step of SGD on the client's class rows."""
    learner.rows_SD.sub_(learner.rows_SD.grad, alpha=plan.local.row_lr)  # type: ignore[arg-type]
    learner.rows_SD.grad = None


def client_update(plan: RoundPlan, learner: Learner, theta_P: Tensor) -> ClientUpdate:
    """Line 4: what local training changed, on the CPU."""
    submodel, losses = learner.submodel, learner.losses or [torch.zeros(())]
    rows_SD = submodel.rows_SD if plan.method.local_rows else learner.rows_SD.detach()
    update = ClientUpdate(
        learner.client,
        (theta_P - submodel.broadcast.backbone_P).cpu(),
        submodel.ids_S,
        (rows_SD - submodel.rows_SD).cpu(),
        learner.num_examples,
        float(torch.stack(losses).mean().cpu()),
    )
    if plan.requests == "all":
        update = name_all_rows(update, plan.num_classes)
    elif plan.requests == "common":
        update = weigh(update, learner.weight)
    return clip_update(update, plan.clipping, submodel.broadcast.clip)


def name_all_rows(update: ClientUpdate, num_classes: int) -> ClientUpdate:
    """Line 4: the same update, with zeros for the rows that the client did not train."""
    rows_ND = torch.zeros(num_classes, update.rows_delta_SD.shape[1])
    rows_ND[update.ids_S] = update.rows_delta_SD
    return replace(update, ids_S=torch.arange(num_classes), rows_delta_SD=rows_ND)


def weigh(update: ClientUpdate, weight: float) -> ClientUpdate:
    """Line 4: changes and loss times ``weight``."""
    return replace(
        update,
        backbone_delta_P=update.backbone_delta_P * weight,
        rows_delta_SD=update.rows_delta_SD * weight,
        loss=update.loss * weight,
    )


def clip_update(
    update: ClientUpdate, clipping: Clipping | None, norm: float | None
) -> ClientUpdate:
    """Line 4: an update of a bounded norm; of a private one nothing else is told.

    At the client, before it is sent; and at the server, which takes nobody's word for it, and where
    rounding may have made it longer.
    """
    if clipping is None:
        return update
    assert norm is not None
    parts = update.backbone_delta_P, update.rows_delta_SD
    (backbone_P, rows_SD), within = clip_parts(parts, clipping, norm)
    update = replace(update, backbone_delta_P=backbone_P, rows_delta_SD=rows_SD)
    if clipping.adaptive and update.within is None:
        update = replace(update, within=within)
    return replace(update, num_examples=1, loss=0.0) if clipping.private else update


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

    ``submodel`` has the rows of ``sample``. Of the client's images, ``example_N``, with the classes
    ``label_N``, those of own classes are used.
    """
    device = model.theta_P.device
    learner = prepare(plan, client, submodel, sample, example_N, label_N, device)
    model.theta_P.copy_(learner.submodel.broadcast.backbone_P)
    if plan.method.local_rows:
        make_rows_(model, learner)
    for example_B, target_B, drawn_BA in learner.batches:
        model.grad_P.zero_()
        h_BD = model.embed(training_images(plan, model, example_B, drawn_BA))
        batch_loss(plan, learner, h_BD, target_B).backward()  # type: ignore[no-untyped-call]
        model.theta_P.sub_(model.grad_P, alpha=plan.local.lr)
        step_own_rows_(plan, learner)
    return client_update(plan, learner, model.theta_P)
