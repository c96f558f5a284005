"""Every method, sampler, optimizer and engine trains as it did: see ``tests/pins.py``."""

import json
from typing import Any

import pytest

from tests.pins import IN_TEST, KNOWN, look, portable


def near(value: Any) -> Any:
    """Equal but for rounding, which training makes much of."""
    if isinstance(value, dict):
        return {key: near(one) for key, one in value.items()}
    return pytest.approx(value, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("name", IN_TEST)
def test_a_run_leaves_what_it_left(name):
    known, found = json.loads(KNOWN.read_text())[name], look(name, portable)
    assert found["numbers"] == near(known.pop("numbers"))
    assert found["losses"] == near(known.pop("losses"))
    assert {part: found[part] for part in known} == known
