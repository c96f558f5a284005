"""Differential privacy in a run: whether it can have it, its key, and what it has spent."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fedss.config import OPTIONS, Config
from fedss.data import Dataset, data_fingerprint
from fedss.errors import ConfigError
from fedss.losses.methods import METHODS
from fedss.optional import import_extra
from fedss.privacy import check_delta, epsilon_spent, rounds_within, sampling_rate
from fedss.secret import derive, make_secret, read_secret
from fedss.text import counted
from fedss.training.build import resolved

_CHANGED = "rounds"  # what a run that goes on may have another of


def same_shape(config: Config) -> bool:
    """Whether all clients of a round send changes of the same class rows, or of none.

    Otherwise the rows that a client asks for, and sends, name its classes, and no noise hides that.
    """
    method = METHODS[config.method]
    return method.negatives == "all" or method.local_rows or config.requests != "own"


def check_private(config: Config, clients: int | None) -> None:
    """Whether a run with noise, without ``auto`` settings, can claim differential privacy.

    ``clients``: how many there are; None: not known yet.

    Raises:
        ConfigError: it cannot, or its budget is below what one round spends.
    """
    if not config.noise:
        return
    if METHODS[config.method].pooled:
        raise ConfigError(
            f"noise: method {config.method} pools images, so there is no client to hide"
        )
    if not same_shape(config):
        raise ConfigError(
            f"noise: the class rows that a client of method {config.method} asks for name its "
            "classes, which no noise hides; take full or local-heads, or fedss with requests "
            "common or all"
        )
    if config.aggregate != "mean":
        raise ConfigError(
            f"noise: it is made for a sum of clients, and aggregate {config.aggregate} is none; "
            "expected aggregate mean"
        )
    if config.delta == "auto":
        raise ConfigError(
            "delta: the number of clients is not known before; give one below 1 / N, such as 1e-5"
        )
    import_extra("dp_accounting", "dp")  # before all else: it may not be installed
    if clients is None:
        return
    check_delta(config.delta, clients)
    first = spent(config, [clients])
    if config.epsilon is not None and first > config.epsilon:
        raise ConfigError(
            f"epsilon: one round spends {first:.3g}, more than the budget of {config.epsilon:g}; "
            "take more noise, fewer clients_per_round, or a larger budget"
        )


def spent(config: Config, num_clients: Sequence[int]) -> float:
    """Epsilon of rounds whose cohorts were drawn from so many clients each."""
    rates = [sampling_rate(config.clients_per_round, count) for count in num_clients]
    return epsilon_spent(config.noise, rates, resolved(config.delta))


def used_up(config: Config, num_clients: Sequence[int]) -> bool:
    """Whether the last of these rounds would spend more than there is."""
    return config.epsilon is not None and spent(config, num_clients) > config.epsilon


def outlook(config: Config, clients: int) -> list[str]:
    """What a run is going to claim, in lines of up to 80 columns; none where there is no noise."""
    if not config.noise:
        return []
    rounds, rate = config.rounds, sampling_rate(config.clients_per_round, clients)
    delta, ends = resolved(config.delta), ""
    if config.epsilon is not None:
        rounds = rounds_within(config.epsilon, config.noise, rate, delta, rounds)
        if rounds < config.rounds:
            ends = f", where the budget of {config.epsilon:g} ends the run"
    total = epsilon_spent(config.noise, [rate] * rounds, delta)
    after = counted(rounds, "round")
    return [
        f"epsilon ε = {total:.3g} at delta δ = {delta:.2g} after {after}{ends}",
        f"for one client added or removed; it is in a cohort with probability {rate:.3g}",
    ]


def simulation_key(config: Config, data: Dataset) -> bytes | None:
    """The key of noise and cohorts of a simulated run with a secret; None: the seed alone.

    No two runs have the same but by the same settings on the same images: with the same noise, the
    difference of two models would show what they differ in.
    """
    if not config.noise or config.secret_file is None:
        return None
    apart = ("data", "run")
    names = [o.name for o in OPTIONS if o.group not in apart and o.name != _CHANGED]
    settings = json.dumps({name: getattr(config, name) for name in names})
    secret = read_secret(Path(config.secret_file), "secret_file")
    return derive(secret, "noise", f"{data_fingerprint(data)} {settings}")


@contextmanager
def server_key(config: Config, folder: Path) -> Iterator[bytes | None]:
    """The key of noise and cohorts of a federation's run: random, in a file that its server alone
    may read, and gone when the run is done.
    """
    if not config.noise:
        yield None
        return
    path = folder / "noise.secret"
    if not path.exists():
        make_secret(path)
    yield derive(read_secret(path, "the key of the run's noise,"), "noise")
    path.unlink()
