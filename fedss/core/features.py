"""Before the first round: sums over clients' features, for a start that loses nothing.

Every client sends one message about what the pretrained backbone gives for its images. Of these
the server makes the whitening of features (:class:`fedss.models.Whitening`) and, if wanted, the
first class rows: the mean of a class's whitened features, scaled to length 1.

Shape suffixes: N the client's images, P its own classes, F features, K whitened numbers, R rows of
a factor, U classes of all clients, D embedding size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fedss.models.whitening import whitening_axes

SHRINKAGE = 0.1
"""Of the whitening, see :func:`fedss.models.whitening_axes`."""


@dataclass(frozen=True)
class FeatureSums:
    """What a client tells of its features, each of length 1.

    Attributes:
        factor_RF: float32, upper triangular, ``factor' factor = sum of f f'``; R = min(N, F).
            It tells what that sum of [F, F] tells, in fewer bytes where N < F.
        ids_P: int64, own classes, sorted; empty where class rows are not to begin with means.
        counts_P: int64, images by own class, or in all.
        sums_PF: float32, sums of f by own class, or over all images.
    """

    factor_RF: Tensor
    ids_P: Tensor
    counts_P: Tensor
    sums_PF: Tensor


def feature_sums(features_NF: Tensor, label_N: Tensor, by_class: bool) -> FeatureSums:
    """At the client: the sums over its images' features; labels are class ids, int64."""
    # Features that are all the same are to be told from those that hardly differ.
    unit_NF = F.normalize(features_NF.double(), dim=1)
    factor_RF = torch.linalg.qr(unit_NF, mode="r").R.float()
    if not by_class:
        count_1 = torch.tensor([len(unit_NF)])
        return FeatureSums(
            factor_RF, torch.empty(0, dtype=torch.int64), count_1, unit_NF.sum(0).float()[None]
        )
    ids_P, place_N, counts_P = torch.unique(label_N, return_inverse=True, return_counts=True)
    sums_PF = torch.zeros(len(ids_P), unit_NF.shape[1], dtype=torch.float64)
    sums_PF.index_add_(0, place_N, unit_NF)
    return FeatureSums(factor_RF, ids_P, counts_P, sums_PF.float())


@dataclass(frozen=True)
class WarmStart:
    """What the server makes of all sums.

    Attributes:
        mean_F, axes_FK: float32, of :class:`fedss.models.Whitening`; :func:`rounded`.
        ids_U: int64, classes whose first rows are known; sorted.
        rows_UD: float32, these rows, of length 1.
    """

    mean_F: Tensor
    axes_FK: Tensor
    ids_U: Tensor
    rows_UD: Tensor


def rounded(numbers: Tensor) -> Tensor:
    """Numbers as they travel, float32: in float16, as parts of the largest of them."""
    largest = numbers.abs().max().float().clamp_min(1e-30)
    return (numbers.float() / largest).half().float() * largest


def warm_start(sums: Sequence[FeatureSums], size: int, dim: int) -> WarmStart:
    """At the server: whitening and class rows, from the sums of clients in the order of their ids.

    Summed in float64, one client after another, so that they are the same wherever clients are.

    Args:
        sums: one or more.
        size: K, how many axes whitened features have.
        dim: D, the embedding size; at least K.
    """
    features = sums[0].factor_RF.shape[1]
    second_FF = torch.zeros(features, features, dtype=torch.float64)
    mean_F, count = torch.zeros(features, dtype=torch.float64), 0
    for of_client in sums:
        factor_RF = of_client.factor_RF.double()
        second_FF += factor_RF.T @ factor_RF
        mean_F += of_client.sums_PF.double().sum(0)
        count += int(of_client.counts_P.sum())
    second_FF, mean_F = second_FF / count, mean_F / count
    axes_FK = torch.zeros(features, size, dtype=torch.float64)
    # Clients sum in float32.
    found_FK = whitening_axes(second_FF, mean_F, size, SHRINKAGE, rounding=1e-7)
    axes_FK[:, : found_FK.shape[1]] = found_FK
    # They travel in this precision: all parties are to compute with the same numbers.
    mean_F, axes_FK = rounded(mean_F), rounded(axes_FK)
    ids_U = torch.unique(torch.cat([of_client.ids_P for of_client in sums]))
    sums_UF = torch.zeros(len(ids_U), features, dtype=torch.float64)
    counts_U = torch.zeros(len(ids_U), dtype=torch.float64)
    for of_client in sums if len(ids_U) else ():
        place_P = torch.searchsorted(ids_U, of_client.ids_P)
        sums_UF.index_add_(0, place_P, of_client.sums_PF.double())
        counts_U.index_add_(0, place_P, of_client.counts_P.double())
    z_UK = (sums_UF / counts_U[:, None] - mean_F.double()) @ axes_FK.double()
    rows_UD = torch.zeros(len(ids_U), dim)
    rows_UD[:, : axes_FK.shape[1]] = F.normalize(z_UK, dim=1).float()
    told_U = rows_UD.abs().sum(1) > 0  # a class whose mean is that of all has no direction
    return WarmStart(mean_F, axes_FK, ids_U[told_U], rows_UD[told_U])
