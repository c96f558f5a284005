"""Hard negatives with an exact q, as a sampler of your own: half the nearest rows, half uniform.

They gained nothing wherever they were measured (docs/methods.md), so the library has none.
Measure them on your own images:

    python examples/hard_negatives.py
"""

import tempfile
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional as F

import fedss
from fedss.sampling.samplers import Negatives, Sampler, ServerRows, draw_uniform


def deal(
    own_K: Sequence[np.ndarray],
    num_negatives_K: Sequence[int],
    rows: ServerRows,
    rng: np.random.Generator,
) -> list[Negatives]:
    """At the server: the H = m/2 nearest classes, ``q = 1``; others, ``q = (m - H)/(n - P - H)``.

    Near is the largest cosine with any own row. O(P n D) for each client.
    """
    unit_ND = F.normalize(rows.read(torch.arange(rows.num_classes)), dim=1)
    negatives_K = []
    for own_P, m in zip(own_K, num_negatives_K, strict=True):
        if m in (0, rows.num_classes - len(own_P)):
            negatives_K.append(draw_uniform(own_P, rows.num_classes, m, rng))
            continue
        cos_N = (unit_ND[own_P] @ unit_ND.T).max(dim=0).values
        cos_N[own_P] = -2.0
        hard = np.sort(cos_N.topk(m // 2).indices.numpy())
        taken = np.sort(np.concatenate([own_P, hard]))
        rest, q = draw_uniform(taken, rows.num_classes, m - len(hard), rng)
        ids, q = np.concatenate([hard, rest]), np.concatenate([np.ones(len(hard)), q])
        order = np.argsort(ids)
        negatives_K.append((ids[order], q[order]))
    return negatives_K


HARD = Sampler("hard", "nearest rows, and a uniform rest", deal=deal, q_each=True)


def main(rounds: int = 30) -> dict[str, float | None]:
    """Train on glyphs with both samplers; MAP@10 on unseen classes."""
    config = fedss.Config(rounds=rounds, glyphs_classes=320, glyphs_clients=64, eval_every=0)
    found = {}
    for name, sampler in {"uniform": None, "hard": HARD}.items():
        with tempfile.TemporaryDirectory() as folder:
            run = fedss.train(config, folder, sampler=sampler)
            found[name] = run.summary["map_at_10"]
    return found


if __name__ == "__main__":
    for name, map_at_10 in main().items():
        print(f"{name:<8} MAP@10 on unseen classes: {map_at_10:.3f}")
