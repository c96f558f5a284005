"""The sampled softmax in a training loop of your own: one machine, 100,000 classes, no federation.

A step takes the rows of its batch's classes and of 1,000 drawn others. The loss is corrected for
the draw by log q, and the optimizer moves these rows alone. Data are made up: a class is a random
direction, an example lies near it.

    python examples/one_machine.py
"""

import time

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from fedss.losses import Scoring, sampled_softmax
from fedss.sampling import class_sample, draw_uniform

FEATURES, SIZE = 32, 64


def main(steps: int = 1000, classes: int = 100_000, negatives: int = 1000) -> list[float]:
    """Train; the loss of each step."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    centre_ND = F.normalize(torch.randn(classes, FEATURES), dim=1)
    network = nn.Sequential(nn.Linear(FEATURES, 256), nn.ReLU(), nn.Linear(256, SIZE))
    # With sparse gradients the optimizer reads and writes no other row.
    table = nn.Embedding(classes, SIZE, sparse=True)
    of_network = torch.optim.Adam(network.parameters(), lr=1e-3)
    of_rows = torch.optim.SparseAdam(table.parameters(), lr=0.05)

    losses, began = [], time.perf_counter()
    for number in range(1, steps + 1):
        label_B = rng.integers(classes, size=512)
        x_BD = centre_ND[label_B] + 0.05 * torch.randn(len(label_B), FEATURES)

        own_P, own_B = np.unique(label_B, return_inverse=True)
        sample = class_sample(own_P, *draw_uniform(own_P, classes, negatives, rng))
        # Own classes stand among the others in the order of their ids.
        target_B = sample.own_S.nonzero()[:, 0][torch.from_numpy(own_B)]
        h_BD = F.normalize(network(x_BD), dim=1)
        rows_SD = table(sample.ids_S)
        loss = sampled_softmax(h_BD, rows_SD, target_B, sample, Scoring(scale=20.0)).mean()

        of_network.zero_grad()
        of_rows.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        of_network.step()
        of_rows.step()  # type: ignore[no-untyped-call]
        losses.append(loss.item())
        if number % 100 == 0 or number == steps:
            speed = number / (time.perf_counter() - began)
            print(f"step {number:5d}  loss {losses[-1]:6.3f}  {speed:5.1f} steps/s", flush=True)
    return losses


if __name__ == "__main__":
    main()
