import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fedss.losses.methods import METHODS
from fedss.losses.softmax import (
    ClassSample,
    Scoring,
    negatives_only_softmax,
    positive_hinge,
    sampled_softmax,
    spread_out,
    uncorrected_softmax,
)
from fedss.sampling.samplers import class_sample, draw_uniform
from tests import reference


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def problem(seed: int, batch: int = 5, size: int = 7, dim: int = 4, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    h = F.normalize(torch.randn(batch, dim, generator=g, dtype=dtype), dim=1)
    rows = torch.randn(size, dim, generator=g, dtype=dtype)
    own = torch.tensor([True, False, True, True] + [False] * (size - 4))
    log_q = torch.where(own, 0.0, math.log(0.3)).to(dtype)
    target = torch.tensor([0, 2, 3, 2, 0])[:batch]
    return h, rows, target, ClassSample(torch.arange(size), log_q, own)


SCORINGS = [
    Scoring(10.0),
    Scoring(4.0, "cosface", 0.35),
    Scoring(4.0, "arcface", 0.5),
    Scoring(4.0, "arcface", 2.0),
]


@pytest.mark.parametrize("scoring", SCORINGS, ids=lambda s: f"{s.margin_kind}-{s.margin}")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sampled_softmax_against_the_loop(scoring, dtype):
    for seed in range(5):
        h, rows, target, sample = problem(seed, dtype=dtype)
        loss = sampled_softmax(h, rows, target, sample, scoring)
        for b in range(len(h)):
            expected = reference.sampled_softmax_loss(
                h[b].tolist(),
                rows.tolist(),
                int(target[b]),
                sample.log_q_S.exp().tolist(),
                scoring.scale,
                scoring.margin_kind,
                scoring.margin,
            )
            tolerance = 1e-12 if dtype is torch.float64 else 1e-5
            assert loss[b].item() == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("correction", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("objective", [sampled_softmax, negatives_only_softmax])
def test_a_tempered_correction_weighs_negatives_by_a_power_of_q(objective, correction):
    h, rows, target, sample = problem(7)
    loss = objective(h, rows, target, sample, Scoring(10.0, correction=correction))
    for b in range(len(h)):
        label = int(target[b])
        expected = reference.sampled_softmax_loss(
            h[b].tolist(),
            rows.tolist(),
            label,
            (sample.log_q_S.exp() ** correction).tolist(),
            10.0,
            left_out=sorted({0, 2, 3} - {label}) if objective is negatives_only_softmax else (),
        )
        assert loss[b].item() == pytest.approx(expected, rel=1e-12)


def test_uncorrected_leaves_log_q_out():
    h, rows, target, sample = problem(1)
    loss = uncorrected_softmax(h, rows, target, sample, Scoring(10.0))
    for b in range(len(h)):
        expected = reference.sampled_softmax_loss(
            h[b].tolist(), rows.tolist(), int(target[b]), [1.0] * 7, 10.0
        )
        assert loss[b].item() == pytest.approx(expected, rel=1e-12)


def test_negatives_only_leaves_other_own_classes_out():
    h, rows, target, sample = problem(2)
    loss = negatives_only_softmax(h, rows, target, sample, Scoring(10.0))
    own = {0, 2, 3}
    for b in range(len(h)):
        label = int(target[b])
        expected = reference.sampled_softmax_loss(
            h[b].tolist(),
            rows.tolist(),
            label,
            sample.log_q_S.exp().tolist(),
            10.0,
            left_out=sorted(own - {label}),
        )
        assert loss[b].item() == pytest.approx(expected, rel=1e-12)


def test_positive_hinge_against_the_loop():
    h, rows, target, sample = problem(3)
    loss = positive_hinge(h, rows, target, sample, Scoring())
    for b in range(len(h)):
        cos = reference.cosine(h[b].tolist(), rows[int(target[b])].tolist())
        assert loss[b].item() == pytest.approx(max(0.0, 0.9 - cos) ** 2, rel=1e-12)


def test_full_is_the_limit_in_loss_and_gradients():
    h, rows, target, _ = problem(4)
    own = np.array([0, 2, 3])
    everything = class_sample(own, *draw_uniform(own, 7, 4, rng()))
    grads = []
    for loss_of in (
        lambda h, w: sampled_softmax(h, w, target, everything, Scoring(10.0)).sum(),
        lambda h, w: F.cross_entropy(10.0 * h @ F.normalize(w, dim=1).T, target, reduction="sum"),
    ):
        h_, w_ = h.clone().requires_grad_(), rows.clone().requires_grad_()
        loss = loss_of(h_, w_)
        grads.append((loss.detach(), *torch.autograd.grad(loss, (h_, w_))))
    for ours, theirs in zip(*grads, strict=True):
        assert (ours - theirs).abs().max() < 1e-12


@pytest.mark.parametrize(
    "objective",
    [sampled_softmax, uncorrected_softmax, negatives_only_softmax, positive_hinge],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("scoring", SCORINGS, ids=lambda s: f"{s.margin_kind}-{s.margin}")
def test_gradients(objective, scoring):
    h, rows, target, sample = problem(5)
    h.requires_grad_()
    rows.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h, w: objective(h, w, target, sample, scoring), (h, rows)
    )


@pytest.mark.parametrize("cos", [1.0, -1.0])
def test_arcface_has_finite_gradients_at_the_ends(cos):
    h = torch.tensor([[1.0, 0.0]], requires_grad=True)
    rows = torch.tensor([[cos, 0.0], [0.0, 1.0]], requires_grad=True)
    sample = class_sample(np.array([0]), np.array([1]), np.ones(1))
    sampled_softmax(
        h, rows, torch.tensor([0]), sample, Scoring(8.0, "arcface", 0.5)
    ).sum().backward()
    assert torch.isfinite(h.grad).all()
    assert torch.isfinite(rows.grad).all()


def test_margins_against_pytorch_metric_learning():
    from pytorch_metric_learning import losses

    h, rows, target, _ = problem(6, dtype=torch.float32)
    everything = class_sample(np.array([0, 2, 3]), np.array([1, 4, 5, 6]), np.ones(4))
    for kind, peer in (
        ("cosface", losses.CosFaceLoss(7, 4, margin=0.35, scale=16)),
        ("arcface", losses.ArcFaceLoss(7, 4, margin=math.degrees(0.5), scale=16)),
    ):
        peer.W.data = rows.T.clone()
        ours = sampled_softmax(
            h, rows, target, everything, Scoring(16.0, kind, 0.35 if kind == "cosface" else 0.5)
        )
        assert ours.mean().item() == pytest.approx(peer(h, target).item(), rel=1e-5)


@settings(max_examples=20)
@given(st.integers(0, 10_000), st.sampled_from(["fedss", "full", "pos-only", "neg-only", "fedaws"]))
def test_renaming_classes_changes_nothing_else(seed, name):
    """Equivariance: permute the rows of the sample with its labels, the losses stay."""
    h, rows, target, sample = problem(seed % 50)
    permutation = torch.from_numpy(rng(seed).permutation(7))
    inverse = torch.argsort(permutation)
    renamed = ClassSample(sample.ids_S, sample.log_q_S[permutation], sample.own_S[permutation])
    objective = METHODS[name].objective
    before = objective(h, rows, target, sample, Scoring(), None)
    after = objective(h, rows[permutation], inverse[target], renamed, Scoring(), None)
    assert torch.allclose(before, after, rtol=0, atol=1e-12)


def test_spread_out_is_the_gradient_of_its_formula():
    rows = torch.randn(9, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def regularizer(w: torch.Tensor) -> torch.Tensor:
        total = w.new_zeros(())
        for i in range(len(w)):
            near = sorted(
                (1 - F.cosine_similarity(w[i], w[j], dim=0) for j in range(len(w)) if j != i),
                key=lambda distance: distance.item(),
            )[:4]
            for distance in near:
                total = total + (0.7 - distance).clamp_min(0).square()
        return total

    w = rows.clone().requires_grad_()
    (expected,) = torch.autograd.grad(regularizer(w), w)
    for block in (2, 4, 100):
        ours = spread_out(rows, margin=0.7, neighbours=4, block=block)
        assert (ours - expected).abs().max() < 1e-12
