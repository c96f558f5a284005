"""No two draws share a stream: each is keyed by the seed and by whatever tells it apart."""

import sys
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from fedss import seeds
from fedss.core.algorithm import Server, draw_cohort, run_round
from fedss.core.class_rows import create_class_rows, with_sums
from fedss.core.client import limit_own_classes
from fedss.data.augment import AUGMENTATIONS
from tests.core.test_algorithm import MOMENTUM, N, plan, start
from tests.engines.test_local import local

Key = tuple[int, str, int, int, bytes | None]


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> list[Key]:
    """Of all generators that are made: seed, purpose, round, client, secret."""
    found: list[Key] = []
    make = seeds.generator

    def spy(
        seed: int, purpose: str, round: int = 0, client: int = 0, secret: bytes | None = None
    ) -> np.random.Generator:
        found.append((seed, purpose, round, client, secret))
        return make(seed, purpose, round, client, secret)

    for name, module in list(sys.modules.items()):
        if name.startswith("fedss") and getattr(module, "generator", None) is make:
            monkeypatch.setattr(module, "generator", spy)
    return found


@pytest.mark.parametrize(("sampler", "drawn"), [("uniform", "client"), ("deck", "server")])
@pytest.mark.parametrize("secret", [None, b"s" * 32])
def test_no_stream_is_used_twice(
    sampler: str, drawn: str, secret: bytes | None, keys: list[Key]
) -> None:
    rounds, cohort_size = 3, 4
    told = replace(plan("fedss", 4, sampler), seed=5, augmentation=AUGMENTATIONS["drawings"])
    told = replace(told, secret=secret)
    state = start(MOMENTUM, told)
    rows = with_sums(create_class_rows(N, 6, MOMENTUM.slots, told.seed, "bfloat16"))
    state = replace(state, class_rows=rows)
    with local(1, rows_up="int8", backbone_up="int8") as engine:
        for round in range(rounds):
            cohort = draw_cohort(6, cohort_size, told.seed, round)
            now: Any = replace(told, round=round)
            state, *_ = run_round(Server(MOMENTUM), engine, state, now, cohort)
    of_round, of_client = 1, cohort_size
    assert Counter(purpose for _, purpose, *_ in keys) == {
        purpose: rounds * count
        for purpose, count in {
            "cohort": of_round,
            "own classes": of_client,
            **({"classes": of_client} if drawn == "client" else {"deal": of_round}),
            "batches": of_client,
            "augment": of_client,
            "wire": of_client,
            "row rounding": of_round,
        }.items()
    }
    assert len(set(keys)) == len(keys)
    assert {seed for seed, *_ in keys} == {told.seed}
    # The secret keys what clients draw, and nothing of what the server does.
    server = {"cohort", "deal", "row rounding"}
    assert all(key == (None if purpose in server else secret) for _, purpose, *_, key in keys)


def test_each_own_class_is_kept_as_often_as_any_other() -> None:
    """A client with more classes than fit brings others in every round, and in time all of them."""
    rounds, label_N = 600, np.repeat(np.arange(8), 2)
    told = plan("fedss", 4)
    kept = [limit_own_classes(replace(told, round=r), 0, label_N) for r in range(rounds)]
    times, share = np.bincount(np.concatenate(kept), minlength=8), 3 / 8
    # Six standard deviations.
    assert (abs(times - rounds * share) < 6 * (rounds * share * (1 - share)) ** 0.5).all()
    # By chance 1 of 56.
    assert sum(np.array_equal(*pair) for pair in pairwise(kept)) < rounds / 10
