"""Runs without their page, for tests that do not read it: to draw it takes twice a small run."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest


def _leave_empty(folder: Path) -> Path:
    (folder / "report.html").write_text("")
    return folder / "report.html"


@contextmanager
def empty_reports() -> Iterator[None]:
    """Runs of this process leave an empty ``report.html``."""
    with patch("fedss.training.experiment.write_report", _leave_empty):
        yield


@pytest.fixture(autouse=True)
def an_empty_report(request: pytest.FixtureRequest) -> Iterator[None]:
    """``empty_reports`` for the tests of a folder whose conftest imports it.

    But for those with the mark ``report``. Pages of runs are read in tests/report, tests/cli and
    tests/test_pins.py, too.
    """
    if request.node.get_closest_marker("report"):
        yield
        return
    with empty_reports():
        yield
