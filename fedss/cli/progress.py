"""Progress bars on a terminal, drawn from what the library logs."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.progress import Progress as Bars
from rich.progress import ProgressColumn, Task, TimeElapsedColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedss.log import Progress
from fedss.runs.eta import TimeLeft
from fedss.text import encodable, printable

_GAP = "  "
_WIDTHS = range(8, 41)  # of a bar
_DROPPED = ("left", "label", "map", "clock", "loss")
# Of training, before there are any.
_UNKNOWN = {"loss": "loss –", "map": "MAP@10 –", "left": ""}


@contextmanager
def progress_bars() -> Iterator[None]:
    """Shows what is logged of long tasks as bars, in place of lines, where stderr is a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    logger, handler = logging.getLogger("fedss.progress"), BarHandler(console)
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
        handler.end()


class BarHandler(logging.Handler):
    """Draws the task that is under way; what cannot be drawn ends no work.

    The bar of a run stays when it is done, with its figures; another one vanishes.
    """

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        self._bars: Bars | None = None
        self._of = ""

    def emit(self, record: logging.LogRecord) -> None:
        """Move the bar of a task; a new task gets a new one."""
        progress = record.__dict__.get("progress")
        if not isinstance(progress, Progress):
            return
        try:
            done = progress.done >= progress.total
            if self._of != progress.task and not done:
                self.end()
                self._begin(progress)
            if self._bars is not None:
                shown: dict[str, Any] = {n: text for n, text in progress.figures.items() if text}
                # What is known no more is shown no more; what was measured last stays.
                shown.setdefault("left", "")
                number = self._bars.task_ids[0]
                self._bars.update(number, completed=progress.done, **shown)
            if done:
                self.end()
        except OSError:
            pass  # Nobody reads it any more.
        except Exception:
            self.handleError(record)

    def _begin(self, progress: Progress) -> None:
        training = progress.unit == "round"
        figures: dict[str, Any] = _UNKNOWN if training else dict.fromkeys(_UNKNOWN, "")
        bars = Bars(TaskLine(self._console), console=self._console, transient=not training)
        bars.add_task(progress.task, total=progress.total, **figures)
        self._of = progress.task
        bars.start()
        self._bars = bars

    def end(self) -> None:
        """Stop drawing."""
        bars, self._bars, self._of = self._bars, None, ""
        if bars is not None:
            with suppress(OSError):
                bars.stop()


def kept(parts: Mapping[str, str], width: int) -> dict[str, str]:
    """The parts of a progress line that fit into a terminal, in their order.

    Where it is too narrow for all, these go, one after the other: the time left, the run's label,
    MAP@10, the time since the start, the loss. The round stays.
    """
    shown = {name: text for name, text in parts.items() if text}
    for name in _DROPPED:
        if cell_len(_GAP.join(shown.values())) <= width:
            break
        shown.pop(name, None)
    return shown


class TaskLine(ProgressColumn):
    """One line that never breaks; a bar takes what room there is beside a label."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console, self._clock = console, TimeElapsedColumn()

    def render(self, task: Task) -> RenderableType:
        """The line of a task with the fields ``loss``, ``map`` and ``left``."""
        parts = {
            "label": encodable(printable(task.description), self._console.encoding),
            "round": f"{task.completed:.0f}/{task.total or 0:.0f}",
            "loss": task.fields["loss"],
            "map": task.fields["map"],
            "clock": self._clock.render(task).plain,
            "left": task.fields["left"] or self._left(task),
        }
        width = self._console.width - 1
        shown = kept(parts, width)
        room = width - cell_len(_GAP.join((*shown.values(), "")))
        grid = Table.grid(padding=(0, len(_GAP), 0, 0))
        cells: list[RenderableType] = [Text(text, no_wrap=True) for text in shown.values()]
        if "label" in shown and room >= _WIDTHS[0]:
            size = min(room, _WIDTHS[-1])
            place = list(shown).index("round")
            cells.insert(place, ProgressBar(task.total, task.completed, width=size))
        grid.add_row(*cells)
        return grid

    def _left(self, task: Task) -> str:
        # A run says itself what is left of it; images all take as long.
        if task.fields["loss"] or task.time_remaining is None or task.finished:
            return ""
        return str(TimeLeft(task.time_remaining, at_least=False))
