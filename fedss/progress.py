"""Progress of a run on a terminal, or in lines where there is none."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

from fedss.config import Config
from fedss.pace import TimeLeft, time_left
from fedss.records import Record

_SILENCE = 30.0  # seconds without an evaluation after which a round is told of


@contextmanager
def show_progress(label: str, config: Config) -> Iterator[Callable[[Record], None]]:
    """Gives a function to call with each round's record; shows on stderr.

    On a terminal a bar with loss, retrieval and the time left; elsewhere a line per evaluation,
    and per round where none was written for half a minute.
    """
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}  MAP@10 {task.fields[map]}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
        console=console,
        disable=not console.is_terminal,
    )
    task = bar.add_task(label, total=config.rounds, loss="–", map="–", left="")
    left, last = estimate(config), time.monotonic()

    def on_round(record: Record) -> None:
        nonlocal last
        found = record["metrics"] and f"{record['metrics']['map_at_10']:.3f}"
        remaining, loss = str(left(record) or ""), f"{record['loss']:.3f}"
        bar.update(task, completed=record["round"], loss=loss, left=remaining)
        if found:
            bar.update(task, map=found)
        if not console.is_terminal and (found or time.monotonic() - last >= _SILENCE):
            last = time.monotonic()
            parts = [label, f"round {record['round']}/{config.rounds}", f"loss {loss}"]
            parts += [f"MAP@10 {found}"] if found else []
            parts += [remaining] if remaining else []
            print("  ".join(parts), file=sys.stderr, flush=True)

    with bar:
        yield on_round


def estimate(config: Config) -> Callable[[Record], TimeLeft | None]:
    """Gives a function to call with each round's record, which says what is left of the run."""
    seconds = []

    def left(record: Record) -> TimeLeft | None:
        seconds.append(record["seconds"])
        return time_left(seconds, config.rounds, config.eval_every, config.checkpoint_every)

    return left
