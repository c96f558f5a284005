"""Two worker threads, and two ranks of torchrun, against one: how much faster is a round?

    python benchmarks/distributed.py            (about 6 minutes; --short: one)

On two cores that nothing else uses. Each participant is a whole ``fedss.train`` in processes of its
own, records and all, and the participants take turns round by round, so that whatever else the
machine does hits all alike. A ratio is the median over rounds of one worker's time by the others'
in the same turn; the first rounds, in which memory grows, are left out.

The jobs: 600 clients of 30 random grayscale images (15 own classes of n = 964, 2 images each),
full softmax, 16 clients a round, batches of 10, four blocks of [3 x 3 convolution of 64 channels,
GroupNorm, ReLU, max-pool], d = 64. In ``common`` images are 28 x 28 and clients train one epoch,
3 steps; in ``heavy`` 56 x 56 and four epochs.

Writes ``benchmarks/results/distributed.txt`` (not with --short).
"""

import json
import os
import signal
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import common
import numpy as np
import torch
from job import CLIENTS, IMAGES, settings
from network import network

import fedss
from fedss.runs.records import Record

JOBS = {
    "common": {"side": 28, "epochs": 1, "rounds": 30},
    "heavy": {"side": 56, "epochs": 4, "rounds": 12},
}
PARTICIPANTS = {"1 worker": (1, 1), "2 workers": (1, 2), "2 ranks": (2, 1)}
"""Ranks, and workers of each."""
CLASSES, WARM = 964, 3


def dataset(side: int) -> fedss.Dataset:
    labels = common.paired_labels(CLIENTS, IMAGES, CLASSES).ravel()
    labels[: 2 * CLASSES] = np.repeat(np.arange(CLASSES), 2)  # every class is somebody's
    clients, few = np.repeat(np.arange(CLIENTS), IMAGES), np.repeat(np.arange(2), 2)
    train = common.named_images(common.random_pixels(len(labels), side), labels, clients)
    test = common.named_images(common.random_pixels(4, side), few, np.zeros(4, np.int64), "unseen")
    return fedss.Dataset("random", train, fedss.RetrievalTask(test))


def take_part(job: str, workers: int, rounds: int, out: str) -> None:
    """Train; before each round wait for a line on stdin, after it print its seconds."""
    side, epochs = JOBS[job]["side"], JOBS[job]["epochs"]
    config = fedss.Config(**settings("full", rounds), local_epochs=epochs, workers=workers)
    turn = time.perf_counter()

    def take_turn(record: Record) -> None:
        nonlocal turn
        print(
            json.dumps({"seconds": time.perf_counter() - turn, "loss": record["loss"]}), flush=True
        )
        sys.stdin.readline()
        turn = time.perf_counter()

    rank = os.environ.get("RANK", "0")
    Path(f"{out}.{rank}.pid").write_text(str(os.getpid()))
    if rank == "0":
        print(json.dumps({}), flush=True)
        sys.stdin.readline()
    torch.manual_seed(0)
    fedss.train(config, out, data=dataset(side), backbone=network(side=side), on_round=take_turn)


def measure(job: str, rounds: int) -> dict[str, list[dict[str, float]]]:
    """What each participant says of each round."""
    timings: dict[str, list[dict[str, float]]] = {name: [] for name in PARTICIPANTS}
    with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
        folder = Path(place)

        def started(name: str) -> common.Participant:
            ranks, workers = PARTICIPANTS[name]
            torchrun = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
            command = [
                sys.executable,
                *(torchrun if ranks > 1 else []),
                *common.job_command("take_part", job, workers, rounds, folder / name),
            ]
            return stack.enter_context(common.participant(name, command, folder, {}))

        running = {name: started(name) for name in PARTICIPANTS}
        for round in range(rounds):
            for name in common.rotated([*PARTICIPANTS], round):
                signal_all(folder, name, signal.SIGCONT)
                timings[name].append(running[name].turn())
                # Only rank 0 waits for its turn: others would begin the next round before it.
                signal_all(folder, name, signal.SIGSTOP)
        for name, process in running.items():
            signal_all(folder, name, signal.SIGCONT)
            process.finish()
    return timings


def signal_all(folder: Path, name: str, number: signal.Signals) -> None:
    for path in folder.glob(f"{name}.*.pid"):
        os.kill(int(path.read_text()), number)


def table(job: str, timings: dict[str, list[dict[str, float]]]) -> list[str]:
    lines = [f"{job}: {JOBS[job]['side']} x {JOBS[job]['side']}, {JOBS[job]['epochs']} epochs"]
    seconds = {name: [turn["seconds"] for turn in turns[WARM:]] for name, turns in timings.items()}
    for name, own in seconds.items():
        ratios = [one / other for one, other in zip(seconds["1 worker"], own, strict=True)]
        low, middle, high = np.percentile(ratios, [25, 50, 75])
        apart = max(
            abs(one["loss"] - other["loss"])
            for one, other in zip(timings["1 worker"], timings[name], strict=True)
        )
        lines.append(
            f"  {name:<10} {statistics.median(own):7.3f} s a round   1 worker / this: "
            f"{middle:.2f} ({low:.2f} to {high:.2f})   losses differ by {apart:.1e} at most"
        )
    return lines


def main() -> None:
    options = common.parser(__doc__, short="the common job, 8 rounds, no file").parse_args()
    report = common.Report(
        "A round with two workers or two ranks against one; quartiles in brackets"
    )
    for job in ["common"] if options.short else JOBS:
        report.add(*table(job, measure(job, 8 if options.short else JOBS[job]["rounds"])), "")
    report.write(unless=options.short)


if __name__ == "__main__":
    common.run_script(main, take_part=take_part)
