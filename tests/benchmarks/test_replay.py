"""benchmarks/replay.py: who knows what keys a draw repeats it, who does not can only guess."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from replay import SAMPLERS, SECRETS, measure

from fedss.core.client import limit_own_classes
from tests.core.test_algorithm import plan

CLIENTS = 60


@pytest.mark.parametrize("kind", ["scattered", "block"])
@pytest.mark.parametrize(("n", "size", "num_own"), [(964, 64, 8), (964, 64, 40), (11_187, 64, 40)])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_draw_is_replayed_by_who_knows_its_secret(sampler, n, size, num_own, kind):
    case, guess = (sampler, n, size, num_own, kind), num_own / size
    for known in ("none", "known"):  # without a secret, as a simulation is by default
        precision, recall = measure(*case, SECRETS[known], CLIENTS)
        assert precision > 0.9
        assert recall > 0.9
    precision, recall = measure(*case, SECRETS["unknown"], CLIENTS)
    assert precision <= guess + 0.05
    # It is not for want of naming any.
    assert recall > 0.5


def test_which_own_classes_are_kept_cannot_be_replayed_either():
    told, labels = plan("fedss", 4), np.arange(8)
    kept = [
        [limit_own_classes(replace(told, round=r, secret=s), 0, labels) for r in range(300)]
        for s in (None, b"s" * 32)
    ]
    both = [len(np.intersect1d(*pair)) for pair in zip(*kept, strict=True)]
    # 3 of 8 and 3 of 8: 9 / 8 in common by chance; six standard deviations.
    assert abs(np.mean(both) - 9 / 8) < 6 * (9 / 8 * 5 / 8 * 5 / 7 / 300) ** 0.5
