"""Progress of a run on a terminal, or in lines where there is none."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.progress import Progress, ProgressColumn, Task, TimeElapsedColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedss.config import Config
from fedss.log import show_progress_line
from fedss.runs.eta import TimeLeft, time_left
from fedss.runs.records import Record
from fedss.text import encodable, printable

_SILENCE = 30.0  # seconds without an evaluation after which a round is told of
_GAP = "  "
_BAR = range(8, 41)  # its widths
_DROPPED = ("left", "label", "map", "clock", "loss")


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


class _Line(ProgressColumn):
    """One line that never breaks; a bar takes what room there is beside a label."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console, self._clock = console, TimeElapsedColumn()

    def render(self, task: Task) -> RenderableType:
        parts = {
            "label": encodable(printable(task.description), self._console.encoding),
            "round": f"{task.completed:.0f}/{task.total or 0:.0f}",
            "loss": f"loss {task.fields['loss']}",
            "map": f"MAP@10 {task.fields['map']}",
            "clock": self._clock.render(task).plain,
            "left": task.fields["left"],
        }
        width = self._console.width - 1
        shown = kept(parts, width)
        room = width - cell_len(_GAP.join((*shown.values(), "")))
        grid = Table.grid(padding=(0, len(_GAP), 0, 0))
        cells: list[RenderableType] = [Text(text, no_wrap=True) for text in shown.values()]
        if "label" in shown and room >= _BAR[0]:
            size = min(room, _BAR[-1])
            place = list(shown).index("round")
            cells.insert(place, ProgressBar(task.total, task.completed, width=size))
        grid.add_row(*cells)
        return grid


@contextmanager
def show_progress(label: str, config: Config) -> Iterator[Callable[[Record], None]]:
    """Gives a function to call with each round's record; shows on stderr.

    On a terminal a bar with loss, retrieval and the time left; elsewhere a line per evaluation,
    and per round where none was written for half a minute. A line that cannot be written ends no
    training.
    """
    console = Console(stderr=True)
    bar = Progress(_Line(console), console=console, disable=not console.is_terminal)
    task = bar.add_task(label, total=config.rounds, loss="–", map="–", left="")
    left, last = estimate(config), time.monotonic()

    def on_round(record: Record) -> None:
        nonlocal last
        map_at_10 = f"{record['metrics']['map_at_10']:.3f}" if record["metrics"] else ""
        remaining, loss = str(left(record) or ""), f"{record['loss']:.3f}"
        bar.update(task, completed=record["round"], loss=loss, left=remaining)
        if map_at_10:
            bar.update(task, map=map_at_10)
        if not console.is_terminal and (map_at_10 or time.monotonic() - last >= _SILENCE):
            last = time.monotonic()
            parts = [label, f"round {record['round']}/{config.rounds}", f"loss {loss}"]
            parts += [map_at_10 and f"MAP@10 {map_at_10}", remaining]
            show_progress_line(_GAP.join(filter(None, parts)), record)

    with bar:
        yield on_round


def estimate(config: Config) -> Callable[[Record], TimeLeft | None]:
    """Gives a function to call with each round's record, which says what is left of the run."""
    seconds = []

    def left(record: Record) -> TimeLeft | None:
        seconds.append(record["seconds"])
        return time_left(seconds, config.rounds, config.eval_every, config.checkpoint_every)

    return left
