"""The examples keep the law of samplers (hard: test_samplers), and train."""

import numpy as np
import pytest

from examples import hard_negatives
from examples.own_sampler import half_from_own_groups, main


@pytest.mark.parametrize(("m", "own"), [(1, [0]), (4, [0, 5]), (7, [0]), (9, [2, 3]), (10, [1, 7])])
def test_q_is_the_probability_of_being_drawn(m, own):
    group = np.array([0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2])
    sampler, draws = half_from_own_groups(group), 4000
    weight = np.zeros(12)
    for seed in range(draws):
        ids, q = sampler.draw(np.array(own), 12, m, np.random.default_rng(seed))
        assert len(ids) == m
        assert (np.diff(ids) > 0).all()
        assert not np.isin(ids, own).any()
        weight[ids] += 1 / q
    others = np.setdiff1d(np.arange(12), own)
    assert np.abs(weight[others] / draws - 1).max() < 0.25


def test_it_trains():
    assert main(rounds=2) > 0.0


def test_hard_negatives_train_too():
    found = hard_negatives.main(rounds=2)
    assert found["hard"] != found["uniform"]
    assert min(found.values()) > 0.0
