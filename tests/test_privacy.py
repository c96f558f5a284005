"""What epsilon is claimed, against integrals; which settings claim any."""

import math

import numpy as np
import pytest
from scipy import integrate, optimize, stats

from fedss import Config, ConfigError
from fedss.privacy import (
    check_delta,
    default_delta,
    epsilon_spent,
    first_norm,
    rounds_within,
    sampling_rate,
)


def gaussian_epsilon(noise: float, rounds: int, delta: float) -> float:
    """Of a Gaussian mechanism, exactly (Balle and Wang 2018, arXiv 1805.06530, theorem 8)."""
    a = math.sqrt(rounds) / noise

    def excess(epsilon: float) -> float:
        first = stats.norm.cdf(a / 2 - epsilon / a)
        return first - math.exp(epsilon) * stats.norm.cdf(-a / 2 - epsilon / a) - delta

    return optimize.brentq(excess, 0.0, 200.0)


def sampled_delta(noise: float, rate: float, epsilon: float) -> float:
    """Of one round in which a client may be, the larger of both directions, by an integral."""
    x = np.linspace(-30 * noise, 30 * noise + 1, 400_001)
    without = stats.norm.pdf(x, 0, noise)
    within = (1 - rate) * without + rate * stats.norm.pdf(x, 1, noise)
    return max(
        integrate.trapezoid(np.maximum(p - math.exp(epsilon) * q, 0), x)
        for p, q in ((within, without), (without, within))
    )


@pytest.mark.parametrize(("noise", "rounds"), [(1.0, 1), (2.0, 10), (5.0, 300)])
def test_epsilon_where_everybody_takes_part(noise, rounds):
    exact = gaussian_epsilon(noise, rounds, 1e-5)
    claimed = epsilon_spent(noise, [1.0] * rounds, 1e-5)
    assert exact <= claimed * (1 + 1e-6)
    assert claimed <= 1.005 * exact


@pytest.mark.parametrize(("noise", "rate"), [(0.7, 0.1), (1.0, 0.5), (2.0, 0.01)])
def test_epsilon_of_a_sampled_round(noise, rate):
    claimed = epsilon_spent(noise, [rate], 1e-4)
    assert sampled_delta(noise, rate, claimed) <= 1e-4 * (1 + 1e-6)
    assert sampled_delta(noise, rate, 0.97 * claimed) > 1e-4


def test_epsilon_of_many_rounds_is_below_the_bound_of_renyi_divergences():
    import dp_accounting as dp

    event = dp.PoissonSampledDpEvent(0.1, dp.GaussianDpEvent(1.0))
    bound = dp.rdp.RdpAccountant([*range(2, 64)]).compose(event, 50).get_epsilon(1e-5)
    exact = dp.pld.PLDAccountant().compose(event, 50).get_epsilon(1e-5)
    claimed = epsilon_spent(1.0, [0.1] * 50, 1e-5)
    assert 0.8 * bound < claimed < bound
    assert exact * (1 - 1e-6) <= claimed < 1.002 * exact


def test_epsilon_of_rounds_with_different_rates():
    rates = [0.1] * 5 + [0.2] * 5
    mixed = epsilon_spent(1.0, rates, 1e-5)
    assert epsilon_spent(1.0, [0.1] * 10, 1e-5) < mixed < epsilon_spent(1.0, [0.2] * 10, 1e-5)
    assert epsilon_spent(1.0, rates[::-1], 1e-5) == mixed
    assert epsilon_spent(1.0, [], 1e-5) == 0.0


def test_epsilon_of_next_to_no_noise_is_no_small_number():
    for noise in (0.001, 0.05):
        claimed = epsilon_spent(noise, [0.1] * 3, 1e-5)
        assert claimed > 3 * 0.5 / noise**2
    assert epsilon_spent(0.09, [1.0], 1e-5) >= gaussian_epsilon(0.09, 1, 1e-5)


def test_rounds_within_a_budget():
    within = rounds_within(2.0, 1.0, 0.1, 1e-5, 100)
    assert 1 < within < 100
    assert epsilon_spent(1.0, [0.1] * within, 1e-5) <= 2.0
    assert epsilon_spent(1.0, [0.1] * (within + 1), 1e-5) > 2.0
    assert rounds_within(1e-3, 1.0, 0.1, 1e-5, 100) == 0
    assert rounds_within(1e6, 1.0, 0.1, 1e-5, 3) == 3


def test_rates_and_deltas():
    assert (sampling_rate(20, 80), sampling_rate(20, 10)) == (0.25, 1.0)
    assert all(default_delta(n) < 1 / n for n in (2, 3, 10, 1000, 10**6))
    check_delta(0.01, 100)
    with pytest.raises(ConfigError, match=r"delta: expected at most 1 / N = 0\.01 for 100 clients"):
        check_delta(0.011, 100)


def test_norms():
    assert first_norm("0.5") == (0.5, False)
    assert first_norm("adaptive") == (0.1, True)
    assert first_norm("adaptive:3") == (3.0, True)
    assert Config(clip=0.5) == Config(clip="0.5")


PRIVATE = {"method": "full", "clip": "1", "noise": 1.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip": "0"}, "clip: expected a norm above 0 and at most 1e30, adaptive or"),
        ({"clip": "nan"}, "clip: expected a norm"),
        ({"clip": "adaptive:"}, "clip: expected a norm"),
        ({"clip": "median"}, "clip: expected a norm"),
        ({"row_clip": 1.0}, "row_clip: expected beside a clip that is a number"),
        ({"clip": "adaptive", "row_clip": 1.0}, "row_clip: expected beside a clip"),
        ({"clip": "1", "row_clip": 0.0}, "row_clip: expected a number above 0"),
        ({"noise": 1.0}, "noise: its size follows from the largest norm"),
        ({"clip": "1", "noise": -1.0}, "noise: expected 0 (none), or 1e-6 to 1e6"),
        ({"clip": "1", "epsilon": 1.0}, "epsilon: without noise there is no privacy"),
        ({"clip": "1", "delta": 1e-5}, "delta: without noise there is no privacy"),
        ({**PRIVATE, "delta": 0.0}, "delta: expected above 0 and below 1"),
        ({**PRIVATE, "delta": 1.0}, "delta: expected above 0 and below 1"),
        ({**PRIVATE, "epsilon": 0.0}, "epsilon: expected a number above 0"),
        ({**PRIVATE, "projection_init": "whitened"}, "projection_init: with noise"),
        ({**PRIVATE, "rows_init": "means"}, "rows_init: with noise"),
        ({**PRIVATE, "row_mean": "holders"}, "row_mean: with noise"),
        ({**PRIVATE, "patience": 2, "eval_split": "validation"}, "patience: it chooses a round"),
    ],
)
def test_settings_that_cannot_be(changes, message):
    with pytest.raises(ConfigError) as caught:
        Config(**changes)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
