"""Settings of tests that train."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def an_empty_report(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs leave an empty page: drawing it takes twice the time of a small run.

    Pages of runs are read in tests/report, tests/cli and tests/pins.py, and here where a test has
    the mark ``report``.
    """

    def write_report(folder: Path) -> Path:
        (folder / "report.html").write_text("")
        return folder / "report.html"

    if not request.node.get_closest_marker("report"):
        monkeypatch.setattr("fedss.training.experiment.write_report", write_report)
