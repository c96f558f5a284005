"""The maths of sampled softmax: class samples, corrected logits, objectives, margins.

Shape suffixes: B images of a batch, D embedding size, P own classes, M negatives,
S classes of a class sample (S = P + M).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from fedss.choices import MarginKind


@dataclass(frozen=True)
class ClassSample:
    """The classes a client works with in one round. It stays on the client; only ids are sent.

    Attributes:
        ids_S: int64 [S], sorted, unique class ids.
        log_q_S: float32 [S], log of each class's inclusion probability; 0 for own classes.
        own_S: bool [S], True for own classes. (A negative may have q = 1, too.)
    """

    ids_S: Tensor
    log_q_S: Tensor
    own_S: Tensor


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
        correction: a in ``o_i - a log q_i`` for negatives: 1 corrects for sampling, 0 does not,
            between them a tempered correction (ours) weighs negatives by ``q^-a``.
    """

    scale: float = 10.0
    margin_kind: MarginKind = "none"
    margin: float = 0.0
    correction: float = 1.0


def logits(h_BD: Tensor, rows_SD: Tensor, target_B: Tensor, scoring: Scoring) -> Tensor:
    """``o_BS = s * cos(h_b, w_i)``, with the margin applied to each image's own label.

    Embeddings are of norm 1, class rows of any; a row of zeros has cosine 0 with everything.
    ``target_B``, int64, has each image's label as a position in S.
    """
    cos_BS = h_BD @ F.normalize(rows_SD, dim=1).T
    if scoring.margin_kind == "none":
        return scoring.scale * cos_BS
    m, cos_B1 = scoring.margin, cos_BS.gather(1, target_B[:, None])
    with_margin_B1 = cos_B1 - m
    if scoring.margin_kind == "arcface":
        # The square root has no gradient at 0, where the image lies on its class row.
        sin_B1 = (1 - cos_B1.square()).clamp_min(1e-12).sqrt()
        turned_B1 = cos_B1 * math.cos(m) - sin_B1 * math.sin(m)
        beyond_B1 = cos_B1 - m * math.sin(m)
        with_margin_B1 = torch.where(cos_B1 > -math.cos(m), turned_B1, beyond_B1)
    return scoring.scale * cos_BS.scatter(1, target_B[:, None], with_margin_B1)


@dataclass(frozen=True)
class AbsentClasses:
    """What is known to a client of the n - |S| class rows that it does not hold: their ``count``,
    mean, float32 [D], and covariance (divided by ``count``), float32 [D, D].
    """

    count: int
    mean_D: Tensor
    covariance_DD: Tensor


Objective = Callable[[Tensor, Tensor, Tensor, ClassSample, Scoring, AbsentClasses | None], Tensor]
"""``objective(h_BD, rows_SD, target_B, sample, scoring, absent)``: one loss per image, [B].

Arguments as for :func:`sampled_softmax`. ``absent`` is None for methods that do not use it, and
where no class is absent. A client takes the mean of a batch and differentiates it with respect to
``h_BD`` and ``rows_SD``; a loss of your own (:func:`fedss.train`) must have gradients for both, and
draw no random numbers."""


def sampled_softmax(
    h_BD: Tensor,
    rows_SD: Tensor,
    target_B: Tensor,
    sample: ClassSample,
    scoring: Scoring,
    absent: AbsentClasses | None = None,
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
        absent: not used.

    Returns:
        The loss of each image, [B].

    Example:
        >>> own_S = torch.tensor([False, True, False])
        >>> everything = ClassSample(torch.arange(3), torch.zeros(3), own_S)
        >>> h, W = F.normalize(torch.randn(2, 4), dim=1), torch.eye(3, 4)
        >>> loss = sampled_softmax(h, W, torch.tensor([1, 1]), everything, Scoring(scale=10.0))
        >>> torch.equal(loss, F.cross_entropy(10 * h @ W.T, torch.tensor([1, 1]), reduction="none"))
        True
    """
    o_BS = logits(h_BD, rows_SD, target_B, scoring) - scoring.correction * sample.log_q_S
    return F.cross_entropy(o_BS, target_B, reduction="none")


def uncorrected_softmax(
    h_BD: Tensor,
    rows_SD: Tensor,
    target_B: Tensor,
    sample: ClassSample,
    scoring: Scoring,
    absent: AbsentClasses | None = None,
) -> Tensor:
    """:func:`sampled_softmax` without ``-log q``: what the correction is worth (ablation)."""
    return sampled_softmax(h_BD, rows_SD, target_B, sample, replace(scoring, correction=0.0))


def negatives_only_softmax(
    h_BD: Tensor,
    rows_SD: Tensor,
    target_B: Tensor,
    sample: ClassSample,
    scoring: Scoring,
    absent: AbsentClasses | None = None,
) -> Tensor:
    """Each label against the negatives alone: the other own classes are left out of the sum.

    ``L = -o_y + log(exp(o_y) + sum_{i in N} exp(o_i - log q_i))`` (the NegOnly baseline of
    Waghmare et al. 2022). Arguments and result as for :func:`sampled_softmax`.
    """
    o_BS = logits(h_BD, rows_SD, target_B, scoring) - scoring.correction * sample.log_q_S
    other_own_BS = sample.own_S & ~F.one_hot(target_B, o_BS.shape[1]).bool()
    return F.cross_entropy(o_BS.masked_fill(other_own_BS, -math.inf), target_B, reduction="none")


def moments_softmax(
    h_BD: Tensor,
    rows_SD: Tensor,
    target_B: Tensor,
    sample: ClassSample,
    scoring: Scoring,
    absent: AbsentClasses | None = None,
) -> Tensor:
    """Softmax cross-entropy where one virtual logit stands for all absent classes.

    ``L = -o_y + log(sum_{i in S} exp(o_i) + exp(v))``,
    ``v = log(count) + s mean'h + s^2/2 h' covariance h``: for rows ``w ~ N(mean, covariance)``
    the mean of ``exp(s w'h)`` is ``exp(s mean'h + s^2/2 h' covariance h)`` (the moment generating
    function of a Gaussian), so ``exp(v)`` is what absent classes add to the partition function if
    their rows are Gaussian. All classes of the sample count in full, own or not: ``log q`` is not
    used. With no absent class it is the full softmax. (Ours; ``docs/methods.md`` has what came
    before.)

    Args and result as for :func:`sampled_softmax`; ``absent`` carries gradients.
    """
    o_BS = logits(h_BD, rows_SD, target_B, scoring)
    if absent is not None:
        s, mean_B = scoring.scale, h_BD @ absent.mean_D
        variance_B = ((h_BD @ absent.covariance_DD) * h_BD).sum(dim=1)
        v_B = math.log(absent.count) + s * mean_B + s**2 / 2 * variance_B
        o_BS = torch.cat([o_BS, v_B[:, None]], dim=1)
    return F.cross_entropy(o_BS, target_B, reduction="none")


def completed_softmax(
    h_BD: Tensor,
    rows_SD: Tensor,
    target_B: Tensor,
    sample: ClassSample,
    scoring: Scoring,
    absent: AbsentClasses | None = None,
) -> Tensor:
    """:func:`moments_softmax` over a class sample, its rows moved as by :func:`sampled_softmax`.

    Under :func:`sampled_softmax` negatives have two jobs, which come apart here. *The sum:* there
    each stands for ``1/q_i`` classes, a noisy estimate where few stand for very many. Here each
    counts once, and the moments of all absent classes stand for these. *The rows:* a negative is
    held with probability ``q_i``, so the gradient of its row is divided by ``q_i``, as there. With
    pi the probabilities of :func:`moments_softmax`, v its virtual logit, and rows of length 1::

        dL/dh   = -s w_y + sum_{i in S} pi_i s w_i + pi_v dv/dh
        dL/dw_i = (pi_i - [i = y]) s h      for own classes
        dL/dw_i = pi_i s h / q_i^a          for negatives, a = ``scoring.correction``

    So over the draws a row is pushed about as under the full softmax, and embeddings are trained
    without the noise of the draw. With all classes in the sample this is the full softmax; where
    ``absent`` is None it is :func:`sampled_softmax`. (Ours; ``docs/methods.md`` has figures.)

    Args and result as for :func:`moments_softmax`.
    """
    if absent is None:
        return sampled_softmax(h_BD, rows_SD, target_B, sample, scoring)
    held_SD, weight_S = rows_SD.detach(), torch.exp(-scoring.correction * sample.log_q_S)
    rows_SD = held_SD + weight_S[:, None] * (rows_SD - held_SD)
    return moments_softmax(h_BD, rows_SD, target_B, sample, scoring, absent)


POSITIVE_HINGE = 0.9
"""Cosine from which the positive-only loss is satisfied (Yu et al. 2020)."""


def positive_hinge(h_BD: Tensor, rows_SD: Tensor, target_B: Tensor, *_: object) -> Tensor:
    """Squared hinge on the label's cosine alone: ``L = max(0, 0.9 - cos(h, w_y))^2``.

    The client's part of FedAwS (Yu et al. 2020, arXiv 2004.10342); the server's part keeps the
    class rows apart. Sample and scoring are not used: the loss is stated in cosines.
    Arguments and result as for :func:`sampled_softmax`.
    """
    cos_BS = h_BD @ F.normalize(rows_SD, dim=1).T
    return (POSITIVE_HINGE - cos_BS.gather(1, target_B[:, None])[:, 0]).clamp_min(0).square()


def spread_out(rows_ND: Tensor, *, margin: float, neighbours: int, block: int = 1024) -> Tensor:
    """Gradient of FedAwS's regularizer that keeps class rows apart (Yu et al. 2020, section 4).

    ``R(W) = sum_i sum_{j in the k nearest of i} max(0, margin - d_ij)^2``,
    ``d_ij = 1 - cos(w_i, w_j)``, over each row's ``neighbours`` nearest others (their stochastic
    negative mining, taken over all rows). O(n^2 D) time, O(block n) memory.

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


def spread_out_step(
    rows_ND: Tensor,
    *,
    spread_out_weight: float,
    spread_out_margin: float,
    spread_out_neighbours: int,
) -> Tensor:
    """FedAwS's server step after a round, on every row: ``W - weight dR/dW``, [N, D]."""
    gradient_ND = spread_out(rows_ND, margin=spread_out_margin, neighbours=spread_out_neighbours)
    return rows_ND - spread_out_weight * gradient_ND
