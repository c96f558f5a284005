"""The whitening and the first class rows that clients' sums give are those of pooled features."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from fedss.core.features import SHRINKAGE, feature_sums, warm_start


def made(images: int, features: int, classes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(images, features)) @ rng.normal(size=(features, features)) + 1.0
    return torch.from_numpy(mixed).float(), torch.from_numpy(rng.integers(0, classes, images))


@given(st.integers(1, 5), st.integers(0, 1000))
def test_sums_over_clients_are_those_of_pooled_features(clients: int, seed: int) -> None:
    features_NF, label_N = made(60, 6, 4, seed)
    part_N = torch.arange(60) % clients
    sums = [
        feature_sums(features_NF[part_N == k], label_N[part_N == k], True) for k in range(clients)
    ]
    start = warm_start(sums, 4, 5)
    unit = F.normalize(features_NF, dim=1).double().numpy()
    centred = unit - unit.mean(0)
    whitened = (unit - start.mean_F.numpy()) @ start.axes_FK.double().numpy()
    # The oracle: an SVD of the pooled features.
    variances = np.linalg.svd(centred, compute_uv=False) ** 2 / 60
    shrunk = variances[:4] / (variances[:4] + SHRINKAGE * variances.mean())
    covariance = np.cov(whitened.T, bias=True)
    assert np.allclose(covariance, np.diag(shrunk) * 4 / shrunk.sum(), atol=0.02)
    assert np.allclose(np.trace(whitened.T @ whitened) / 60, 4, rtol=0.01)
    expected = np.stack([whitened[label_N.numpy() == c].mean(0) for c in start.ids_U.tolist()])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert start.ids_U.tolist() == sorted(set(label_N.tolist()))
    assert np.allclose(start.rows_UD[:, :4], expected, atol=1e-3)
    assert torch.equal(start.rows_UD[:, 4:], torch.zeros(len(expected), 1))


@pytest.mark.parametrize("images", [3, 40])
def test_a_factor_tells_the_sum_of_squares_and_no_more(images: int) -> None:
    features_NF, label_N = made(images, 8, 3, 0)
    sums = feature_sums(features_NF, label_N, False)
    unit = F.normalize(features_NF, dim=1)
    assert sums.factor_RF.shape == (min(images, 8), 8)
    assert torch.allclose(sums.factor_RF.T @ sums.factor_RF, unit.T @ unit, atol=1e-4)
    assert torch.equal(sums.factor_RF, sums.factor_RF.triu())
    # Without class rows nothing tells the classes.
    assert (len(sums.ids_P), sums.counts_P.tolist()) == (0, [images])
    assert torch.allclose(sums.sums_PF, unit.sum(0, keepdim=True), atol=1e-5)


def test_directions_without_variance_are_zero() -> None:
    features_NF = torch.eye(3, 6)
    start = warm_start([feature_sums(features_NF, torch.arange(3), True)], 5, 5)
    # Three points span two directions about their mean.
    assert (start.axes_FK.abs().sum(0) > 0).tolist() == [True, True, False, False, False]
    assert bool(start.rows_UD.isfinite().all())


def test_a_class_at_the_mean_of_all_gets_no_row() -> None:
    features_NF = F.normalize(
        torch.tensor([[1.0, 0.2], [1.0, -0.2], [1.0, 0.2], [1.0, -0.2]]), dim=1
    )
    start = warm_start([feature_sums(features_NF, torch.tensor([0, 1, 2, 2]), True)], 2, 2)
    assert start.ids_U.tolist()[:2] == [0, 1]
    assert torch.allclose(start.rows_UD[0], -start.rows_UD[1], atol=1e-3)
