"""PCA-whitening of a backbone's features: centred, decorrelated, of variance 1 or less.

Shape suffixes: N images, B images of a batch, F features, K whitened numbers.
"""

import torch
from torch import Tensor, nn


class Whitening(nn.Module):
    """``z = V'(f / |f| - mu)``, frozen: f features, mu their mean, V of :func:`whitening_axes`.

    On whitened features plain SGD is preconditioned: no direction is learnt faster than another
    because the features vary more along it. Both are zero until :meth:`set_` is called.
    """

    mean_F: Tensor
    axes_FK: Tensor

    def __init__(self, features: int, size: int) -> None:
        super().__init__()
        self.register_buffer("mean_F", torch.zeros(features))
        self.register_buffer("axes_FK", torch.zeros(features, min(size, features)))

    def set_(self, mean_F: Tensor, axes_FK: Tensor) -> None:
        """Take the statistics of a federation, in place."""
        self.mean_F.copy_(mean_F)
        self.axes_FK.copy_(axes_FK)

    def forward(self, features_BF: Tensor) -> Tensor:
        """[B, F] to [B, K]."""
        unit_BF = nn.functional.normalize(features_BF.float(), dim=1)
        return (unit_BF - self.mean_F) @ self.axes_FK


def whitening_axes(
    second_FF: Tensor,
    mean_F: Tensor,
    size: int,
    shrinkage: float = 0.0,
    rounding: float = 1e-12,
) -> Tensor:
    """The leading axes of features' covariance, each divided by its deviation (Jegou and Chum 2012,
    ECCV): float64 [F, K]; K below ``size`` where fewer vary.

    With shrinkage a, of variances v and their mean m over all F axes, they are divided by
    ``sqrt(v + a m)``, and scaled so that a vector of K whitened numbers has a mean square of K.
    Axes that hardly vary are noise where images are few, and worth less than others where they are
    many.

    Args:
        second_FF: mean of f f' over images, float64; f of length 1.
        mean_F: their mean, float64.
        size: how many axes to keep.
        shrinkage: a.
        rounding: share of the features' mean square below which a variance is rounding alone.
    """
    variance_F, axes_FF = torch.linalg.eigh(second_FF - torch.outer(mean_F, mean_F))
    kept_K, axes_FK = variance_F.flip(0)[:size], axes_FF.flip(1)[:, :size]
    varies_K = (kept_K > 1e-9 * kept_K[0]) & (kept_K > rounding * second_FF.trace())
    kept_K, axes_FK = kept_K[varies_K], axes_FK[:, varies_K]
    # LAPACK leaves the sign of an axis open.
    largest_K = axes_FK.gather(0, axes_FK.abs().argmax(0, keepdim=True))[0]
    shrunk_K = kept_K + shrinkage * variance_F.mean()
    length = ((kept_K / shrunk_K).sum() / max(len(kept_K), 1)).sqrt()
    whitening_FK: Tensor = axes_FK * largest_K.sign() / shrunk_K.sqrt() / length
    return whitening_FK
