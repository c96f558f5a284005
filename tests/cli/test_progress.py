"""Progress on a terminal: bars drawn from what the library logs."""

import io
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.progress import Progress as Bars

from fedss.cli.progress import TaskLine, kept, progress_bars
from fedss.config import Config
from fedss.log import Progress, progress_log, show_on_stderr
from fedss.runs.progress import log_rounds


def of_round(number: int, loss: float, map_at_10: float | None) -> Any:
    metrics = None if map_at_10 is None else {"map_at_10": map_at_10}
    return {"round": number, "loss": loss, "metrics": metrics, "seconds": {"train": 1.0}}


RECORD = of_round(1, 2.0, 0.5)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch) -> Iterator[Terminal]:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    stream = Terminal()
    undo = show_on_stderr()
    yield stream
    undo()


@contextmanager
def command(stream: Terminal) -> Iterator[None]:
    """What a command is run in; pytest gives a test another stderr than its fixtures."""
    with redirect_stderr(stream), progress_bars():
        yield


def plain(stream: io.StringIO) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())


def test_a_run_is_a_bar_that_stays_with_its_figures(terminal):
    with command(terminal):
        on_round = log_rounds("fedss seed 0", Config(rounds=2))
        on_round(RECORD)
        on_round(of_round(2, 1.5, None))
        print("after")
    shown = plain(terminal)
    assert "0/2" in shown
    assert "MAP@10 –" in shown
    # What was measured last stays.
    last = [line for line in re.split(r"[\r\n]+", shown) if "fedss seed 0" in line][-1]
    assert "2/2  loss 1.500  MAP@10 0.500" in last
    assert "round 1/2" not in shown


def test_a_run_after_another_has_a_bar_of_its_own(terminal):
    with command(terminal):
        for label in ("run 1 of 2", "run 2 of 2"):
            log_rounds(label, Config(rounds=1))(RECORD)
    shown = plain(terminal)
    assert all(label in shown for label in ("run 1 of 2", "run 2 of 2"))


def test_images_done_leave_no_bar(terminal):
    with command(terminal):
        log = progress_log()
        for done in (1, 2, 2):
            log(Progress("photos", done, 2, "images"), False)
    *_, last = terminal.getvalue().split("photos")
    assert "\x1b[2K" in last


def test_what_says_no_progress_moves_no_bar(terminal):
    with command(terminal):
        logging.getLogger("fedss.progress").info("not a step")
    assert "not a step" not in plain(terminal)


def test_bars_are_undone_whatever_ends_a_command(terminal):
    logger = logging.getLogger("fedss.progress")
    before = list(logger.handlers), logger.level, logger.propagate

    def interrupted() -> None:
        with command(terminal):
            log_rounds("fedss seed 0", Config(rounds=2))(RECORD)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (list(logger.handlers), logger.level, logger.propagate) == before
    assert terminal.getvalue().endswith("\n\x1b[?25h")


def test_a_terminal_that_is_gone_ends_no_work(terminal, monkeypatch):
    def write(text: str) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(terminal, "write", write)
    with command(terminal):
        log_rounds("fedss seed 0", Config(rounds=2))(RECORD)


PARTS = {
    "label": "run 1 of 4: fedss seed 0",
    "round": "120/120",
    "loss": "loss 6.294",
    "map": "MAP@10 0.107",
    "clock": "1:20:01",
    "left": "at least a few seconds left",
}


@pytest.mark.parametrize(
    "width, gone",
    [
        (97, set()),
        (96, {"left"}),
        (68, {"left"}),
        (67, {"left", "label"}),
        (42, {"left", "label"}),
        (41, {"left", "label", "map"}),
        (27, {"left", "label", "map", "clock"}),
        (18, {"left", "label", "map", "clock", "loss"}),
        (3, {"left", "label", "map", "clock", "loss"}),
    ],
)
def test_a_progress_line_drops_its_parts_in_order(width, gone):
    assert list(kept(PARTS, width)) == [name for name in PARTS if name not in gone]


@pytest.mark.parametrize("width", [200, 100, 80, 60, 40, 20])
def test_a_progress_line_shows_each_part_whole_or_not_at_all(width):
    console = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None)
    bar = Bars(TaskLine(console), console=console)
    label = "run 10 of 12: [fedss]\x1b seed 0"
    task = bar.add_task(
        label, total=120, loss="loss 6.294", map="MAP@10 0.107", left="about 3 min left"
    )
    bar.update(task, completed=7)
    with console.capture() as shown:
        console.print(bar.get_renderable())
    (line,) = shown.get().splitlines()
    assert cell_len(line) <= width
    assert "…" not in line
    words = re.split(r" {2,}", line.strip())
    whole = {r"run 10 of 12: [fedss]\x1b seed 0", "7/120", "loss 6.294", "MAP@10 0.107"}
    whole |= {"-:--:--", "0:00:00", "about 3 min left"}
    assert {word for word in words if not set(word) <= set("━╸╺")} <= whole
    assert "7/120" in words
    if width >= 80:
        assert {"loss 6.294", "MAP@10 0.107"} < set(words)
        assert {"-:--:--", "0:00:00"} & set(words)
