"""benchmarks/omniglot.py: what is called tuned has its optimum inside what was tried."""

import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from common import search, step
from omniglot import DRAWERS, FEDAWS, ONE_CLASS, STEPS


@pytest.mark.parametrize("off", [0.01, 1.0, 30.0])
def test_the_search_ends_where_each_setting_was_tried_higher_and_lower(off):
    """A hill with its top at ``off`` times the start, in every setting."""

    def judge(settings):
        return -sum(
            (math.log(settings[k] / (off * FEDAWS[k])) / math.log(STEPS[k])) ** 2 for k in FEDAWS
        )

    trials = search(FEDAWS, judge, STEPS)
    best = max(trials, key=lambda trial: trial["map_at_10"])
    tried = [tuple(trial["settings"].values()) for trial in trials]
    assert len(set(tried)) == len(tried) < 60
    for name in FEDAWS:
        assert abs(math.log(best["settings"][name] / (off * FEDAWS[name]))) <= math.log(STEPS[name])
        for factor in (STEPS[name], 1 / STEPS[name]):
            beside = step(best["settings"], name, factor)
            assert tuple(beside.values()) in tried
            assert judge(beside) <= best["map_at_10"]


def test_every_method_has_a_place_to_start():
    for regime in (DRAWERS, ONE_CLASS):
        assert regime.start.keys() == {m for methods in regime.rounds.values() for m in methods}
        assert all(STEPS.keys() >= start.keys() for start in regime.start.values())
