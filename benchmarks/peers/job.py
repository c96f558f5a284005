"""The common job: what every participant reads, and when it is its turn. Needs numpy alone.

600 clients hold 30 gray images of 28 x 28 each, of 15 own classes. A round: 16 clients each take
one pass of SGD over theirs, batch 10, on the loss -log softmax(16 cos(h, w))_y; the server takes
the mean of their weights. The schedule (who, in which order, which classes) is drawn beforehand and
the same for all, so that all must end at the same weights.
"""

import ctypes
import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

BLOCKS, WIDTH, GROUPS, DIM = 4, 64, 8, 64
SCALE, LR, BATCH, COHORT, CLIENTS, IMAGES = 16.0, 0.1, 10, 16, 600, 30


@dataclass(frozen=True)
class Job:
    """A job's folder.

    Attributes:
        pixels: uint8 [clients, 30, 1, 28, 28].
        labels: int64 [clients, 30].
        theta: float32 [P], the network's parameters in the order of :func:`shapes`.
        rows: float32 [n, 64], one class row per class.
        cohorts: int64 [rounds, 16], the clients of each round.
        orders: int64 [rounds, 16, 30], each client's images in the order of its batches.
        samples: int64 [rounds, 16, |S|], the classes of each client; None: all n.
        log_q: float32, as ``samples``: log of their inclusion probabilities.
    """

    folder: Path
    settings: dict[str, Any]
    pixels: np.ndarray
    labels: np.ndarray
    theta: np.ndarray
    rows: np.ndarray
    cohorts: np.ndarray
    orders: np.ndarray
    samples: np.ndarray | None
    log_q: np.ndarray | None


def read_job(folder: Path) -> Job:
    """The job that ``engine.py`` wrote."""

    def array(name: str) -> Any:
        path = folder / f"{name}.npy"
        # Of many class rows, a participant may need few.
        return np.load(path, mmap_mode="c") if path.exists() else None

    names = ("pixels", "labels", "theta", "rows", "cohorts", "orders", "samples", "log_q")
    told = json.loads((folder / "job.json").read_text())
    return Job(folder, told, *(array(name) for name in names))


def settings(method: str, rounds: int) -> dict[str, Any]:
    """The job as fields of ``fedss.Config``."""
    return {
        # The loops have the published loss.
        "method": "fedss-published" if method == "fedss" else method,
        "rounds": rounds,
        "scale": SCALE,
        "clients_per_round": COHORT,
        "batch_size": BATCH,
        "client_lr": LR,
        "class_row_lr": LR,
        "lr_schedule": "constant",
        "server_optimizer": "sgd",
        "normalize_rows": False,
        "embedding_size": DIM,
        "eval_every": 0,
        "checkpoint_every": 10**6,
    }


def shapes() -> list[tuple[int, ...]]:
    """Of the network's parameters: convolution and norm of each block, then the linear layer."""
    shapes: list[tuple[int, ...]] = []
    for block in range(BLOCKS):
        shapes += [(WIDTH, WIDTH if block else 1, 3, 3), (WIDTH,), (WIDTH,), (WIDTH,)]
    return [*shapes, (DIM, WIDTH), (DIM,)]


def turns() -> Callable[[], None]:
    """What a participant calls before each round, and once after the last.

    It says on stdout how long the round since the last call took, in seconds of the clock and of
    this process's threads, and waits on stdin for its next turn. A participant's arguments are the
    job's folder, a number of threads, and its name.
    """
    out, began = sys.stdout, [0.0, 0.0]
    sys.stdout = sys.stderr  # what a framework prints is no answer

    def turn() -> None:
        wall, cpu = time.perf_counter() - began[0], time.process_time() - began[1]
        print(json.dumps({"wall": wall, "cpu": cpu}), file=out, flush=True)
        if not sys.stdin.readline():
            sys.exit("the driver is gone")
        began[:] = time.perf_counter(), time.process_time()

    return turn


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for the next step, in place of mapping it anew."""
    libc = ctypes.CDLL(None)
    for parameter, value in ((-3, 2**30), (-1, 2**31 - 1), (-2, 2**26)):
        assert libc.mallopt(parameter, value)


def finish(job: Job, theta: np.ndarray, rows: np.ndarray, processes: int = 1) -> None:
    """Leave the weights for the driver; and the peak of resident memory, if that is one process."""
    name = sys.argv[3]
    np.savez(job.folder / f"{name}.npz", theta=theta, rows=rows)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    answer = {"peak_mb": peak if processes == 1 else None}
    (job.folder / f"{name}.json").write_text(json.dumps(answer))
