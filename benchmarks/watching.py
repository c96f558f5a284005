"""What it costs a run to be watched: TensorBoard's scalars, images and projector, the time left.

    python benchmarks/watching.py                     (half a minute)

Each is called as a run calls it, on made-up images and embeddings; seconds are those of this
process's processor, since another thread writes the events. For comparison the evaluation's search
(`fedss.evaluation.task.score`) on the same embeddings, without making them.

Writes ``benchmarks/results/watching.txt``.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import common
import numpy as np
import torch

from fedss.data import RetrievalTask
from fedss.evaluation.task import score
from fedss.runs.eta import time_left
from fedss.runs.records import Record
from fedss.runs.tensorboard import add_neighbours, add_projection, add_scalars, open_writer

ROUNDS = 500


def seconds(work: Callable[[], object], times: int = 1) -> float:
    return common.timed(lambda: [work() for _ in range(times)])[1].cpu / times


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def made_up(count: int, side: int, channels: int) -> RetrievalTask:
    # Smooth, as images are: noise cannot be compressed.
    pixels = common.random_pixels(count, -(-side // 8), channels)
    pixels = np.repeat(np.repeat(pixels, 8, -1), 8, -2)[..., :side, :side]
    return RetrievalTask(
        common.named_images(pixels, np.arange(count) % (count // 20), np.zeros(count, np.int64))
    )


def measure(task: RetrievalTask, d: int) -> list[str]:
    embeddings = torch.randn(len(task.query), d, generator=torch.Generator().manual_seed(0))
    embedded = torch.nn.functional.normalize(embeddings, dim=1), None
    by_phase = {"request": 0.1, "train": 1.0, "aggregate": 0.1}
    record: dict[str, Any] = {
        "round": 1,
        "loss": 1.0,
        "clients": 20,
        "examples": 640,
        "bytes_down": 10**6,
    }
    record |= {"bytes_up": 10**6, "class_rows": 1280, "client_lr": 0.05, "class_row_lr": 2.0}
    record |= {"seconds": by_phase, "metrics": None}
    rows = []
    with tempfile.TemporaryDirectory() as place, open_writer(Path(place), 1) as board:
        folder = Path(place) / "tensorboard"

        def row(name: str, work: Callable[[], object], times: int) -> None:
            board.flush()
            before, took = size(folder), seconds(work, times)
            board.flush()
            grown = (size(folder) - before) / times
            rows.append(f"{name:<38}{took * 1000:>10.2f} ms{grown / 1000:>10.1f} kB")

        row("scalars, a round", lambda: add_scalars(board, cast(Record, record), False), ROUNDS)
        row("neighbours, an evaluation", lambda: add_neighbours(board, task, embedded, 0, 1), 10)
        row("projector, at the end", lambda: add_projection(board, task, embedded, 0, 1), 1)
        row("(the evaluation's own search)", lambda: score(task, *embedded), 1)
    recorded = [by_phase] * ROUNDS
    took = seconds(lambda: time_left(recorded, 2 * ROUNDS, 20, 10), ROUNDS)
    rows.append(f"{'time left, a round':<38}{took * 1000:>10.2f} ms")
    return rows


def main() -> None:
    common.parser(__doc__).parse_args()
    torch.set_num_threads(1)
    report = common.Report(
        "Watching: what TensorBoard's files and the time left cost a run", hardware="one thread"
    )
    report.add(
        "Seconds of the processor; kB that the folder grows by. The projector's first call makes",
        "some folders; calls of all others are averaged.",
    )
    for count, side, channels, d in ((10_180, 28, 1, 64), (2_000, 224, 3, 512)):
        report.add(
            "",
            f"{count:,} test images of {side} x {side}, {channels} channels, d = {d}",
            *measure(made_up(count, side, channels), d),
        )
    report.write()


if __name__ == "__main__":
    main()
