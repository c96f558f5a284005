"""Rounding at random, whose mean is right."""

import numpy as np
import torch
from torch import Tensor


def to_bfloat16(values: Tensor, rng: np.random.Generator | None) -> Tensor:
    """Values in bfloat16, rounded to nearest without an ``rng``.

    With one, stochastically: ``E[to_bfloat16(x)] = x``, but for finite values beyond its largest,
    3.39e38, which go to nearest.
    """
    values = values.contiguous()
    if rng is None:
        return values.bfloat16()
    # Bits of one sign count magnitudes in order, so the 16 that bfloat16 cuts off carry into the
    # rest with the probability that makes the mean right.
    noise = torch.from_numpy(rng.integers(-(1 << 15), 1 << 15, values.shape, dtype=np.int16))
    bits = (values.view(torch.int32) + (1 << 15) + noise.to(values.device)) & -(1 << 16)
    # A carry could make a NaN finite, and infinity of what nearest keeps finite.
    in_range = values.abs() <= torch.finfo(torch.bfloat16).max
    return torch.where(in_range, bits.view(torch.float32), values).bfloat16()
