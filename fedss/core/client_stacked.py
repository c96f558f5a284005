"""Several clients in one call of the network: for devices that one client's batch does not fill.

The backbones of K clients are the rows of one matrix, and torch.func.vmap runs each on images of
its own. Objectives, class rows and steps are those of :func:`fedss.core.client.train_client`, so
the results are the same up to rounding.

Shape suffixes: K clients, B images of a batch, C channels, H height, W width, D embedding size,
P backbone parameters, S classes of a class sample.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.utils.rnn import pad_sequence

from fedss.core.client import (
    ClientUpdate,
    Learner,
    RoundPlan,
    Trainable,
    batch_loss,
    client_update,
    make_rows_,
    step_own_rows_,
    training_images,
)
from fedss.errors import ConfigError
from fedss.losses.softmax import ClassSample, Objective, Scoring
from fedss.text import one_line


def train_clients(
    plan: RoundPlan, model: Trainable, learners: Sequence[Learner]
) -> list[ClientUpdate]:
    """Lines 3 and 4 for several clients in lockstep: :func:`fedss.core.client.train_client` of
    each.

    A client whose batches are used up drops out. A batch that is smaller than another's is filled
    up with images of its own, whose embeddings go into no loss.
    """
    learners = sorted(learners, key=lambda learner: -len(learner.batches))
    backbone_P = learners[0].submodel.broadcast.backbone_P
    theta_KP = backbone_P.repeat(len(learners), 1)
    if plan.method.local_rows:
        model.theta_P.copy_(backbone_P)
        for learner in learners:
            make_rows_(model, learner)
    for step in range(len(learners[0].batches)):
        active = [learner for learner in learners if step < len(learner.batches)]
        examples, targets, drawn = zip(*(learner.batches[step] for learner in active), strict=True)
        widest = max(map(len, examples))
        example_KB = np.stack([np.resize(e, widest) for e in examples])
        drawn_KBA = np.stack([np.resize(d, (widest, d.shape[1])) for d in drawn])
        # The weights of those still active: a leaf of autograd that shares memory with all.
        active_KP = theta_KP[: len(active)].requires_grad_()
        pixels_KBCHW = training_images(plan, model, example_KB, drawn_KBA)
        h_KBD = model.embed_stacked(active_KP, pixels_KBCHW)
        batch_losses(plan, active, h_KBD, targets).sum().backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            active_KP.sub_(active_KP.grad, alpha=plan.local.lr)  # type: ignore[arg-type]
        for learner in active:
            step_own_rows_(plan, learner)
    return [
        client_update(plan, learner, theta_P)
        for learner, theta_P in zip(learners, theta_KP, strict=True)
    ]


def batch_losses(
    plan: RoundPlan, learners: Sequence[Learner], h_KBD: Tensor, targets: Sequence[Tensor]
) -> Tensor:
    """The mean loss of each client's batch, [K]: :func:`fedss.core.client.batch_loss` of each.

    One call does for all of them if their class samples are of one size, as where negatives are
    sampled: the objective is many small operations. What fills up a smaller batch comes last in
    ``h_KBD``, and has no target.
    """
    sizes = {len(learner.rows_SD) for learner in learners}
    if len(sizes) > 1 or any(learner.absent is not None for learner in learners):
        each = zip(learners, h_KBD, targets, strict=True)
        return torch.stack([batch_loss(plan, one, h[: len(t)], t) for one, h, t in each])

    target_KB = pad_sequence(list(targets), batch_first=True, padding_value=-1.0)
    loss_KB = stacked_losses(
        plan.method.objective,
        plan.scoring,
        h_KBD,
        torch.stack([learner.rows_SD for learner in learners]),
        target_KB.clamp_min(0),
        [learner.sample for learner in learners],
    )
    counts_KB = target_KB >= 0
    loss_K = (loss_KB * counts_KB).sum(dim=1) / counts_KB.sum(dim=1)
    for learner, loss in zip(learners, loss_K.detach(), strict=True):
        learner.losses.append(loss)
    return loss_K


def stacked_losses(
    objective: Objective,
    scoring: Scoring,
    h_KBD: Tensor,
    rows_KSD: Tensor,
    target_KB: Tensor,
    samples: Sequence[ClassSample],
) -> Tensor:
    """The loss of each client's images, [K, B], in one call of the objective."""

    def losses(h_BD: Tensor, rows_SD: Tensor, target_B: Tensor, *sample: Tensor) -> Tensor:
        return objective(h_BD, rows_SD, target_B, ClassSample(*sample), scoring, None)

    parts = [(sample.ids_S, sample.log_q_S, sample.own_S) for sample in samples]
    loss_KB: Tensor = vmap(losses)(
        h_KBD, rows_KSD, target_KB, *map(torch.stack, zip(*parts, strict=True))
    )
    return loss_KB


def embed_stacked(embedder: nn.Module, theta_KP: Tensor, pixels_KBCHW: Tensor) -> Tensor:
    """Embeddings [K, B, D] of K batches, each under weights of its own.

    A row of ``theta_KP`` takes the place of the trainable parameters, in the order of
    :func:`fedss.models.flatten_`; the embedder is as before when this returns.
    """
    trained = [p for p in embedder.parameters() if p.requires_grad]
    number = {id(p): i for i, p in enumerate(trained)}
    # Each place that holds a weight, by one name. Were it left to functional_call to find the
    # places of a shared weight, it would leave a layer that occurs twice without its parameters.
    places = [
        (name, number[id(p)])
        for path, part in embedder.named_modules()
        for name, p in part.named_parameters(path, recurse=False, remove_duplicate=False)
        if p.requires_grad
    ]

    def embed(theta_P: Tensor, pixels_BCHW: Tensor) -> Tensor:
        parts = torch.split(theta_P, [p.numel() for p in trained])
        views = [part.view(p.shape) for part, p in zip(parts, trained, strict=True)]
        weights = {name: views[i] for name, i in places}
        h_BD: Tensor = functional_call(embedder, weights, (pixels_BCHW,), tie_weights=False)
        return h_BD

    return vmap(embed)(theta_KP, pixels_KBCHW)


def check_stackable(embedder: nn.Module, theta_P: Tensor, pixels_BCHW: Tensor) -> None:
    """Try a step of two clients.

    Raises:
        ConfigError: torch.func.vmap cannot run the network.
    """
    theta_KP, pixels_KBCHW = theta_P.repeat(2, 1).requires_grad_(), torch.stack([pixels_BCHW] * 2)
    try:
        embed_stacked(embedder, theta_KP, pixels_KBCHW).sum().backward()  # type: ignore[no-untyped-call]
    except Exception as error:
        raise ConfigError(
            "stack: torch.func.vmap cannot run this backbone for several clients at once; leave "
            f"--stack out. It said: {one_line(error)}"
        ) from error
