import logging
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedss import Config
from fedss.flower.server_app import line
from fedss.runs import progress
from fedss.runs.eta import TimeLeft, time_left


def schedule(
    rounds: int, eval_every: int, checkpoint_every: int, plain: list[float], costs: tuple
) -> list[dict[str, float]]:
    """What the rounds of a run record; costs of an evaluation and of a checkpoint."""
    seconds = [{"train": 0.75 * took, "aggregate": 0.25 * took} for took in plain]
    for number in range(1, rounds + 1):
        if number == rounds or (eval_every and number % eval_every == 0):
            seconds[number - 1]["evaluate"] = costs[0]
        if checkpoint_every and number % checkpoint_every == 0 and number < rounds:
            seconds[number]["checkpoint"] = costs[1]
    return seconds


every = st.integers(0, 12)


@given(st.integers(2, 60), every, every, st.floats(0.01, 100), st.floats(0, 500), st.data())
def test_steady_costs_are_foreseen_exactly(rounds, eval_every, checkpoint_every, took, cost, data):
    """Against adding up what the simulated run still records, and its last checkpoint."""
    costs = cost, cost / 3
    seconds = schedule(rounds, eval_every, checkpoint_every, [took] * rounds, costs)
    done = data.draw(st.integers(1, rounds - 1))
    left = time_left(seconds[:done], rounds, eval_every, checkpoint_every)
    to_come = sum(sum(by_phase.values()) for by_phase in seconds[done:]) + costs[1]
    # One that was due in the last round is not in its record yet: it counts to the next.
    if checkpoint_every and done % checkpoint_every == 0:
        to_come -= costs[1]
    assert left is not None
    seen = {phase for by_phase in seconds[:done] for phase in by_phase}
    if {"evaluate", "checkpoint"} <= seen:
        assert not left.at_least
        assert left.seconds == pytest.approx(to_come)
    else:
        assert left.at_least
        assert left.seconds <= to_come * (1 + 1e-9)


def test_no_jump_after_an_evaluation_and_none_by_a_slow_first_round():
    plain = np.random.default_rng(0).uniform(1.8, 2.2, 200).tolist()
    plain[0], plain[90] = 40.0, 30.0  # warms up; another program was at work
    seconds = schedule(200, 20, 10, plain, (60.0, 5.0))
    left = [time_left(seconds[:done], 200, 20, 10).seconds for done in range(21, 200)]
    to_come = [sum(sum(s.values()) for s in seconds[done:]) for done in range(21, 200)]
    assert all(abs(a - b) < 0.15 * b + 35 for a, b in zip(left, to_come, strict=True))
    for done, (before, after) in enumerate(pairwise(left), start=22):
        step = 2 + 60 * (done % 20 == 0) + 5 * (done % 10 == 0)
        assert before - after == pytest.approx(step, abs=0.05 * before), done


def test_rounds_that_wait_for_a_slow_client_are_not_forgotten():
    """A fifth of the rounds takes a minute; a median would say a third of the truth."""
    rng = np.random.default_rng(1)
    plain = np.where(rng.random(400) < 0.2, 60.0, 5.0).tolist()
    seconds = schedule(400, 0, 0, plain, (0.0, 0.0))
    shares = [
        time_left(seconds[:done], 400, 0, 0).seconds / sum(plain[done:]) for done in range(40, 300)
    ]
    assert 0.8 < np.mean(shares) < 1.2


def test_an_estimate_is_made_between_the_first_round_and_the_last():
    assert time_left([], 10, 2, 2) is None
    assert time_left([{"train": 1.0}] * 10, 10, 2, 2) is None


@pytest.mark.parametrize(
    "seconds, at_least, text",
    [
        (0.2, False, "a few seconds left"),
        (0.2, True, "at least a few seconds left"),
        (12, False, "about 10 s left"),
        (57, False, "about 55 s left"),
        (59, False, "about 1 min left"),
        (200, True, "at least 3 min left"),
        (3560, False, "about 59 min left"),
        (3590, False, "about 1 h left"),
        (8700, False, "about 2 h 20 min left"),
        (35000, False, "about 9 h 40 min left"),
        (36500, False, "about 10 h left"),
        (171000, False, "about 2 days left"),
        (900000, False, "about 10 days left"),
    ],
)
def test_in_words(seconds, at_least, text):
    assert str(TimeLeft(seconds, at_least)) == text


def record(number: int, score: float | None = None) -> dict:
    metrics = None if score is None else {"map_at_10": score}
    return {"round": number, "loss": 2.0, "clients": 3, "seconds": {"train": 90.0}} | {
        "metrics": metrics
    }


def test_no_half_minute_is_silent(caplog, monkeypatch):
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    with caplog.at_level(logging.INFO):
        on_round = progress.log_rounds("a run", Config(rounds=9, eval_every=0))
        for number in range(1, 9):
            now += 12
            on_round(record(number))
        on_round(record(9, 0.25))
    assert caplog.messages == [
        "a run  round 3/9  loss 2.000  at least 9 min left",
        "a run  round 6/9  loss 2.000  at least 4 min left",
        "a run  round 9/9  loss 2.000  MAP@10 0.250",
    ]


def test_the_log_of_a_federation_says_what_is_left():
    left = progress.estimate(Config(rounds=4, eval_every=0))
    assert line(record(1), 4, left(record(1))).endswith("90.0 s  at least 4 min left")
    for number in (2, 3, 4):
        said = line(record(number), 4, left(record(number)))
    assert said.endswith("90.0 s")
