"""What one request tells the server, which knows the seed: the draw of a client, replayed.

    python benchmarks/replay.py     (half a minute)

A client asks for the union of its own classes and its negatives, sorted. Its draw is keyed by the
run's seed, round and client (:mod:`fedss.seeds`), all of which the server knows. So the server
draws again, and what is in the request but not in the draw is own:

- ``uniform`` draws ranks among the classes that are not own. The server does not know how many are
  own: it tries every number, and only the right one gives ranks that fit the request. Of an own
  class and a negative with neighbouring ids it cannot be told which is which.
- ``sticky`` asks for the first classes of a random order that are not own. The order does not
  depend on the own classes; one of these that lies among its first is taken for a negative.

Requests are those of :func:`fedss.core.client.draw_classes`, 300 clients of each case, in round 7.
Own classes are anywhere (``scattered``), or next to each other, as those of one alphabet or brand
may be (``block``). Precision: of the classes that the server names, those that are own; recall: of
the own classes in the request, those that it names. Beside them what a guess at random would have.

Last, what requests would tell if draws were keyed by a secret, as they are not: own classes are in
each of a client's requests, so those of two or three rounds are intersected.

Writes ``benchmarks/results/replay.txt``.
"""

from functools import reduce

import common
import numpy as np

from fedss.config import Config
from fedss.core.client import RoundPlan, draw_classes
from fedss.seeds import generator
from fedss.settings import resolve
from fedss.training.build import round_plan

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


def replay_uniform(plan: RoundPlan, client: int, ids_S: np.ndarray) -> np.ndarray:
    """Own classes in a request, as the server reads them out of it; empty if no number fits."""
    for num_own in range(1, len(ids_S)):
        rng = generator(plan.seed, "classes", plan.round, client)
        num_others, m = plan.num_classes - num_own, len(ids_S) - num_own
        if m > num_others:
            continue
        rank_M = np.sort(rng.choice(num_others, m, replace=False, shuffle=False))
        own: list[int] = []
        taken = 0
        for number in ids_S.tolist():
            # A negative's rank is its id less the own classes below it.
            if taken < m and number - len(own) == rank_M[taken]:
                taken += 1
            else:
                own.append(number)
        if taken == m:
            return np.array(own)
    return np.zeros(0, np.int64)


def replay_sticky(plan: RoundPlan, client: int, ids_S: np.ndarray) -> np.ndarray:
    """The same for the fixed order of ``sticky``."""
    rng = generator(plan.seed, "classes", 0, client)
    order = rng.choice(plan.num_classes, len(ids_S), replace=False, shuffle=True)
    return np.setdiff1d(ids_S, order)


REPLAYS = {"uniform": replay_uniform, "sticky": replay_sticky}


def measure(sampler: str, n: int, size: int, num_own: int, kind: str) -> tuple[float, float]:
    """Precision and recall over all clients of a case."""
    config, _ = resolve(Config(sampler=sampler, sample_size=size, seed=SEED), None)
    plan = round_plan(config, n, ROUND)
    rng, right, named = np.random.default_rng(1), 0, 0
    for client in range(CLIENTS):
        if kind == "block":
            own_P = rng.integers(n - num_own + 1) + np.arange(num_own)
        else:
            own_P = np.sort(rng.choice(n, num_own, replace=False))
        ids_S = draw_classes(plan, client, own_P).ids_S.numpy()
        replayed = REPLAYS[sampler](plan, client, ids_S)
        right += len(np.intersect1d(replayed, own_P))
        named += len(replayed)
    return right / max(named, 1), right / (CLIENTS * num_own)


def intersect(n: int, size: int, num_own: int, rounds: int) -> float:
    """Precision of what is in all of a client's requests, if nobody can replay its draws."""
    rng, named = np.random.default_rng(1), 0
    for client in range(CLIENTS):
        own_P = np.sort(rng.choice(n, num_own, replace=False))
        config, _ = resolve(Config(sample_size=size), None)
        plans = [round_plan(config, n, round) for round in range(rounds)]
        requests = [draw_classes(plan, client, own_P).ids_S.numpy() for plan in plans]
        named += len(reduce(np.intersect1d, requests))
    return CLIENTS * num_own / named


def main() -> None:
    common.parser(__doc__).parse_args()
    report = common.Report(
        "What one request tells: classes named as own by who replays a client's draw"
    )
    report.add(
        f"{CLIENTS} clients of each case, one request of each (round {ROUND})",
        "",
        f"{'n':>8} {'|S|':>5} {'own':>4}  {'sampler':8} {'own classes':12} "
        f"{'precision':>9} {'recall':>7} {'at random':>10}",
    )
    rates = []
    for n, size, num_own in CASES:
        for sampler in REPLAYS:
            for kind in ("scattered", "block"):
                precision, recall = measure(sampler, n, size, num_own, kind)
                rates.append((precision, recall))
                report.add(
                    f"{n:8,} {size:5} {num_own:4}  {sampler:8} {kind:12} "
                    f"{precision:9.3f} {recall:7.3f} {num_own / size:10.3f}"
                )
    precisions, recalls = zip(*rates, strict=True)
    report.add(
        "",
        f"precision {min(precisions):.2f} to {max(precisions):.2f}, "
        f"recall {min(recalls):.2f} to {max(recalls):.2f}",
        "",
        "if draws could not be replayed (uniform, scattered): precision after",
        f"{'n':>8} {'|S|':>5} {'own':>4} {'2 requests':>12} {'3 requests':>12}",
    )
    for case in CASES:
        after = [intersect(*case, rounds) for rounds in (2, 3)]
        report.add("{:8,} {:5} {:4}".format(*case) + "".join(f" {p:12.3f}" for p in after))
    report.write()


if __name__ == "__main__":
    main()
