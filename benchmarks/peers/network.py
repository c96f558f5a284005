"""The common job's network in torch, as one would write it down."""

import numpy as np
import torch
from job import BLOCKS, DIM, GROUPS, WIDTH
from torch import Tensor, nn
from torch.nn import functional as F


def network(theta: np.ndarray | None = None, side: int = 28) -> nn.Sequential:
    """The network, with these weights if there are any; for images of so many pixels a side."""
    layers: list[nn.Module] = []
    for block in range(BLOCKS):
        layers += [
            nn.Conv2d(WIDTH if block else 1, WIDTH, 3, padding=1),
            nn.GroupNorm(GROUPS, WIDTH),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(WIDTH * (side // 16) ** 2, DIM))
    if theta is not None:
        nn.utils.vector_to_parameters(torch.from_numpy(theta.copy()), model.parameters())
    return model


def scaled(pixels: np.ndarray) -> Tensor:
    """Pixels from -1 to 1."""
    return (torch.from_numpy(pixels) / 255 - 0.5) / 0.5


def channels_last(x: Tensor) -> Tensor:
    """A pixel's channels side by side. With one channel ``.to()`` would leave the strides."""
    return x.as_strided(x.shape, (28 * 28, 1, 28, 1), x.storage_offset())


def loss(h: Tensor, rows: Tensor, target: Tensor, log_q: Tensor, scale: float) -> Tensor:
    """Softmax cross-entropy over the rows, corrected for how they were sampled."""
    logits = scale * F.normalize(h, dim=1) @ F.normalize(rows, dim=1).T - log_q
    return F.cross_entropy(logits, target)
