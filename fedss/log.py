"""What fedss says while it works: records of the loggers ``fedss.*``, which a host configures.

Library code logs and never prints. The command line and Flower's apps show the records on stderr,
and so does a program that calls :func:`show_on_stderr`.
"""

import logging
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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


def show_on_stderr() -> Callable[[], None]:
    """Show what fedss logs, from INFO on, as lines on stderr.

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

    def undo() -> None:
        logger.removeHandler(handler)
        logger.setLevel(level)

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
