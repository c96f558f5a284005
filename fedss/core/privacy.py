"""What one client can change in a round: bounded by clipping, and hidden in noise.

The update of client k is one vector: the change of the backbone, and those of its class rows. It is
scaled to a norm of C at most, where it is made, and again where it is added up. For differential
privacy (:attr:`Clipping.private`) all clients weigh the same and send changes of the same rows, and
a round's step is made of

    ``(sum_k clip(delta_k) + N(0, (z C)^2 I)) / K``

with the noise multiplier z and the *expected* cohort size K: how many clients there were remains
untold. What is made of it, the server optimizer's state included, is as private as the sum.

An adaptive C follows the median norm (Andrew et al. 2021, arXiv 1905.03871, algorithm 1): each
client tells whether its norm was within C, and

    ``C <- C exp(-0.2 (b - 1/2))``,  ``b = 1/2 + (sum_k (b_k - 1/2) + N(0, s_b^2)) / K``.

Shape suffixes: P backbone parameters, R rows that all clients of a round send, D embedding size.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedss.seeds import secret_normals

_RATE = 0.2  # of the adaptive norm
_TARGET = 0.5  # share of the norms that it is to be above


@dataclass(frozen=True)
class Clipping:
    """How a client's update is bounded before it is sent.

    Attributes:
        norm: the largest norm; the first round's where it is ``adaptive``.
        adaptive: clients tell whether they were within it.
        row_norm: that of the class rows alone; ``norm`` is then the backbone's.
        private: noise follows, so nothing that it does not cover is sent: not how many images
            there were, nor the loss.
    """

    norm: float
    adaptive: bool = False
    row_norm: float | None = None
    private: bool = False


Changes = tuple[Tensor, Tensor]
"""The changes of the backbone and of class rows."""


def clip_parts(parts: Changes, clipping: Clipping, norm: float) -> tuple[Changes, bool]:
    """A client's vector, scaled to ``norm`` at most, and whether it was within it.

    With :attr:`Clipping.row_norm` its parts are two vectors, each of a norm of its own. A private
    one that is not finite becomes zero: that a run ends would tell of its client.
    """
    squares = [float(part.double().square().sum()) for part in parts]
    lengths, norms = [math.sqrt(sum(squares))] * 2, (norm, norm)
    if clipping.row_norm is not None:
        lengths, norms = [math.sqrt(square) for square in squares], (norm, clipping.row_norm)
    backbone_P, rows_SD = (
        _scaled(*of_part, clipping.private) for of_part in zip(parts, lengths, norms, strict=True)
    )
    within = all(length <= bound for length, bound in zip(lengths, norms, strict=True))
    return (backbone_P, rows_SD), within


def _scaled(part: Tensor, length: float, bound: float, private: bool) -> Tensor:
    if private and not math.isfinite(length):
        return torch.zeros_like(part)
    return part * (bound / length) if length > bound else part


@dataclass(frozen=True)
class Noise:
    """What the server hides a client's part in.

    Attributes:
        multiplier: z, of all that a round tells together.
        cohort_size: K, expected.
        key: what noise and cohorts are keyed by; None: whoever knows the seed knows them.
    """

    multiplier: float
    cohort_size: int
    key: bytes | None = None

    @property
    def of_count(self) -> float:
        """``s_b``: K / 20 as in the paper, but never so small that it would need most of z."""
        return max(self.cohort_size / 20, self.multiplier)

    def of_sum(self, clipping: Clipping) -> float:
        """``z`` for the sum of vectors: larger where a count is told, too, so that both together
        spend what z alone would, ``(z^-2 - (2 s_b)^-2)^(-1/2)``."""
        if not clipping.adaptive:
            return self.multiplier
        return 1 / math.sqrt(self.multiplier**-2 - (2 * self.of_count) ** -2)


def noised(
    parts: Changes, noise: Noise, clipping: Clipping, norm: float, seed: int, round: int
) -> Changes:
    """The mean changes of a round, sums divided by K, in noise; float32.

    Two vectors, each of a norm of its own, are one of norm ``sqrt(2)`` in units of these: each gets
    ``sqrt(2)`` times the noise.
    """
    deviation = noise.of_sum(clipping) / noise.cohort_size
    norms = norm, norm
    if clipping.row_norm is not None:
        norms = math.sqrt(2) * norm, math.sqrt(2) * clipping.row_norm
    count = sum(part.numel() for part in parts)
    normals = torch.from_numpy(secret_normals(seed, "noise", round, count, noise.key))
    of_parts = torch.split(normals, [part.numel() for part in parts])
    backbone_P, rows_RD = (
        (part.double() + deviation * bound * of_part.view(part.shape)).float()
        for part, bound, of_part in zip(parts, norms, of_parts, strict=True)
    )
    return backbone_P, rows_RD


def next_norm(
    norm: float, within: int, count: int, noise: Noise | None, seed: int, round: int
) -> float:
    """The adaptive norm of the next round; of ``count`` updates so many were within this one."""
    told, cohort_size = within - count / 2, max(count, 1)
    if noise is not None:
        normals = secret_normals(seed, "count noise", round, 1, noise.key)
        told, cohort_size = told + noise.of_count * float(normals[0]), noise.cohort_size
    return norm * math.exp(-_RATE * (0.5 + told / cohort_size - _TARGET))
