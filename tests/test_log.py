"""What fedss logs: lines on stderr where it runs as a program, records where a host wants them."""

import logging

import pytest

from fedss.config import Config
from fedss.log import StderrLines, show_on_stderr
from fedss.runs.progress import show_progress

RECORD = {"round": 1, "loss": 2.0, "metrics": {"map_at_10": 0.5}, "seconds": {"train": 1.0}}


def test_a_host_that_shows_info_gets_progress_as_records(capsys, caplog):
    with caplog.at_level(logging.INFO), show_progress("a run", Config(rounds=1)) as on_round:
        on_round(RECORD)
    assert capsys.readouterr().err == ""
    (record,) = caplog.records
    assert record.name == "fedss.progress"
    assert record.getMessage() == "a run  round 1/1  loss 2.000  MAP@10 0.500"
    assert record.progress is RECORD


@pytest.fixture
def shown():
    undo = show_on_stderr()
    yield
    undo()


def test_records_are_lines_that_nobody_forges(shown, capsys):
    logger = logging.getLogger("fedss.any")
    logger.info("100 %\x1b[2J")
    logger.warning("two\nfedss: done")
    try:
        raise ValueError("a\nb")
    except ValueError:
        logger.exception("it failed")
    first, *others = capsys.readouterr().err.splitlines()
    assert first == r"fedss: 100 %\x1b[2J"
    assert others[:3] == ["fedss: two", "  | fedss: done", "fedss: it failed"]
    assert others[-2:] == ["  | ValueError: a", "  | b"]


def test_it_is_shown_once_and_undone(shown):
    logger = logging.getLogger("fedss")
    handlers, level = list(logger.handlers), logger.level
    show_on_stderr()()
    assert (logger.handlers, logger.level) == (handlers, level)
    assert sum(isinstance(handler, StderrLines) for handler in handlers) == 1
