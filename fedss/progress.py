"""Progress of a run on a terminal, or in lines where there is none."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fedss.records import Record


@contextmanager
def show_progress(label: str, rounds: int) -> Iterator[Callable[[Record], None]]:
    """Gives a function to call with each round's record; shows on stderr.

    On a terminal a bar with loss, retrieval and the time left; elsewhere a line per evaluation.
    """
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}  MAP@10 {task.fields[map]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    task = bar.add_task(label, total=rounds, loss="–", map="–")

    def on_round(record: Record) -> None:
        loss = f"{record['loss']:.3f}"
        bar.update(task, completed=record["round"], loss=loss)
        if record["metrics"]:
            found = f"{record['metrics']['map_at_10']:.3f}"
            bar.update(task, map=found)
            if not console.is_terminal:
                print(
                    f"{label}  round {record['round']}/{rounds}  loss {loss}  MAP@10 {found}",
                    file=sys.stderr,
                    flush=True,
                )

    with bar:
        yield on_round
