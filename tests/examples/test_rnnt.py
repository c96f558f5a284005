"""The RNN-Transducer example: its loss against oracles, and what its table claims."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from examples import rnnt_sampled_softmax as example


def lattice(seed: int, frames: int, labels: int, batch: int = 3) -> tuple[Tensor, Tensor]:
    """Blank and label log-probabilities that do not sum to one, as between other tokens."""
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(
        (batch, frames, labels + 1, 4), generator=generator, dtype=torch.float64
    )
    log_p = logits.log_softmax(3)
    return log_p[..., 0], log_p[:, :, :-1, 1].contiguous()


def loop_loss(blank_TL: list[list[float]], label_TU: list[list[float]]) -> float:
    """The forward recursion of Graves 2012, point by point."""
    forward: dict[tuple[int, int], float] = {}
    for t in range(len(blank_TL)):
        for u in range(len(blank_TL[0])):
            p = 1.0 if t == u == 0 else 0.0
            if t > 0:
                p += forward[t - 1, u] * math.exp(blank_TL[t - 1][u])
            if u > 0:
                p += forward[t, u - 1] * math.exp(label_TU[t][u - 1])
            forward[t, u] = p
    return -math.log(forward[len(blank_TL) - 1, len(blank_TL[0]) - 1]) - blank_TL[-1][-1]


def enumerated_loss(blank_TL: list[list[float]], label_TU: list[list[float]]) -> float:
    """All alignments one by one: which of the T + U steps are labels; the last is a blank."""
    T, U = len(blank_TL), len(blank_TL[0]) - 1
    total = 0.0
    for labels in itertools.combinations(range(T + U - 1), U):
        t, u, log_p = 0, 0, 0.0
        for step in range(T + U):
            if step in labels:
                log_p += label_TU[t][u]
                u += 1
            else:
                log_p += blank_TL[t][u]
                t += 1
        assert (t, u) == (T, U)
        total += math.exp(log_p)
    return -math.log(total)


@pytest.mark.parametrize("shape", [(1, 0), (1, 3), (4, 0), (2, 1), (3, 2), (5, 4)])
def test_the_loss_sums_over_all_alignments(shape):
    blank_BTL, label_BTU = lattice(0, *shape)
    loss_B = example.rnnt_loss(blank_BTL, label_BTU)
    for b, loss in enumerate(loss_B.tolist()):
        arguments = blank_BTL[b].tolist(), label_BTU[b].tolist()
        assert loss == pytest.approx(enumerated_loss(*arguments), rel=1e-9)
        assert loss == pytest.approx(loop_loss(*arguments), rel=1e-9)


def test_the_loss_follows_the_loop_in_a_larger_lattice_and_in_float32():
    blank_BTL, label_BTU = lattice(1, 30, 12)
    expected = [
        loop_loss(a, b) for a, b in zip(blank_BTL.tolist(), label_BTU.tolist(), strict=True)
    ]
    assert example.rnnt_loss(blank_BTL, label_BTU).tolist() == pytest.approx(expected, rel=1e-9)
    single = example.rnnt_loss(blank_BTL.float(), label_BTU.float()).tolist()
    assert single == pytest.approx(expected, rel=1e-5)


def test_the_gradient_is_that_of_the_loss():
    blank_BTL, label_BTU = lattice(2, 4, 3, batch=2)
    inputs = blank_BTL.requires_grad_(), label_BTU.requires_grad_()
    assert torch.autograd.gradcheck(example.rnnt_loss, inputs)


def batch_of(num_tokens: int) -> tuple[example.Transducer, example.Batch]:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    tokens_VD = rng.standard_normal((num_tokens, example.D))
    return example.Transducer(num_tokens), example.speak(tokens_VD, example.B, rng)


def test_every_normalizer_is_estimated_without_bias():
    model, (frames_BTD, labels_BU) = batch_of(200)
    frames_BTD, labels_BU = frames_BTD[:2], labels_BU[:2]
    rng = np.random.default_rng(0)
    with torch.no_grad():
        logits_BTLV = 2 * model.output(model(frames_BTD, labels_BU))
        exact_BTL = logits_BTLV.exp().sum(3)
        estimates = []
        for _ in range(2000):
            sample = example.draw_sample(labels_BU, 200, 60, rng)
            estimates.append((logits_BTLV[..., sample.ids_S] - sample.log_q_S).exp().sum(3))
    ratio_BTL = torch.stack(estimates).mean(0) / exact_BTL
    torch.testing.assert_close(ratio_BTL, torch.ones_like(ratio_BTL), rtol=0, atol=0.02)


def test_labels_and_blank_keep_their_places_in_a_sample():
    _, (_, labels_BU) = batch_of(500)
    sample = example.draw_sample(labels_BU, 500, 100, np.random.default_rng(0))
    assert len(sample.ids_S) == 100
    assert sample.ids_S[0] == 0
    assert set(sample.ids_S[sample.own_S].tolist()) == {0, *labels_BU.flatten().tolist()}


def test_with_all_tokens_sampled_training_is_full_training():
    model, batch = batch_of(150)
    sample = example.draw_sample(batch[1], 150, 150, np.random.default_rng(0))
    gradients = []
    for choice in (None, sample):
        model.zero_grad()
        example.batch_loss(model, batch, choice).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for full, sampled in zip(*gradients, strict=True):
        torch.testing.assert_close(full, sampled, rtol=1e-5, atol=1e-7)
    full, sampled = example.train(150, None, 20), example.train(150, 150, 20)
    assert full == pytest.approx(sampled, rel=1e-4)
    assert full[1] < full[0] / 2


def test_the_memory_of_full_training_grows_with_the_tokens_and_that_of_sampled_does_not():
    full = [example.saved_bytes(V, None) for V in (200, 400, 800)]
    lattice_points = example.B * example.T * (example.U + 1)
    assert full[1] - full[0] == 200 * 4 * lattice_points
    assert full[2] - full[1] == 400 * 4 * lattice_points
    sampled = {example.saved_bytes(V, 100) for V in (1000, 8000)}
    assert len(sampled) == 1
    assert sampled.pop() < full[0]


def test_sampled_training_comes_close_to_full_training_and_the_correction_matters():
    before, full = example.train(1024, None, 100)
    _, sampled = example.train(1024, 128, 100)
    _, uncorrected = example.train(1024, 128, 100, correct=False)
    frequency = 1 / np.arange(1, 1024)
    frequency /= frequency.sum()
    # Whoever does not listen to the frames pays at least the entropy of the labels.
    assert sampled < -(frequency * np.log(frequency)).sum() < before / 3
    # Over five seeds: sampled is 10 to 12 % over full, uncorrected 14 to 16 %.
    assert full < sampled < 1.15 * full
    assert sampled < uncorrected


def test_the_table(capsys):
    example.main((100, 200), 80, 3)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows[2:]] == ["100", "200"]
    first, second = ([float(x.rstrip("%")) for x in row] for row in rows[2:])
    assert len(first) == 8
    assert first[-1] == second[-1] < first[-2] < second[-2]
