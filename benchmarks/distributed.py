"""Two worker threads, and two ranks of torchrun, against one: how much faster is a round?

    python benchmarks/distributed.py            (about 6 minutes; --short: one)

On two cores that nothing else uses. Each participant is a whole ``fedss.train`` in processes of its
own, records and all, and the participants take turns round by round, so that whatever else the
machine does hits all alike. A ratio is the median over rounds of one worker's time by the others'
in the same turn; the first rounds, in which memory grows, are left out.

The jobs: 600 clients of 30 random grayscale pictures (15 own classes of n = 964, 2 pictures each),
full softmax, 16 clients a round, batches of 10, four blocks of [3 x 3 convolution of 64 channels,
GroupNorm, ReLU, max-pool], d = 64. In ``common`` pictures are 28 x 28 and clients train one epoch,
3 steps; in ``heavy`` 56 x 56 and four epochs.

Writes ``benchmarks/results/distributed.txt`` (not with --short).
"""

import argparse
import datetime
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omniglot import processor
from torch import nn

import fedss

RESULTS = Path(__file__).parent / "results" / "distributed.txt"
JOBS = {
    "common": {"side": 28, "epochs": 1, "rounds": 30},
    "heavy": {"side": 56, "epochs": 4, "rounds": 12},
}
PARTICIPANTS = {"1 worker": (1, 1), "2 workers": (1, 2), "2 ranks": (2, 1)}
"""Ranks, and workers of each."""
CLIENTS, CLASSES, PICTURES, CHANNELS, DIM, WARM = 600, 964, 30, 64, 64, 3


def images(labels: np.ndarray, clients: np.ndarray, side: int, names: str) -> fedss.Images:
    pixels = np.random.default_rng(0).integers(0, 256, (len(labels), 1, side, side), np.uint8)
    return fedss.Images(
        pixels,
        labels,
        clients,
        [f"{names} {i}" for i in range(labels.max() + 1)],
        [f"client {k}" for k in range(clients.max() + 1)],
        [f"{names}-{i}.png" for i in range(len(labels))],
    )


def dataset(side: int) -> fedss.Dataset:
    rng = np.random.default_rng(1)
    own = [rng.choice(CLASSES, PICTURES // 2, replace=False) for _ in range(CLIENTS)]
    labels = np.repeat(np.concatenate(own), 2)
    labels[: 2 * CLASSES] = np.repeat(np.arange(CLASSES), 2)  # every class is somebody's
    train = images(labels, np.repeat(np.arange(CLIENTS), PICTURES), side, "class")
    test = images(np.repeat(np.arange(2), 2), np.zeros(4, np.int64), side, "unseen")
    return fedss.Dataset("random", train, fedss.RetrievalTask(test))


def network(side: int) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for block in range(4):
        layers += [
            nn.Conv2d(CHANNELS if block else 1, CHANNELS, 3, padding=1),
            nn.GroupNorm(8, CHANNELS),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(CHANNELS * (side // 16) ** 2, DIM))


def take_part(job: str, workers: int, rounds: int, out: str) -> None:
    """Train; before each round wait for a line on stdin, after it print its seconds."""
    side, epochs = JOBS[job]["side"], JOBS[job]["epochs"]
    config = fedss.Config(
        method="full",
        scale=16.0,
        rounds=rounds,
        clients_per_round=16,
        local_epochs=epochs,
        batch_size=10,
        client_lr=0.1,
        class_row_lr=0.1,
        lr_schedule="constant",
        server_optimizer="sgd",
        normalize_rows=False,
        embedding_size=DIM,
        eval_every=0,
        checkpoint_every=rounds,
        workers=workers,
    )
    turn = time.perf_counter()

    def take_turn(record: dict[str, Any]) -> None:
        nonlocal turn
        print(json.dumps({"seconds": time.perf_counter() - turn, "loss": record["loss"]}))
        sys.stdout.flush()
        sys.stdin.readline()
        turn = time.perf_counter()

    rank = os.environ.get("RANK", "0")
    Path(f"{out}.{rank}.pid").write_text(str(os.getpid()))
    if rank == "0":
        print(json.dumps({}), flush=True)
        sys.stdin.readline()
    fedss.train(config, out, data=dataset(side), backbone=network(side), on_round=take_turn)


def start(job: str, name: str, rounds: int, out: Path) -> "subprocess.Popen[str]":
    ranks, workers = PARTICIPANTS[name]
    words = [sys.executable]
    if ranks > 1:
        words += ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    words += [__file__, "--take-part", job, str(workers), str(rounds), str(out)]
    process = subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    answer(process)
    return process


def answer(process: "subprocess.Popen[str]") -> dict[str, float]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"{process.args}\n{process.communicate()[1]}")
    found: dict[str, float] = json.loads(line)
    return found


def measure(job: str, rounds: int) -> dict[str, list[dict[str, float]]]:
    """What each participant says of each round."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in PARTICIPANTS}
    with tempfile.TemporaryDirectory() as folder:
        running = {name: start(job, name, rounds, Path(folder) / name) for name in PARTICIPANTS}
        for round in range(rounds):
            names = list(PARTICIPANTS)
            for name in names[round % 3 :] + names[: round % 3]:
                process = running[name]
                assert process.stdin is not None
                signal_all(Path(folder), name, signal.SIGCONT)
                process.stdin.write("\n")
                process.stdin.flush()
                found[name].append(answer(process))
                # Only rank 0 waits for its turn: others would begin the next round before it.
                signal_all(Path(folder), name, signal.SIGSTOP)
        for name, process in running.items():
            signal_all(Path(folder), name, signal.SIGCONT)
            process.communicate("\n")
    return found


def signal_all(folder: Path, name: str, number: signal.Signals) -> None:
    for path in folder.glob(f"{name}.*.pid"):
        os.kill(int(path.read_text()), number)


def table(job: str, found: dict[str, list[dict[str, float]]]) -> list[str]:
    lines = [f"{job}: {JOBS[job]['side']} x {JOBS[job]['side']}, {JOBS[job]['epochs']} epochs"]
    seconds = {name: [turn["seconds"] for turn in turns[WARM:]] for name, turns in found.items()}
    for name, own in seconds.items():
        ratios = [one / other for one, other in zip(seconds["1 worker"], own, strict=True)]
        low, middle, high = np.percentile(ratios, [25, 50, 75])
        apart = max(
            abs(one["loss"] - other["loss"])
            for one, other in zip(found["1 worker"], found[name], strict=True)
        )
        lines.append(
            f"  {name:<10} {statistics.median(own):7.3f} s a round   1 worker / this: "
            f"{middle:.2f} ({low:.2f} to {high:.2f})   losses differ by {apart:.1e} at most"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="the common job, 8 rounds, no file")
    options = parser.parse_args()
    lines = [
        "A round with two workers or two ranks against one worker; quartiles in brackets",
        "",
        f"command   python benchmarks/distributed.py {' '.join(sys.argv[1:])}".rstrip(),
        f"hardware  {processor()}, {os.cpu_count()} cores, no GPU",
        f"versions  fedss {version('fedss')}, torch {torch.__version__}, numpy {np.__version__}, "
        f"Python {platform.python_version()}",
        f"date      {datetime.date.today()}",
    ]
    for job in ["common"] if options.short else JOBS:
        lines += ["", *table(job, measure(job, 8 if options.short else JOBS[job]["rounds"]))]
        print("\n".join(lines[-4:]), flush=True)
    if not options.short:
        RESULTS.write_text("\n".join(lines) + "\n")


def part(words: Sequence[str]) -> None:
    job, workers, rounds, out = words
    take_part(job, int(workers), int(rounds), out)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--take-part"]:
        part(sys.argv[2:])
    else:
        main()
