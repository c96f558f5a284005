"""Differential privacy for one client: which settings have it, and what it costs (epsilon).

What is added up and noised, :mod:`fedss.core.privacy` says; ``docs/privacy.md`` says what is
promised. Accounting is that of the package dp-accounting.
"""

import math
from collections.abc import Sequence
from functools import lru_cache, reduce
from itertools import groupby
from typing import Any

from fedss.errors import ConfigError
from fedss.optional import import_extra

FIRST_NORM = 0.1
"""Where an adaptive norm begins unless told (Andrew et al. 2021, section 3)."""

_GRID = 1e-3  # on which privacy losses are rounded up, in units of the largest usual ones
_LEAST = 0.1  # noise with which losses fit on a grid


def first_norm(clip: str) -> tuple[float, bool]:
    """The norm in the setting ``clip``, the first one if it is adaptive; and whether it is.

    Raises:
        ConfigError: it is neither a norm nor ``adaptive`` nor ``adaptive:<first norm>``.
    """
    kind, colon, first = clip.partition(":")
    adaptive = kind == "adaptive"
    text = (first if colon else str(FIRST_NORM)) if adaptive else clip
    try:
        norm = float(text)
    except ValueError:
        norm = math.nan
    if not 0 < norm <= 1e30:
        raise ConfigError(
            f"clip: expected a norm above 0 and at most 1e30, adaptive or adaptive:<first norm>, "
            f"got {clip!r}"
        )
    return norm, adaptive


def check_privacy(config: Any) -> None:
    """Whether the settings of a configuration fit together, as far as it tells alone.

    Raises:
        ConfigError: they do not.
    """
    adaptive = config.clip is not None and first_norm(config.clip)[1]
    if config.row_clip is not None and (config.clip is None or adaptive):
        raise ConfigError(
            "row_clip: expected beside a clip that is a number, that of the backbone, got clip "
            f"{config.clip}"
        )
    if not config.noise:
        for name, unset in (("epsilon", None), ("delta", "auto")):
            if getattr(config, name) != unset:
                raise ConfigError(
                    f"{name}: without noise there is no privacy to account for; give noise, too"
                )
        return
    if config.clip is None:
        raise ConfigError(
            "noise: its size follows from the largest norm of an update; give clip, too"
        )
    told_once = "is made of sums that clients send without noise; take random"
    for name, value, why in (
        ("projection_init", "whitened", told_once),
        ("rows_init", "means", told_once),
        (
            "row_mean",
            "holders",
            "divides by how many hold a row, which no noise hides; take cohort",
        ),
    ):
        if getattr(config, name) == value:
            raise ConfigError(f"{name}: with noise (differential privacy), {value} {why}")
    if config.patience is not None:
        raise ConfigError(
            "patience: it chooses a round by images that no noise hides; leave it out, or noise"
        )


def default_delta(clients: int) -> float:
    """``N^-1.1``: below 1 / N, as a delta has to be (McMahan et al. 2018, arXiv 1710.06963)."""
    return float(f"{max(clients, 2) ** -1.1:.2g}")


def check_delta(delta: float, clients: int) -> None:
    """Raise a ConfigError for a delta that would allow one client of N to be shown as it is."""
    if delta > 1 / max(clients, 2):
        raise ConfigError(
            f"delta: expected at most 1 / N = {1 / max(clients, 2):.2g} for {clients} clients, "
            f"got {delta:g}"
        )


def epsilon_spent(noise: float, rates: Sequence[float], delta: float) -> float:
    """Epsilon at ``delta`` of rounds that each sampled every client with its rate, independently.

    One client more or less (add or remove); each round releases the sum of its cohort's clipped
    vectors with Gaussian noise of ``noise`` times the norm. By privacy loss distributions
    (dp-accounting), rounded up on a grid: an upper bound.

    Raises:
        ConfigError: dp-accounting is not installed.
    """
    if not rates:
        return 0.0
    if noise < _LEAST:
        # Far from any privacy: of rounds in which all take part (Bun and Steinke 2016, arXiv
        # 1605.02065, proposition 1.3), which is more than is spent.
        rho = len(rates) / (2 * noise**2)
        return rho + 2 * math.sqrt(rho * math.log(1 / delta))
    first, *others = (
        _round_loss(noise, rate).self_compose(len(list(rounds)))
        for rate, rounds in groupby(sorted(rates))
    )
    composed = reduce(lambda before, part: before.compose(part), others, first)
    return float(composed.get_epsilon_for_delta(delta))


@lru_cache(maxsize=64)
def _round_loss(noise: float, rate: float) -> Any:
    """The privacy loss distribution of one round."""
    library = import_extra("dp_accounting.pld.privacy_loss_distribution", "dp")
    return library.from_gaussian_mechanism(
        noise, value_discretization_interval=_GRID * max(1, noise**-2), sampling_prob=rate
    )


def rounds_within(epsilon: float, noise: float, rate: float, delta: float, most: int) -> int:
    """The largest number of rounds, up to ``most``, that spend at most ``epsilon``."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if epsilon_spent(noise, [rate] * middle, delta) <= epsilon:
            low = middle
        else:
            high = middle - 1
    return low


def sampling_rate(cohort_size: int, clients: int) -> float:
    """With what probability a client is in a round's cohort: ``min(1, K / N)``."""
    return min(1.0, cohort_size / clients)
