import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fedss.methods import METHODS
from fedss.softmax import (
    ClassSample,
    Scoring,
    negatives_only_softmax,
    own_budget,
    positive_hinge,
    sample_all,
    sample_own,
    sample_uniform,
    sampled_softmax,
    spread_out,
    uncorrected_softmax,
)
from tests import reference


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@st.composite
def requests(draw: st.DrawFn) -> tuple[np.ndarray, int, int]:
    n = draw(st.integers(2, 60))
    own = draw(st.sets(st.integers(0, n - 1), min_size=1, max_size=n))
    return np.array(sorted(own)), n, draw(st.integers(2, n))


@given(requests(), st.integers(0, 1000))
def test_a_uniform_sample_keeps_its_promises(request_, seed):
    own, n, size = request_
    sample = sample_uniform(own, n, size, rng(seed))
    ids = sample.ids_S.numpy()
    assert len(ids) == size
    assert (np.diff(ids) > 0).all()
    assert 0 <= ids[0] <= ids[-1] < n
    kept = ids[sample.own_S.numpy()]
    assert set(kept) <= set(own)
    assert len(kept) == min(len(own), own_budget(size, n))
    num_negatives = size - len(kept)
    for log_q, is_own in zip(sample.log_q_S.tolist(), sample.own_S.tolist(), strict=True):
        expected = 1.0 if is_own else num_negatives / (n - len(kept))
        assert math.exp(log_q) == pytest.approx(expected, rel=1e-6)


@given(requests(), st.integers(0, 1000))
def test_all_and_own(request_, seed):
    own, n, size = request_
    everything = sample_all(own, n, size, rng(seed))
    assert everything.ids_S.tolist() == list(range(n))
    assert not everything.log_q_S.any()
    alone = sample_own(own, n, size, rng(seed))
    assert alone.own_S.all()
    assert set(alone.ids_S.tolist()) <= set(own.tolist())
    assert len(alone.ids_S) == min(len(own), size)


def test_negatives_are_uniform_over_the_other_classes():
    own, n, size, draws = np.array([1, 4, 5]), 9, 5, 6000
    counts = Counter()
    for seed in range(draws):
        sample = sample_uniform(own, n, size, rng(seed))
        counts.update(sample.ids_S[~sample.own_S].tolist())
    assert set(counts) == {0, 2, 3, 6, 7, 8}
    expected = draws * 2 / 6
    # Six standard deviations of a binomial count.
    assert all(
        abs(c - expected) < 6 * math.sqrt(draws * (1 / 3) * (2 / 3)) for c in counts.values()
    )


def test_sampling_does_not_touch_n_things(monkeypatch):
    """10^12 classes: any array of size n would need terabytes."""
    sample = sample_uniform(np.array([3, 10**11]), 10**12, 256, rng())
    assert len(sample.ids_S) == 256


@pytest.mark.parametrize(("n", "own", "m"), [(7, (2, 5), 3), (6, (0,), 2), (6, (1, 2, 3, 4), 1)])
def test_the_partition_estimate_is_unbiased(n, own, m):
    """Exhaustive enumeration of all samples, each as likely as any other: E[Z^] = Z."""
    logits = rng(n).normal(size=n) * 3
    negative_sets = list(reference.all_negative_sets(own, n, m))
    # The q that the sampler states, and that every set of negatives can be drawn.
    drawn = set()
    for seed in range(400):
        sample = sample_uniform(np.array(own), n, len(own) + m, rng(seed))
        assert sample.own_S.sum() == len(own)
        drawn.add(tuple(sample.ids_S[~sample.own_S].tolist()))
        q = math.exp(sample.log_q_S[~sample.own_S][0])
    assert drawn == set(negative_sets)
    estimates = [
        sum(math.exp(logits[i]) for i in own) + sum(math.exp(logits[i]) / q for i in negatives)
        for negatives in negative_sets
    ]
    assert np.mean(estimates) == pytest.approx(np.exp(logits).sum(), rel=1e-6)
    # The logarithm is not unbiased: Jensen. Nobody may claim otherwise.
    assert np.mean(np.log(estimates)) < math.log(np.exp(logits).sum())


def test_unbiased_for_the_examples_used_when_own_classes_are_cut():
    """Given which own classes were kept, all the others (cut ones too) may be negatives."""
    own, n, size = np.arange(6), 8, 4
    seen = {}
    for seed in range(3000):
        sample = sample_uniform(own, n, size, rng(seed))
        kept = tuple(sample.ids_S[sample.own_S].tolist())
        seen.setdefault(kept, set()).update(sample.ids_S[~sample.own_S].tolist())
    assert set(seen) == set(itertools.combinations(range(6), 3))
    assert all(negatives == set(range(8)) - set(kept) for kept, negatives in seen.items())


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
    everything = sample_uniform(own, 7, 7, rng())
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
    sample = sample_all(np.array([0]), 2, 2, rng())
    sampled_softmax(
        h, rows, torch.tensor([0]), sample, Scoring(8.0, "arcface", 0.5)
    ).sum().backward()
    assert torch.isfinite(h.grad).all()
    assert torch.isfinite(rows.grad).all()


def test_margins_against_pytorch_metric_learning():
    from pytorch_metric_learning import losses

    h, rows, target, _ = problem(6, dtype=torch.float32)
    everything = sample_all(np.array([0, 2, 3]), 7, 7, rng())
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
    before = objective(h, rows, target, sample, Scoring())
    after = objective(h, rows[permutation], inverse[target], renamed, Scoring())
    assert torch.allclose(before, after, rtol=0, atol=1e-12)


def test_spread_out_is_the_gradient_of_its_formula():
    rows = torch.randn(9, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def regulariser(w: torch.Tensor) -> torch.Tensor:
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
    (expected,) = torch.autograd.grad(regulariser(w), w)
    for block in (2, 4, 100):
        ours = spread_out(rows, margin=0.7, neighbours=4, block=block)
        assert (ours - expected).abs().max() < 1e-12
