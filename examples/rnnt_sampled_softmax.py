"""Sampled softmax without images: an RNN-Transducer whose memory does not grow with its tokens.

An RNN-Transducer takes a softmax over V tokens at each of T frames times U + 1 label positions,
and training keeps it all: [B, T, U + 1, V]. Lee, Lee and Watanabe (2022, "Memory-Efficient
Training of RNN-Transducer with Sampled Softmax", arXiv 2203.16868) train with "only a small
subset of vocabulary": [B, T, U + 1, S]. (They also draw it from "distributions of auxiliary CTC
losses"; here it is drawn uniformly, once for a minibatch.)

Sampler and correction are fedss's: the blank and the minibatch's labels are own classes, the
others are drawn, and their logits get ``-log q``. One sample serves all points (t, u) of the
lattice, and at each the sum over it is an unbiased estimate of the normalizer over all V tokens.
Uncorrected, every normalizer is too small, the more so the larger V / S.

    python examples/rnnt_sampled_softmax.py          # under a minute; --quick: seconds

Made-up speech: a token is a random vector (frequencies by Zipf's law), an utterance is U tokens
of random durations under noise. All trainings of a row have the same first weights and the same
minibatches. Printed for each V:

- nats per label on held-out utterances, always under the full softmax: before training, after
  full, sampled and uncorrected training; ``over full`` is sampled / full - 1. Without listening
  to the frames none gets below the entropy of the labels, 4.8 to 6.1 nats;
- memory: the bytes that autograd keeps from the forward pass of one training step for its
  backward pass, each storage once, without parameters. Not in it: parameters, gradients and
  Adam's moments, [V, H] in every training, and what an operation needs only while it runs.

Sampled training keeps the same bytes for every V, full training keeps more with V. After the same
steps sampled training is 7 to 17 % above full training (one seed). Leaving the correction out
makes it a little better at V = 2 S, and worse at larger V.

Shape suffixes: B utterances, T frames, D size of a frame, U labels, L = U + 1 label positions,
H hidden size, V tokens (0 is the blank), P own tokens, M negatives, S tokens of a sample.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedss.losses.softmax import ClassSample
from fedss.sampling.samplers import class_sample, draw_uniform

B, T, U, D, H = 16, 8, 4, 32, 64
NOISE = 1.0
Batch = tuple[Tensor, Tensor]  # frames_BTD, labels_BU


class Transducer(nn.Module):
    """Encoder of frames, predictor from labels, and their joint: tanh of the sum."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self.lift = nn.Linear(D, H)
        self.encoder = nn.GRU(D, H, batch_first=True)
        self.embedding = nn.Embedding(num_tokens, H)
        self.predictor = nn.GRU(H, H, batch_first=True)
        self.output = nn.Linear(H, num_tokens)

    def forward(self, frames_BTD: Tensor, labels_BU: Tensor) -> Tensor:
        encoded_BTH = self.lift(frames_BTD) + self.encoder(frames_BTD)[0]
        predicted_BLH = self.predictor(self.embedding(F.pad(labels_BU, (1, 0))))[0]
        return torch.tanh(encoded_BTH[:, :, None] + predicted_BLH[:, None])


def rnnt_loss(blank_BTL: Tensor, label_BTU: Tensor) -> Tensor:
    """-log of the summed probability of all alignments (Graves 2012, arXiv 1211.3711), [B].

    ``a[t, u] = logaddexp(a[t-1, u] + blank[t-1, u], a[t, u-1] + label[t, u-1])``. With c[t, u] the
    sum of label[t, :u], the recursion over u is a cumulative sum: of exp(a[t-1] + blank[t-1] - c).

    Args:
        blank_BTL: log-probability of the blank at each point of the lattice.
        label_BTU: log-probability of the next label.
    """
    c_BTL = F.pad(label_BTU.cumsum(2), (1, 0))
    a_BL = c_BTL[:, 0]
    for t in range(1, c_BTL.shape[1]):
        a_BL = c_BTL[:, t] + (a_BL + blank_BTL[:, t - 1] - c_BTL[:, t]).logcumsumexp(1)
    return -(a_BL[:, -1] + blank_BTL[:, -1, -1])


def draw_sample(
    labels_BU: Tensor, num_tokens: int, sample_size: int, rng: np.random.Generator
) -> ClassSample:
    """Blank and labels of the minibatch, and others drawn uniformly: ``sample_size`` in all."""
    own_P = np.union1d([0], labels_BU.numpy())
    num_negatives = min(sample_size, num_tokens) - len(own_P)
    return class_sample(own_P, *draw_uniform(own_P, num_tokens, num_negatives, rng))


def batch_loss(model: Transducer, batch: Batch, sample: ClassSample | None = None) -> Tensor:
    """Nats per label, under the full softmax or corrected over a sample of the tokens."""
    frames_BTD, labels_BU = batch
    hidden_BTLH = model(frames_BTD, labels_BU)
    if sample is None:
        log_p = model.output(hidden_BTLH).log_softmax(3)
    else:
        rows_SH, bias_S = model.output.weight[sample.ids_S], model.output.bias[sample.ids_S]
        log_p = (F.linear(hidden_BTLH, rows_SH, bias_S) - sample.log_q_S).log_softmax(3)
        labels_BU = torch.searchsorted(sample.ids_S, labels_BU)  # the blank, smallest, stays 0
    index = labels_BU[:, None, :, None].expand(-1, log_p.shape[1], -1, 1)
    loss_B = rnnt_loss(log_p[..., 0], log_p[:, :, :-1].gather(3, index)[..., 0])
    return loss_B.mean() / labels_BU.shape[1]


def saved_bytes(num_tokens: int, sample_size: int | None) -> int:
    """Bytes that autograd keeps for the backward pass, each storage once, without parameters."""
    model, rng = Transducer(num_tokens), np.random.default_rng(0)
    batch = speak(rng.standard_normal((num_tokens, D)), B, rng)
    sample = sample_size and draw_sample(batch[1], num_tokens, sample_size, rng)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = batch_loss(model, batch, sample or None)  # holds all that is kept
    del loss
    return sum(size for storage, size in kept.items() if storage not in parameters)


def speak(tokens_VD: np.ndarray, num_utterances: int, rng: np.random.Generator) -> Batch:
    """Made-up utterances: U tokens each, in T frames."""
    weight = 1 / (1 + np.arange(len(tokens_VD) - 1))
    labels_BU = 1 + rng.choice(len(weight), (num_utterances, U), p=weight / weight.sum())
    starts_BU = np.zeros_like(labels_BU)
    starts_BU[:, 1:] = rng.permuted(np.tile(np.arange(1, T), (num_utterances, 1)), axis=1)[:, 1:U]
    place_BT = (np.arange(T)[:, None] >= starts_BU[:, None]).sum(2) - 1
    frames_BTD = tokens_VD[np.take_along_axis(labels_BU, place_BT, 1)]
    frames_BTD = frames_BTD + NOISE * rng.standard_normal(frames_BTD.shape)
    return torch.from_numpy(frames_BTD).float(), torch.from_numpy(labels_BU)


def train(
    num_tokens: int, sample_size: int | None, steps: int, *, correct: bool = True, seed: int = 0
) -> tuple[float, float]:
    """Held-out loss under the full softmax, before and after training with a sample or in full."""
    torch.manual_seed(seed)
    model = Transducer(num_tokens)
    data_rng, sample_rng = np.random.default_rng([seed, 0]), np.random.default_rng([seed, 1])
    tokens_VD = data_rng.standard_normal((num_tokens, D))
    held_out = speak(tokens_VD, 128, data_rng)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    with torch.no_grad():
        before = batch_loss(model, held_out).item()
    for _ in range(steps):
        batch, sample = speak(tokens_VD, B, data_rng), None
        if sample_size is not None:
            sample = draw_sample(batch[1], num_tokens, sample_size, sample_rng)
            if not correct:
                sample = replace(sample, log_q_S=torch.zeros_like(sample.log_q_S))
        optimizer.zero_grad()
        batch_loss(model, batch, sample).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return before, batch_loss(model, held_out).item()


def main(tokens: Sequence[int] = (512, 2048, 4096), size: int = 256, steps: int = 300) -> None:
    print(f"S = {size}, {steps} steps; nats per label on held-out utterances; memory in MB")
    columns = ["V", "start", "full", "sampled", "over full", "uncorrected", "full MB", "sampled MB"]
    print("".join(name.rjust(12) for name in columns))
    for V in tokens:
        start, full = train(V, None, steps)
        sampled, uncorrected = train(V, size, steps)[1], train(V, size, steps, correct=False)[1]
        print(f"{V:12}{start:12.2f}{full:12.3f}{sampled:12.3f}{sampled / full - 1:12.1%}", end="")
        memory = [saved_bytes(V, None) / 1e6, saved_bytes(V, size) / 1e6]
        print(f"{uncorrected:12.3f}{memory[0]:12.2f}{memory[1]:12.2f}", flush=True)


if __name__ == "__main__":
    quick = "--quick" in sys.argv[1:]
    main((256, 1024), 128, 100) if quick else main()
