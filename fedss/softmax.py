"""The maths of sampled softmax: class samples, inclusion probabilities, objectives, margins.

Shape suffixes: B pictures of a batch, D embedding size, P own classes, M negatives,
S classes of a class sample (S = P + M).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

MarginKind = Literal["none", "cosface", "arcface"]


@dataclass(frozen=True)
class ClassSample:
    """The classes a client works with in one round. It stays on the client; only ids are sent.

    Attributes:
        ids_S: int64 [S], sorted, unique class ids.
        log_q_S: float32 [S], log of each class's inclusion probability; 0 for own classes.
        own_S: bool [S], True for own classes. (A negative may have q = 1 too, so ``log_q_S``
            alone does not tell them apart.)
    """

    ids_S: Tensor
    log_q_S: Tensor
    own_S: Tensor


Sampler = Callable[[np.ndarray, int, int, np.random.Generator], ClassSample]
"""``sampler(own_P, num_classes, sample_size, rng)``: the classes a client owns (int64, sorted,
unique) to its class sample. It may draw at the client or at the server. If the client owns more
classes than the sample may hold, a random part of them counts as own in this round."""


def own_budget(sample_size: int, num_classes: int) -> int:
    """How many own classes a client may bring to a class sample of ``sample_size``.

    At least an eighth of the sample, and at least one class, is left for negatives: with fewer,
    the few negatives stand for all other classes and their weight 1/q makes the estimate of the
    partition function very noisy. A sample of all classes has no such limit. (Ours.)
    """
    if sample_size >= num_classes:
        return num_classes
    return sample_size - math.ceil(sample_size / 8)


def sample_uniform(
    own_P: np.ndarray, num_classes: int, sample_size: int, rng: np.random.Generator
) -> ClassSample:
    """Own classes, and negatives drawn uniformly without replacement from all the others.

    ``q_i = m / (n - |P|)`` for each of the ``m = min(sample_size, n) - |P|`` negatives
    (Waghmare et al. 2022, arXiv 2203.04888, section 3). With more own classes than
    :func:`own_budget`, a random part of them is own and all others may be negatives.
    O(S log S) time and O(S) memory, whatever n is.

    Args:
        own_P: int64, sorted, unique class ids.
        num_classes: n.
        sample_size: |S|, at least 2.
        rng: generator of this draw.
    """
    own_P = _limit(own_P, own_budget(sample_size, num_classes), rng)
    return _with_negatives(own_P, num_classes, min(sample_size, num_classes) - len(own_P), rng)


def sample_all(
    own_P: np.ndarray, num_classes: int, sample_size: int, rng: np.random.Generator
) -> ClassSample:
    """All n classes: the full softmax. ``sample_size`` and ``rng`` do not matter."""
    return _with_negatives(own_P, num_classes, num_classes - len(own_P), rng)


def sample_own(
    own_P: np.ndarray, num_classes: int, sample_size: int, rng: np.random.Generator
) -> ClassSample:
    """Own classes alone, at most ``sample_size`` of them, and no negatives."""
    return _with_negatives(_limit(own_P, sample_size, rng), num_classes, 0, rng)


def _limit(own_P: np.ndarray, budget: int, rng: np.random.Generator) -> np.ndarray:
    if len(own_P) <= budget:
        return own_P
    return np.sort(rng.choice(own_P, budget, replace=False))


def _with_negatives(
    own_P: np.ndarray, num_classes: int, num_negatives: int, rng: np.random.Generator
) -> ClassSample:
    num_others = num_classes - len(own_P)
    rank_M = np.sort(rng.choice(num_others, num_negatives, replace=False, shuffle=False))
    # own_P[j] - j other classes lie below own class j, so a rank passes exactly the own classes
    # with no more others below them than the rank.
    negative_M = rank_M + np.searchsorted(own_P - np.arange(len(own_P)), rank_M, side="right")
    log_q = math.log(num_negatives / num_others) if num_negatives else 0.0
    ids = np.concatenate([own_P, negative_M])
    order = np.argsort(ids)
    own_S = order < len(own_P)
    return ClassSample(
        torch.from_numpy(ids[order]),
        torch.from_numpy(np.where(own_S, 0.0, log_q).astype(np.float32)),
        torch.from_numpy(own_S),
    )


@dataclass(frozen=True)
class Scoring:
    """How cosines become logits: ``o_i = scale * cos(h, w_i)``, with a margin on the label.

    Attributes:
        scale: s, the inverse temperature.
        margin_kind: ``"cosface"`` (Wang et al. 2018, arXiv 1801.09414, eq. 4):
            ``o_y = s (cos a - m)``; ``"arcface"`` (Deng et al. 2019, arXiv 1801.07698, eq. 3):
            ``o_y = s cos(a + m)``, and beyond ``a = pi - m``, where that would rise again,
            ``s (cos a - m sin m)`` as in its authors' code; ``"none"``.
        margin: m, in cosine for CosFace, in radians for ArcFace.
        correction: a in ``o_i - a log q_i`` for negatives: 1 corrects for sampling, 0 does not.
    """

    scale: float = 10.0
    margin_kind: MarginKind = "none"
    margin: float = 0.0
    correction: float = 1.0


def logits(h_BD: Tensor, rows_SD: Tensor, target_B: Tensor, scoring: Scoring) -> Tensor:
    """``o_BS = s * cos(h_b, w_i)``, with the margin applied to each picture's own label.

    Args:
        h_BD: unit-norm embeddings.
        rows_SD: class rows of any norm; a row of zeros has cosine 0 with everything.
        target_B: int64, each picture's label as a position in S.
        scoring: scale and margin.
    """
    cos_BS = h_BD @ F.normalize(rows_SD, dim=1).T
    if scoring.margin_kind != "none":
        m = scoring.margin
        cos_B1 = cos_BS.gather(1, target_B[:, None])
        if scoring.margin_kind == "cosface":
            with_margin_B1 = cos_B1 - m
        else:
            # The square root has no gradient at 0, where the picture lies on its class row.
            sin_B1 = (1 - cos_B1.square()).clamp_min(1e-12).sqrt()
            with_margin_B1 = torch.where(
                cos_B1 > -math.cos(m),
                cos_B1 * math.cos(m) - sin_B1 * math.sin(m),
                cos_B1 - m * math.sin(m),
            )
        cos_BS = cos_BS.scatter(1, target_B[:, None], with_margin_B1)
    return scoring.scale * cos_BS


Objective = Callable[[Tensor, Tensor, Tensor, ClassSample, Scoring], Tensor]
"""``objective(h_BD, rows_SD, target_B, sample, scoring)``: one loss per picture, [B]."""


def sampled_softmax(
    h_BD: Tensor, rows_SD: Tensor, target_B: Tensor, sample: ClassSample, scoring: Scoring
) -> Tensor:
    """Softmax cross-entropy over a class sample, corrected for how its negatives were drawn.

    ``L = -o_y + log sum_{i in S} exp(o'_i)``, ``o'_i = o_i`` for own classes and
    ``o'_i = o_i - log q_i`` for negatives (Waghmare et al. 2022, arXiv 2203.04888, section 3).
    The sum is an unbiased estimate of the full partition function; its logarithm, and so the
    loss and its gradient, are not. With all classes in the sample this is the full softmax, with
    own classes alone it is the softmax over own classes.

    Args:
        h_BD: unit-norm embeddings.
        rows_SD: class rows of the sample.
        target_B: int64, position of each label in the sample; labels are own classes.
        sample: the class sample.
        scoring: scale, margin, and ``correction`` (0 leaves ``log q`` out).

    Returns:
        The loss of each picture, [B].

    Example:
        >>> everything = sample_all(np.array([1]), 3, 3, np.random.default_rng(0))
        >>> h, W = F.normalize(torch.randn(2, 4), dim=1), torch.eye(3, 4)
        >>> loss = sampled_softmax(h, W, torch.tensor([1, 1]), everything, Scoring(scale=10.0))
        >>> torch.equal(loss, F.cross_entropy(10 * h @ W.T, torch.tensor([1, 1]), reduction="none"))
        True
    """
    o_BS = logits(h_BD, rows_SD, target_B, scoring) - scoring.correction * sample.log_q_S
    return F.cross_entropy(o_BS, target_B, reduction="none")


def uncorrected_softmax(
    h_BD: Tensor, rows_SD: Tensor, target_B: Tensor, sample: ClassSample, scoring: Scoring
) -> Tensor:
    """:func:`sampled_softmax` without ``-log q``: what the correction is worth (ablation)."""
    return sampled_softmax(h_BD, rows_SD, target_B, sample, replace(scoring, correction=0.0))


def negatives_only_softmax(
    h_BD: Tensor, rows_SD: Tensor, target_B: Tensor, sample: ClassSample, scoring: Scoring
) -> Tensor:
    """Each label against the negatives alone: the other own classes are left out of the sum.

    ``L = -o_y + log(exp(o_y) + sum_{i in N} exp(o_i - log q_i))`` (the NegOnly baseline of
    Waghmare et al. 2022). Arguments and result as for :func:`sampled_softmax`.
    """
    o_BS = logits(h_BD, rows_SD, target_B, scoring) - scoring.correction * sample.log_q_S
    label_BS = F.one_hot(target_B, o_BS.shape[1]).bool()
    return F.cross_entropy(
        o_BS.masked_fill(sample.own_S & ~label_BS, -math.inf), target_B, reduction="none"
    )


POSITIVE_HINGE = 0.9
"""Cosine from which the positive-only loss is satisfied (Yu et al. 2020)."""


def positive_hinge(
    h_BD: Tensor, rows_SD: Tensor, target_B: Tensor, sample: ClassSample, scoring: Scoring
) -> Tensor:
    """Squared hinge on the label's cosine alone: ``L = max(0, 0.9 - cos(h, w_y))^2``.

    The client's part of FedAwS (Yu et al. 2020, arXiv 2004.10342); the server's part keeps the
    class rows apart. ``scoring`` is not used: the loss is stated in cosines.
    Arguments and result as for :func:`sampled_softmax`.
    """
    cos_BS = h_BD @ F.normalize(rows_SD, dim=1).T
    return (POSITIVE_HINGE - cos_BS.gather(1, target_B[:, None])[:, 0]).clamp_min(0).square()


def spread_out(rows_ND: Tensor, *, margin: float, neighbours: int, block: int = 1024) -> Tensor:
    """Gradient of FedAwS's regulariser that keeps class rows apart (Yu et al. 2020, section 4).

    ``R(W) = sum_i sum_{j in the k nearest of i} max(0, margin - d_ij)^2``,
    ``d_ij = 1 - cos(w_i, w_j)``, over each row's ``neighbours`` nearest others (their stochastic
    negative mining, taken over all rows). O(n^2 D) time, O(block n) memory: this is the one
    server step whose cost grows with n.

    Returns:
        dR/dW, [N, D].
    """
    rows_ND = rows_ND.detach().clone().requires_grad_()
    for start in range(0, len(rows_ND), block):
        unit_ND = F.normalize(rows_ND, dim=1)
        cos_BN = unit_ND[start : start + block] @ unit_ND.T
        self_B = torch.arange(start, start + len(cos_BN))
        cos_BN = cos_BN.scatter(1, self_B[:, None], -2.0)
        nearest_BK = cos_BN.topk(min(neighbours, len(rows_ND) - 1), dim=1).values
        (margin - (1 - nearest_BK)).clamp_min(0).square().sum().backward()  # type: ignore[no-untyped-call]
    assert rows_ND.grad is not None
    return rows_ND.grad
