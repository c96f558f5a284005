"""Samplers: who draws the negatives, which classes they are, and how likely each was.

Shape suffixes: K clients of a cohort, P own classes, M negatives, S classes of a class sample
(S = P + M), N all classes, D embedding size.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedss.errors import ConfigError
from fedss.losses.softmax import ClassSample
from fedss.own_code import import_code, is_code

Negatives = tuple[np.ndarray, np.ndarray]
"""Ids int64 [M], sorted, unique, none of them own; inclusion probabilities float64 [M]."""

Draw = Callable[[np.ndarray, int, int, np.random.Generator], Negatives]
"""``draw(own_P, num_classes, num_negatives, rng)``, at a client, which knows nothing but its own
classes (int64, sorted, unique) and n. ``num_negatives`` is at most ``n - |P|``."""


@dataclass(frozen=True)
class ServerRows:
    """What a sampler at the server may look at.

    ``read`` gives class rows as last written, float32 [S, D], by their ids (int64 tensor [S]).
    """

    num_classes: int
    read: Callable[[Tensor], Tensor]


Deal = Callable[
    [Sequence[np.ndarray], Sequence[int], ServerRows, np.random.Generator], list[Negatives]
]
"""``deal(own_K, num_negatives_K, rows, rng)``, at the server, for the whole cohort at once: the own
classes of each client, and at most how many negatives it may get."""


@dataclass(frozen=True)
class Sampler:
    """A way to get negatives. Either ``draw`` or ``deal`` is given.

    The law that each keeps: over its random draws, class i that is not own is among the negatives
    with the stated probability ``q_i > 0``. Then ``sum_P exp(o_i) + sum_M exp(o_i) / q_i`` has the
    full partition function as its mean (Horvitz and Thompson 1952).

    Attributes:
        draw: drawn by the client.
        deal: drawn by the server, which then knows the client's own classes.
        fixed: ``draw`` gets the same generator in every round.
        q_each: ``deal`` gives negatives probabilities of their own, not one for all; by it the
            bytes of a message are told before any is sent.
    """

    name: str
    summary: str
    draw: Draw | None = None
    deal: Deal | None = None
    fixed: bool = False
    q_each: bool = False

    def __post_init__(self) -> None:
        if (self.draw is None) == (self.deal is None):
            raise ConfigError(f"sampler {self.name!r}: expected one of draw and deal")

    @property
    def drawn_by(self) -> Literal["client", "server"]:
        """Who draws."""
        return "client" if self.draw else "server"


def own_budget(sample_size: int, num_classes: int) -> int:
    """How many own classes a client may bring to a class sample of ``sample_size``.

    At least an eighth of the sample, and at least one class, is left for negatives: the weight 1/q
    of fewer makes the estimate of the partition function very noisy. A sample of all classes has no
    such limit. (Ours.)
    """
    if sample_size >= num_classes:
        return num_classes
    return sample_size - math.ceil(sample_size / 8)


def limit(own_P: np.ndarray, budget: int, rng: np.random.Generator) -> np.ndarray:
    """A random part of the own classes, sorted, where there are more than ``budget``."""
    if len(own_P) <= budget:
        return own_P
    return np.sort(rng.choice(own_P, budget, replace=False))


def check_negatives(
    name: str, own_P: np.ndarray, num_classes: int, most: int, negatives: Negatives
) -> Negatives:
    """The negatives themselves, if they are what a sampler may return. O(S log S).

    Raises:
        ConfigError: they are not; names the sampler, and what is wrong. (Whether q is true, nobody
            can see from one draw.)
    """
    ids_M, q_M = (np.asarray(values) for values in negatives)
    faults = {
        f"ids of int64, got {ids_M.dtype}": ids_M.dtype != np.int64,
        f"as many q as ids, got {q_M.shape} and {ids_M.shape}": q_M.shape != ids_M.shape,
        f"at most {most} negatives, got {len(ids_M)}": len(ids_M) > most,
        "sorted ids, each once": bool((np.diff(ids_M) <= 0).any()),
        f"ids from 0 to {num_classes - 1}": bool(((ids_M < 0) | (ids_M >= num_classes)).any()),
        "no own class": bool(np.isin(ids_M, own_P).any()),
        "q above 0 and at most 1": not bool(((q_M > 0) & (q_M <= 1)).all()),
    }
    for expected, fault in faults.items():
        if fault:
            raise ConfigError(f"sampler {name!r}: expected {expected}")
    return ids_M, q_M


def class_sample(own_P: np.ndarray, negative_M: np.ndarray, q_M: np.ndarray) -> ClassSample:
    """Own classes (q = 1) and negatives, put together in the order of their ids."""
    ids = np.concatenate([own_P, negative_M])
    log_q = np.concatenate([np.zeros(len(own_P)), np.log(q_M)])
    order = np.argsort(ids)
    return ClassSample(
        torch.from_numpy(ids[order]),
        torch.from_numpy(log_q[order].astype(np.float32)),
        torch.from_numpy(order < len(own_P)),
    )


def whole_sample(own_P: np.ndarray, num_classes: int) -> ClassSample:
    """All classes, each with q = 1."""
    own_S = torch.zeros(num_classes, dtype=torch.bool)
    own_S[torch.from_numpy(own_P)] = True
    return ClassSample(torch.arange(num_classes), torch.zeros(num_classes), own_S)


def draw_uniform(
    own_P: np.ndarray, num_classes: int, num_negatives: int, rng: np.random.Generator
) -> Negatives:
    """Uniform without replacement from all classes that are not own: ``q_i = m / (n - |P|)``.

    The paper's sampler (Waghmare et al. 2022, arXiv 2203.04888, section 3). O(m log m) time and
    O(m) memory, whatever n is.
    """
    num_others = num_classes - len(own_P)
    rank_M = np.sort(rng.choice(num_others, num_negatives, replace=False, shuffle=False))
    # own_P[j] - j other classes lie below own class j, so a rank passes exactly the own classes
    # with no more others below them than the rank.
    negative_M = rank_M + np.searchsorted(own_P - np.arange(len(own_P)), rank_M, side="right")
    return negative_M, np.full(num_negatives, num_negatives / max(num_others, 1))


def draw_first(
    own_P: np.ndarray, num_classes: int, num_negatives: int, rng: np.random.Generator
) -> Negatives:
    """The first m classes that are not own, of a random order of all: ``q_i = m / (n - |P|)``.

    With the same generator in every round (:attr:`Sampler.fixed`) this is a client's fixed cover:
    a client that asks for all its own classes asks for the same rows every time, so that requests
    of many rounds tell no more than one. It pays with negatives that never change. (Ours;
    ``docs/methods.md`` has what it does not hide.)
    """
    num_cards = num_negatives + len(own_P)
    order = rng.choice(num_classes, num_cards, replace=False, shuffle=True)
    negative_M = np.sort(order[~np.isin(order, own_P)][:num_negatives])
    return negative_M, np.full(num_negatives, num_negatives / max(num_classes - len(own_P), 1))


def deal_deck(
    own_K: Sequence[np.ndarray],
    num_negatives_K: Sequence[int],
    rows: ServerRows,
    rng: np.random.Generator,
) -> list[Negatives]:
    """Each client gets the next m cards of one shuffled deck of all classes: ``q_i = m / n``.

    No class is dealt twice before all were dealt once, so a round hits rows evenly, where draws
    of each client for itself hit some rows often and others not at all. For one client, its hand
    is a uniform m-subset of all n classes. A card that is own to its client is put aside: the
    class is in the sample already, with q = 1. O(cards dealt). (Ours.)
    """
    num_classes, total = rows.num_classes, sum(num_negatives_K)
    deck = rng.choice(num_classes, min(total, num_classes), replace=False, shuffle=True)
    negatives_K, start = [], 0
    for own_P, m in zip(own_K, num_negatives_K, strict=True):
        if m == num_classes - len(own_P):
            negatives_K.append(draw_uniform(own_P, num_classes, m, rng))
            continue
        hand = deck[np.arange(start, start + m) % len(deck)] if m else deck[:0]
        start += m
        hand = np.sort(hand[~np.isin(hand, own_P)])
        negatives_K.append((hand, np.full(len(hand), m / num_classes)))
    return negatives_K


def draw_common(num_classes: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """A class set for all clients of a round: a uniform subset of all n classes, sorted."""
    return np.sort(rng.choice(num_classes, size, replace=False, shuffle=False))


def rest_of_common(owned_P: np.ndarray, num_classes: int, common_C: np.ndarray) -> Negatives:
    """The classes of a round's set that a client does not own: ``q_i = m / (n - |P|)``.

    ``owned_P`` are all its own classes, in the set or not, and ``m`` is how many others the set
    has. Whichever own classes the set has, its m others are a uniform subset of the n - |P| that
    are not own. So ``sum exp(o_i) + sum exp(o_i) / q_i``, over own classes in the set and over
    these, has as its mean the partition function of all classes but own ones outside the set, of
    which the client has no row in this round. (Ours.)
    """
    rest_M = np.setdiff1d(common_C, owned_P, assume_unique=True)
    num_others = num_classes - len(owned_P)
    return rest_M, np.full(len(rest_M), len(rest_M) / max(num_others, 1))


SAMPLERS: dict[str, Sampler] = {
    sampler.name: sampler
    for sampler in (
        Sampler("uniform", "each client for itself, uniformly: the paper", draw=draw_uniform),
        Sampler("deck", "dealt by the server from one deck per round", deal=deal_deck),
        Sampler("sticky", "a client's own fixed cover", draw=draw_first, fixed=True),
    )
}


def find_sampler(name: str) -> Sampler:
    """A sampler by its name in ``SAMPLERS``, or that of own code: a :class:`Sampler`, or its draw.

    Raises:
        ConfigError: own code that is not there, or neither of these.
    """
    if not is_code(name):
        return SAMPLERS[name]
    found = import_code(name)
    if isinstance(found, Sampler):
        return found
    if not callable(found) or isinstance(found, type):
        raise ConfigError(
            f"sampler {name}: expected a fedss.sampling.samplers.Sampler or a function "
            f"draw(own_P, num_classes, num_negatives, rng), got {type(found).__name__}"
        )
    return Sampler(name, "own code", draw=found)
