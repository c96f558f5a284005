"""An engine of one's own, as examples/own_engine.py shows it, trains."""

import numpy as np

from examples.own_engine import main


def test_an_engine_of_ones_own_trains():
    losses = main(rounds=6)
    assert all(np.isfinite(losses))
    assert losses[-1] < 0.8 * losses[0]
