"""What fedss says while it works: records of the loggers ``fedss.*``, which a host configures.

Library code logs and never prints. The command line and Flower's apps show the records as lines on
stderr. So does training that is started from Python, for its progress alone.
"""

import logging
import sys
from collections.abc import Callable

from fedss.text import PLAIN, printable


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
            text, encoding = self.format(record) + "\n", sys.stderr.encoding or "utf-8"
            sys.stderr.write(text.encode(encoding, PLAIN).decode(encoding))
            sys.stderr.flush()
        except OSError:
            pass  # Nobody reads it any more.
        except Exception:
            self.handleError(record)


def show_on_stderr() -> Callable[[], None]:
    """Show what fedss logs, from INFO on, as lines on stderr, unless the host does so already.

    Returns:
        What undoes it.
    """
    logger, handler = logging.getLogger("fedss"), StderrLines()
    if _is_shown(logger):
        return lambda: None
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)

    def undo() -> None:
        logger.removeHandler(handler)
        logger.setLevel(level)

    return undo


def show_progress_line(text: str, record: object) -> None:
    """Log where a run is; on stderr, where logging is not configured to show it.

    The round's ``record`` is the attribute ``progress`` of the log record.
    """
    logger = logging.getLogger("fedss.progress")
    if _is_shown(logger):
        logger.info(text, extra={"progress": record})
    else:
        StderrLines().handle(logging.makeLogRecord({"msg": text, "progress": record}))


def _is_shown(logger: logging.Logger) -> bool:
    return logger.isEnabledFor(logging.INFO) and logger.hasHandlers()
