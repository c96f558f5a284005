"""A sampler of your own: half of the negatives from the alphabets that a client writes.

A sampler gets a client's own classes and says which others come along, and how likely each was.
The library corrects for that, whatever it is: any probabilities above 0 will do, if they are true.

    python examples/own_sampler.py
"""

import tempfile

import numpy as np

import fedss
from fedss.sampling.samplers import Negatives, Sampler, draw_uniform


def half_from_own_groups(group_N: np.ndarray) -> Sampler:
    """``group_N`` has the group of each class, say its alphabet, brand or genus."""

    def draw(own_P: np.ndarray, n: int, m: int, rng: np.random.Generator) -> Negatives:
        if m < 2:  # half of one: some classes would never be drawn
            return draw_uniform(own_P, n, m, rng)
        others = np.setdiff1d(np.arange(n), own_P)
        is_near = np.isin(group_N[others], group_N[own_P])
        near, far = others[is_near], others[~is_near]
        count = max(min(-(-m // 2), len(near)), m - len(far))
        ids = np.concatenate([rng.choice(near, count, False), rng.choice(far, m - count, False)])
        q = np.repeat(
            [count / max(len(near), 1), (m - count) / max(len(far), 1)], [count, m - count]
        )
        order = np.argsort(ids)
        return ids[order], q[order]

    return Sampler("own-groups", "half from own groups, half from elsewhere", draw=draw)


def main(rounds: int = 30) -> float | None:
    """Train on glyphs with it; MAP@10 on unseen classes."""
    config = fedss.Config(rounds=rounds, glyphs_classes=320, glyphs_clients=64, eval_every=0)
    data = fedss.load_data(config)
    names = [name.rsplit("/", 1)[0] for name in data.train.class_names]
    sampler = half_from_own_groups(np.unique(names, return_inverse=True)[1])
    with tempfile.TemporaryDirectory() as folder:
        return fedss.train(config, folder, data=data, sampler=sampler).summary["map_at_10"]


if __name__ == "__main__":
    print(f"MAP@10 on unseen classes: {main():.3f}")
