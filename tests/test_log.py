"""What fedss logs: lines on stderr where it runs as a program, records where a host wants them."""

import logging
from typing import Any

import pytest

from fedss.config import Config
from fedss.log import Progress, StderrLines, progress_log, show_on_stderr
from fedss.runs.progress import log_rounds


def of_round(number: int, loss: float, map_at_10: float | None) -> Any:
    metrics = None if map_at_10 is None else {"map_at_10": map_at_10}
    return {"round": number, "loss": loss, "metrics": metrics, "seconds": {"train": 1.0}}


RECORD = of_round(1, 2.0, 0.5)


def test_a_host_that_shows_info_gets_progress_as_records(capsys, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("fedss"), "handlers", [])
    with caplog.at_level(logging.INFO):
        on_round = log_rounds("a run", Config(rounds=2))
        on_round(RECORD)
        on_round(of_round(2, 2.0, None))
    assert capsys.readouterr().err == ""
    # The start and a round without an evaluation are told of at DEBUG.
    (record,) = caplog.records
    assert record.name == "fedss.progress"
    assert record.getMessage().startswith("a run  round 1/2  loss 2.000  MAP@10 0.500")
    assert record.progress.record is RECORD


def test_nothing_is_shown_where_logging_is_not_configured(capsys, monkeypatch):
    monkeypatch.setattr(logging.getLogger("fedss"), "handlers", [])
    log_rounds("a run", Config(rounds=1))(RECORD)
    assert capsys.readouterr() == ("", "")


def test_a_handler_of_the_host_on_stderr_is_enough(capsys):
    root = logging.getLogger()
    theirs = logging.StreamHandler()  # As basicConfig() makes it: it takes what it gets.
    root.addHandler(theirs)
    undo = show_on_stderr()
    try:
        log_rounds("a run", Config(rounds=1))(RECORD)
    finally:
        undo()
        root.removeHandler(theirs)
    assert capsys.readouterr().err.count("round 1/1") == 1


def test_a_handler_of_the_host_elsewhere_is_not(shown, capsys, tmp_path):
    root, theirs = logging.getLogger(), logging.FileHandler(tmp_path / "log")
    root.addHandler(theirs)
    log_rounds("a run", Config(rounds=1))(RECORD)
    root.removeHandler(theirs)
    theirs.close()
    assert capsys.readouterr().err.count("round 1/1") == 1
    assert (tmp_path / "log").read_text().count("round 1/1") == 1


def test_a_stderr_without_an_encoding_will_do(shown, monkeypatch):
    class Tee:
        text = ""

        def write(self, text: str) -> None:
            self.text += text

        def flush(self) -> None:
            pass

    monkeypatch.setattr("sys.stderr", tee := Tee())
    logging.getLogger("fedss.any").info("é")
    assert tee.text == "fedss: é\n"


def test_half_a_minute_of_silence_is_long_enough(shown, capsys, monkeypatch):
    times = iter([100.0, 101.0, 130.0, 130.0, 131.0, 160.0, 160.0])
    monkeypatch.setattr("fedss.log.time.monotonic", lambda: next(times))
    tell = progress_log()
    for done in (1, 2, 3, 4):
        tell(Progress("photos", done, 9, "images"), False)
    assert capsys.readouterr().err == "photos  images 2/9\nphotos  images 4/9\n"


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


def test_a_notebook_has_a_bar_for_each_task_and_cell(capsys, monkeypatch):
    display = pytest.importorskip("IPython.display", reason="no IPython")
    drawn: list[list[str]] = []

    class Handle:
        def __init__(self, texts: list[str]) -> None:
            self.texts = texts

        def update(self, data: dict[str, str], raw: bool) -> None:
            self.texts.append(data["text/html"])

    def show(data: dict[str, str], raw: bool, display_id: bool) -> Handle:
        drawn.append([data["text/html"]])
        return Handle(drawn[-1])

    shell = type("Shell", (), {"kernel": None, "execution_count": 1})()
    # A test before may have left lines on stderr.
    monkeypatch.setattr(logging.getLogger("fedss"), "handlers", [])
    monkeypatch.setattr(display, "display", show)
    monkeypatch.setattr("fedss.log._notebook", lambda: shell)
    monkeypatch.setattr("fedss.log.time.monotonic", iter(range(0, 10**6, 60)).__next__)
    logger = logging.getLogger("fedss.progress")
    before = logger.level, logger.propagate, list(logger.handlers)
    undo = show_on_stderr()
    try:
        tell = progress_log()
        for done in (0, 1, 2):
            tell(Progress("<a>", done, 3, "images"), False)
        shell.execution_count = 2  # interrupted, and run again
        for done in (2, 3):
            tell(Progress("<a>", done, 3, "images"), True)
        tell(Progress("<a>", 3, 3, "images"), True)  # it is done, and was before
        tell(Progress("b", 1, 2, "round"), False)
        tell(Progress("b", 2, 2, "round"), False)
        logging.getLogger("fedss.any").info("a line")
    finally:
        undo()
    assert [len(texts) for texts in drawn] == [3, 2, 2]
    assert 'value="2" max="3"' in drawn[0][-1]
    assert "&lt;a&gt;  images 2/3" in drawn[0][-1]
    assert drawn[1][-1] == ""
    assert "b  round 2/2" in drawn[2][-1]
    assert capsys.readouterr().err == "fedss: a line\n"
    assert (logger.level, logger.propagate, list(logger.handlers)) == before
