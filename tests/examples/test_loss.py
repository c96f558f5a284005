"""The example's loss is what its formula says, and trains."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from examples.own_loss import main, smoothed_softmax
from fedss.losses.softmax import Scoring
from fedss.sampling.samplers import class_sample, draw_uniform, whole_sample
from tests.reference import cosine

SCALE, N = 4.0, 9
OWN = np.array([1, 4])


def problem(sample):
    g = torch.Generator().manual_seed(0)
    h = F.normalize(torch.randn(3, 5, generator=g, dtype=torch.float64), dim=1)
    rows = torch.randn(len(sample.ids_S), 5, generator=g, dtype=torch.float64)
    ids = sample.ids_S.tolist()
    return h, rows, torch.tensor([ids.index(i) for i in (1, 4, 1)])


def slow(h, rows, label, q, smoothing):
    """One image, from the formula, in floats."""
    o = [SCALE * cosine(h, row) for row in rows]
    log_z = math.log(sum(math.exp(value) / p for value, p in zip(o, q, strict=True)))
    mean = sum(value / p for value, p in zip(o, q, strict=True)) / N
    return log_z - (1 - smoothing) * o[label] - smoothing * mean


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
def test_loss_and_gradients_against_the_loop(smoothing):
    sample = class_sample(OWN, *draw_uniform(OWN, N, 3, np.random.default_rng(0)))
    h, rows, target = problem(sample)
    q = [1.0 if own else 3 / 7 for own in sample.own_S.tolist()]
    objective = smoothed_softmax(smoothing)
    h, rows = h.requires_grad_(), rows.requires_grad_()
    # In float64, as log q is kept in float32.
    exact = torch.tensor(q, dtype=torch.float64).log()
    sample = type(sample)(sample.ids_S, exact, sample.own_S)
    loss_B = objective(h, rows, target, sample, Scoring(SCALE), None)
    expected = [
        slow(h[b].tolist(), rows.tolist(), int(target[b]), q, smoothing) for b in range(len(h))
    ]
    assert loss_B.tolist() == pytest.approx(expected, rel=1e-12)
    (grad_SD,) = torch.autograd.grad(loss_B.sum(), rows)
    for i, d in ((0, 0), (2, 3), (4, 4)):
        sides = []
        for step in (1e-6, -1e-6):
            moved = rows.detach().clone()
            moved[i, d] += step
            sides.append(
                sum(
                    slow(h[b].tolist(), moved.tolist(), int(target[b]), q, smoothing)
                    for b in range(3)
                )
            )
        assert grad_SD[i, d].item() == pytest.approx((sides[0] - sides[1]) / 2e-6, abs=1e-7)


def test_with_all_classes_it_is_torchs_label_smoothing():
    sample = whole_sample(OWN, N)
    h, rows, target = problem(sample)
    sample = type(sample)(sample.ids_S, sample.log_q_S.double(), sample.own_S)
    found = smoothed_softmax(0.1)(h, rows, target, sample, Scoring(SCALE), None)
    o_BS = SCALE * h @ F.normalize(rows, dim=1).T
    expected = F.cross_entropy(o_BS, target, reduction="none", label_smoothing=0.1)
    assert (found - expected).abs().max() < 1e-12


def test_it_trains():
    found = main(rounds=2, classes=40)
    assert set(found) == {"softmax", "smoothed by 0.1"}
    assert len({*found.values()}) == 2
    assert min(found.values()) > 0.0
