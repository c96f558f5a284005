"""What fedss says while it works: records of the loggers ``fedss.*``, which a host configures.

Library code logs and never prints. The command line and Flower's apps show the records on stderr,
and so does a program that calls :func:`show_on_stderr`.
"""

import logging
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from html import escape
from typing import Any

from fedss.text import PLAIN, printable

_PROGRESS = logging.getLogger("fedss.progress")
_SILENCE = 30.0  # seconds after which a step is told of that is not worth telling otherwise


@dataclass(frozen=True)
class Progress:
    """How far a long task is: the attribute ``progress`` of records of ``fedss.progress``.

    Attributes:
        task: its name, such as ``fedss seed 0``.
        done: steps that are done.
        total: of how many.
        unit: what a step is: ``round``, ``images``.
        figures: what else there is to show, as text by name; "" where there is nothing.
        record: of a round of training, its record.
    """

    task: str
    done: int
    total: int
    unit: str
    figures: Mapping[str, str] = field(default_factory=dict)
    record: Any = None

    def __str__(self) -> str:
        parts = self.task, f"{self.unit} {self.done}/{self.total}", *self.figures.values()
        return "  ".join(filter(None, parts))


def progress_log() -> Callable[[Progress, bool], None]:
    """A function that logs how far a task is, told whether that is worth a line.

    A step that is worth a line is logged at INFO, and so is one after half a minute without any;
    the others are logged at DEBUG.
    """
    last = time.monotonic()

    def log(progress: Progress, notable: bool = False) -> None:
        nonlocal last
        due = notable or time.monotonic() - last >= _SILENCE
        if due:
            last = time.monotonic()
        level = logging.INFO if due else logging.DEBUG
        _PROGRESS.log(level, "%s", progress, extra={"progress": progress})

    return log


class StderrLines(logging.Handler):
    """Shows a record as a line that begins with ``fedss: ``; its further lines are marked.

    No text can move the cursor or forge a line, and a failed write raises nothing.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The record's lines; of progress, which begins with the name of its run, as it is."""
        begin = "" if hasattr(record, "progress") else "fedss: "
        first, *others = super().format(record).split("\n")
        return "\n".join([begin + printable(first), *(f"  | {printable(line)}" for line in others)])

    def emit(self, record: logging.LogRecord) -> None:
        """Write the lines to what is stderr now."""
        try:
            if _host_shows(record):
                return
            text = self.format(record) + "\n"
            encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
            sys.stderr.write(text.encode(encoding, PLAIN).decode(encoding))
            sys.stderr.flush()
        except OSError:
            pass  # Nobody reads it any more.
        except Exception:
            self.handleError(record)


class NotebookBar(logging.Handler):
    """Draws the task that is under way as a bar below a notebook's cell.

    The bar of a run stays when it is done, with its figures; another one vanishes.
    """

    def __init__(self, shell: Any) -> None:
        super().__init__()
        self._shell = shell
        self._of: tuple[str, int] | None = None
        self._shown: Any = None
        self._next = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        """Move the bar; each task has one of its own, and each cell that runs it."""
        progress = record.__dict__.get("progress")
        if not isinstance(progress, Progress):
            return
        try:
            of, now = (progress.task, self._shell.execution_count), time.monotonic()
            done = progress.done >= progress.total
            if done if of != self._of else not done and now < self._next:
                return
            self._next = now + 0.1
            if of != self._of:
                from IPython.display import display

                self._of = of
                self._shown = display(_bar(progress), raw=True, display_id=True)
            else:
                gone = done and progress.unit != "round"
                nothing = {"text/html": "", "text/plain": ""}
                self._shown.update(nothing if gone else _bar(progress), raw=True)
            self._of = None if done else of
        except Exception:
            self.handleError(record)


def _bar(progress: Progress) -> dict[str, str]:
    text = printable(str(progress))
    bar = f'<progress aria-label="progress" value="{progress.done}" max="{progress.total}">'
    return {"text/html": f"{bar}</progress> <small>{escape(text)}</small>", "text/plain": text}


def _notebook() -> Any:
    """IPython's shell where a notebook's kernel runs this, else None."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return shell if hasattr(shell, "kernel") else None


def show_on_stderr() -> Callable[[], None]:
    """Show what fedss logs, from INFO on, as lines on stderr; in a notebook progress as a bar.

    Lines that a handler of the root logger writes there come in that handler's form alone.

    Returns:
        What undoes it.
    """
    logger, handler = logging.getLogger("fedss"), StderrLines()
    if any(isinstance(other, StderrLines) for other in logger.handlers):
        return lambda: None
    level = logger.level
    logger.addHandler(handler)
    if not logger.isEnabledFor(logging.INFO):
        logger.setLevel(logging.INFO)
    progress, bar, shell = (_PROGRESS.level, _PROGRESS.propagate), None, _notebook()
    if shell is not None:
        bar = NotebookBar(shell)
        _PROGRESS.addHandler(bar)
        _PROGRESS.setLevel(logging.DEBUG)
        _PROGRESS.propagate = False

    def undo() -> None:
        logger.removeHandler(handler)
        logger.setLevel(level)
        if bar is not None:
            _PROGRESS.removeHandler(bar)
            _PROGRESS.setLevel(progress[0])
            _PROGRESS.propagate = progress[1]

    return undo


def _host_shows(record: logging.LogRecord) -> bool:
    # While bars are drawn, rich has put a stream of its own in place of stderr.
    stderr = getattr(sys.stderr, "rich_proxied_file", sys.stderr)
    return any(
        isinstance(handler, logging.StreamHandler)
        and handler.stream in (stderr, sys.__stderr__)
        and record.levelno >= handler.level
        for handler in logging.getLogger().handlers
    )
