"""Attacks of a server on its clients: plain functions of what it receives.

Those on classes return class ids, int64, sorted. A server has the plan of a round with the seed,
and hears of each client which rows it asks for and how it changed them. It has not the secret of
the clients.

Shape suffixes: S rows that a client asked for, D embedding size, N images.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import reduce

import numpy as np

from fedss.core.client import RoundPlan, client_generator


def replay(plan: RoundPlan, client: int, ids_S: np.ndarray) -> np.ndarray:
    """Own classes in one request: what is in it, but not in the client's draw done again.

    ``plan`` is what the server takes to be the client's, with the secret that it knows, if any.
    Where the client draws nothing, or by a sampler that nobody has an attack for, all that it asks
    for is named.
    """
    attack = _REPLAYS.get(plan.sampler.name)
    return attack(plan, client, ids_S) if draws(plan) and attack else ids_S


def draws(plan: RoundPlan) -> bool:
    """Whether classes that are drawn are asked for, or dealt, beside own ones."""
    if plan.requests != "own":
        return False
    negatives = plan.method.negatives
    return negatives == "sampled" or (negatives == "cover" and plan.cover > 0)


def _replay_uniform(plan: RoundPlan, client: int, ids_S: np.ndarray) -> np.ndarray:
    """Ranks are drawn among the classes that are not own, and how many are own is not known.

    Every number is tried. Only the right one gives ranks that fit the request; if none does, the
    one that fits best is taken.
    """
    fits_best, found = -1.0, np.zeros(0, np.int64)
    for num_own in range(1, len(ids_S)):
        rng = client_generator(plan, "classes", client)
        num_others, m = plan.num_classes - num_own, len(ids_S) - num_own
        if m > num_others:
            continue
        rank_M = np.sort(rng.choice(num_others, m, replace=False, shuffle=False)).tolist()
        own: list[int] = []
        taken = 0
        for number in ids_S.tolist():
            # A negative's rank is its id less the own classes below it.
            if taken < m and number - len(own) == rank_M[taken]:
                taken += 1
            else:
                own.append(number)
        if taken / m > fits_best:
            fits_best, found = taken / m, np.array(own)
        if taken == m:
            break
    return found


def _replay_sticky(plan: RoundPlan, client: int, ids_S: np.ndarray) -> np.ndarray:
    """Negatives are the first of an order that does not depend on own classes, nor on the round.

    An own class that lies among the first is taken for a negative.
    """
    rng = client_generator(replace(plan, round=0), "classes", client)
    order = rng.choice(plan.num_classes, len(ids_S), replace=False, shuffle=True)
    return np.setdiff1d(ids_S, order)


_REPLAYS: dict[str, Callable[[RoundPlan, int, np.ndarray], np.ndarray]] = {
    "uniform": _replay_uniform,
    "sticky": _replay_sticky,
}


def intersection(requests: Sequence[np.ndarray]) -> np.ndarray:
    """Own classes in a client's requests: what all of them have, since own classes come back."""
    return reduce(lambda before, ids_S: np.intersect1d(before, ids_S, True), requests)


def unchanged(left: np.ndarray, ids_S: np.ndarray, delta_SD: np.ndarray) -> np.ndarray:
    """Own classes, of those that are ``left``: rows that an update names and leaves as they were
    are struck out. An own row is trained, where the client takes it.
    """
    return np.setdiff1d(left, ids_S[~delta_SD.any(axis=1)], assume_unique=True)


def update_norm(ids_S: np.ndarray, delta_SD: np.ndarray) -> np.ndarray:
    """Own classes in one update: the rows that moved far.

    Where far begins follows from the norms alone: the two groups that differ most (k-means with
    k = 2, exact on a line).
    """
    norm_S = np.linalg.norm(delta_SD, axis=1)
    named: np.ndarray = ids_S[_upper_group(norm_S)]
    return named


def update_direction(ids_S: np.ndarray, delta_SD: np.ndarray) -> np.ndarray:
    """Own classes in one update: the rows that moved towards images.

    The gradient of a negative is ``s pi h``, that of an own row ``-s (1 - pi) h`` for its images,
    so the two go opposite ways along what embeddings have in common. That is the first singular
    vector of the changes, each of length 1. Of its two sides the one that moved farther is own.
    """
    norm_S = np.linalg.norm(delta_SD, axis=1)
    if not norm_S.any():
        return ids_S
    unit_SD = delta_SD / (norm_S[:, None] + 1e-12)
    side_S = unit_SD @ np.linalg.svd(unit_SD, full_matrices=False)[2][0] > 0
    if side_S.all() or not side_S.any():
        return ids_S
    farther = norm_S[side_S].mean() > norm_S[~side_S].mean()
    named: np.ndarray = ids_S[side_S == farther]
    return named


def class_size(ids_S: np.ndarray, delta_SD: np.ndarray) -> np.ndarray:
    """Own classes of many images: of the rows that moved towards images, those that moved farther
    than the mean. Each image adds to the way of its row.
    """
    own_P = update_direction(ids_S, delta_SD)
    norm_P = np.linalg.norm(delta_SD[np.isin(ids_S, own_P)], axis=1)
    named: np.ndarray = own_P[norm_P > norm_P.mean()]
    return named


def membership(score_N: np.ndarray, known_in: np.ndarray, known_out: np.ndarray) -> np.ndarray:
    """Which images a client has, bool [N]: the likelihood ratio of a score is above 1.

    Scores of images of which it is known that they were trained on (``known_in``), or were not
    (``known_out``), give a Gaussian each (Carlini et al. 2022, arXiv 2112.03570).
    """
    return _log_density(score_N, known_in) > _log_density(score_N, known_out)


def _log_density(score_N: np.ndarray, known: np.ndarray) -> np.ndarray:
    deviation = known.std() + 1e-12
    density_N: np.ndarray = -(((score_N - known.mean()) / deviation) ** 2) / 2 - np.log(deviation)
    return density_N


def _upper_group(value_S: np.ndarray) -> np.ndarray:
    """Which values are in the upper one of the two groups with the least variance within."""
    sorted_S = np.sort(value_S)
    count, total = np.arange(1, len(sorted_S)), np.cumsum(sorted_S)
    rest = len(sorted_S) - count
    if not len(count):
        return np.ones(len(value_S), bool)
    between = count * rest * (total[:-1] / count - (total[-1] - total[:-1]) / rest) ** 2
    upper_S: np.ndarray = value_S > sorted_S[np.argmax(between)]
    return upper_S
