"""What one request tells a server that knows the seed: the draw of a client, replayed.

    python benchmarks/replay.py     (two minutes)

A client asks for the union of its own classes and its negatives, sorted. Its draw is keyed by the
run's seed, round and client (:mod:`fedss.seeds`), all of which the server knows, and by a secret,
if the client has one. Without a secret, as in a simulation by default, the server draws again, and
what is in the request but not in the draw is own (:func:`fedss.trust.attacks.replay`). Of an own
class and a negative of ``uniform`` with neighbouring ids it cannot be told which is which, and an
own class that lies among the first of the order of ``sticky`` is taken for a negative.

Requests are those of :func:`fedss.core.client.draw_classes`, 300 clients of each case, in round 7.
Own classes are anywhere (``scattered``), or next to each other, as those of one alphabet or brand
may be (``block``). Precision: of the classes that the server names, those that are own; recall: of
the own classes in the request, those that it names. Beside them what a guess at random would have.

Each case is measured three times: clients without a secret; with one that the server knows; with
one that it does not know, as in a federation. Last, what requests tell all the same: own classes
are in each of a client's requests, so those of two or three rounds are intersected.

Writes ``benchmarks/results/replay.txt``.
"""

from dataclasses import replace
from typing import NamedTuple

import common
import numpy as np

from fedss.config import Config
from fedss.core.client import draw_classes
from fedss.settings import resolve
from fedss.training.build import round_plan
from fedss.trust.attacks import intersection, replay

CLIENTS, ROUND, SEED = 300, 7, 0
# n, |S|, own classes of a client.
CASES = (
    (964, 64, 8),
    (964, 64, 40),
    (3_856, 64, 40),
    (11_187, 64, 40),
    (20_000, 64, 20),
    (100_000, 64, 40),
    (100_000, 256, 40),
)


SAMPLERS = ("uniform", "sticky")


class Secrets(NamedTuple):
    """What keys the draws of clients, and what the server takes them to be keyed by."""

    of_clients: bytes | None
    of_server: bytes | None


SECRETS = {
    "none": Secrets(None, None),
    "known": Secrets(b"s" * 32, b"s" * 32),
    "unknown": Secrets(b"s" * 32, None),
}


def measure(
    sampler: str, n: int, size: int, num_own: int, kind: str, secrets: Secrets, clients: int
) -> tuple[float, float]:
    """Precision and recall over all clients of a case."""
    config, _ = resolve(Config(sampler=sampler, sample_size=size, seed=SEED), None)
    plan = round_plan(config, n, ROUND, secret=secrets.of_clients)
    seen = replace(plan, secret=secrets.of_server)
    rng, right, named = np.random.default_rng(1), 0, 0
    for client in range(clients):
        if kind == "block":
            own_P = rng.integers(n - num_own + 1) + np.arange(num_own)
        else:
            own_P = np.sort(rng.choice(n, num_own, replace=False))
        ids_S = draw_classes(plan, client, own_P).ids_S.numpy()
        replayed = replay(seen, client, ids_S)
        right += len(np.intersect1d(replayed, own_P))
        named += len(replayed)
    return right / max(named, 1), right / (clients * num_own)


def intersect(n: int, size: int, num_own: int, rounds: int) -> float:
    """Precision of what is in all of a client's requests, if nobody can replay its draws."""
    rng, named = np.random.default_rng(1), 0
    for client in range(CLIENTS):
        own_P = np.sort(rng.choice(n, num_own, replace=False))
        config, _ = resolve(Config(sample_size=size), None)
        plans = [round_plan(config, n, round, secret=b"s" * 32) for round in range(rounds)]
        requests = [draw_classes(plan, client, own_P).ids_S.numpy() for plan in plans]
        named += len(intersection(requests))
    return CLIENTS * num_own / named


def main() -> None:
    common.parser(__doc__).parse_args()
    report = common.Report(
        "What one request tells: classes named as own by who replays a client's draw"
    )
    report.add(
        f"{CLIENTS} clients of each case, one request of each (round {ROUND}); precision / recall",
        "where draws are keyed by no secret, by one that the server knows, by one that it does not",
        "",
        f"{'n':>8} {'|S|':>5} {'own':>4}  {'sampler':8} {'own classes':12}"
        + "".join(f" {secret:>13}" for secret in SECRETS)
        + f" {'at random':>10}",
    )
    rates: dict[str, list[tuple[float, float]]] = {secret: [] for secret in SECRETS}
    above = []
    for n, size, num_own in CASES:
        for sampler in SAMPLERS:
            for kind in ("scattered", "block"):
                line = f"{n:8,} {size:5} {num_own:4}  {sampler:8} {kind:12}"
                for name, secrets in SECRETS.items():
                    found = measure(sampler, n, size, num_own, kind, secrets, CLIENTS)
                    rates[name].append(found)
                    line += f" {found[0]:5.3f} / {found[1]:5.3f}"
                above.append(rates["unknown"][-1][0] - num_own / size)
                report.add(f"{line} {num_own / size:10.3f}")
    report.add("")
    for name, found_K in rates.items():
        precisions, recalls = zip(*found_K, strict=True)
        report.add(
            f"secret {name}: precision {min(precisions):.2f} to {max(precisions):.2f}, "
            f"recall {min(recalls):.2f} to {max(recalls):.2f}"
        )
    report.add(
        f"secret unknown: precision at most {max(above):.3f} above a guess at random",
        "",
        "secret unknown, uniform, scattered: precision of what is in all requests, after",
        f"{'n':>8} {'|S|':>5} {'own':>4} {'2 requests':>12} {'3 requests':>12}",
    )
    for case in CASES:
        after = [intersect(*case, rounds) for rounds in (2, 3)]
        report.add("{:8,} {:5} {:4}".format(*case) + "".join(f" {p:12.3f}" for p in after))
    report.write()


if __name__ == "__main__":
    main()
