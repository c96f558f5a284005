"""Whether ``--stack`` pays on a CPU: the engine's CPU time for several stacks, in turns.

    python benchmarks/stacks.py     (half a minute; --short: writes no file)

16 clients of 32 images, one epoch in batches of 8, |S| = 64, d = 64; one worker with one torch
thread. CPU time of the process, not time on the clock, so that it hardly matters what else runs.
No GPU is used: ``gpu.py`` is for that.

Writes ``benchmarks/results/stacks.txt``.
"""

import statistics
from contextlib import ExitStack

import common
import numpy as np
from network import network
from torch import nn

from fedss.core.client import LocalTraining
from fedss.data import ClientIndex
from fedss.engines.allocator import keep_freed_memory
from fedss.models import build_embedder

CLIENTS, IMAGES, CLASSES, SAMPLE, ROUNDS, WARM = 16, 32, 964, 64, 9, 2
STACKS = (1, 4, 16)


def clients() -> ClientIndex:
    labels = common.paired_labels(CLIENTS, IMAGES, CLASSES)
    return common.clients_of(common.random_pixels(CLIENTS * IMAGES, 28), labels)


def networks() -> dict[str, str | nn.Module]:
    """What is trained, from a single layer to convolutions of 64 channels at full size."""
    return {
        "linear 784-64": nn.Sequential(nn.Flatten(), nn.Linear(784, common.DIM)),
        "linear 784-128-64": nn.Sequential(
            nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, common.DIM)
        ),
        "conv4-8": "conv4-8",
        "conv4-32": "conv4-32",
        "conv4-64": "conv4-64",
        "64 channels from 28 x 28": network()[:-1],
    }


def laps(backbone: str | nn.Module, index: ClientIndex) -> dict[int, float]:
    """Median CPU milliseconds of a round, by stack."""
    embedder = build_embedder(
        backbone, channels=1, image_size=28, embedding_size=common.DIM, seed=0
    )
    state, cohort = common.first_state(embedder, CLASSES), np.arange(CLIENTS)
    plan = common.plan_of(CLASSES, SAMPLE, LocalTraining(1, None, 8, 0.05, 2.0))
    milliseconds: dict[int, list[float]] = {stack: [] for stack in STACKS}
    with ExitStack() as opened:
        engines = {
            stack: opened.enter_context(common.engine_of(embedder, index, CLASSES, 1, stack=stack))
            for stack in STACKS
        }
        for _ in range(WARM + ROUNDS):
            for stack, engine in engines.items():
                milliseconds[stack].append(common.cpu_milliseconds(engine, state, cohort, plan))
    return {stack: statistics.median(times[WARM:]) for stack, times in milliseconds.items()}


def main() -> None:
    options = common.parser(__doc__, short="write no file").parse_args()
    keep_freed_memory()
    report = common.Report("Clients that share calls of the network, on a CPU")
    report.add(
        f"CPU ms a round of {CLIENTS} clients, median of {ROUNDS}; 'x': of the plain engine's",
        f"{'':<26}" + "".join(f"{f'stack {stack}':>16}" for stack in STACKS),
    )
    index = clients()
    for name, backbone in networks().items():
        times = laps(backbone, index)
        cells = "".join(f"{ms:>9.1f} {ms / times[1]:>5.2f}x" for ms in times.values())
        report.add(f"{name:<26}{cells}")
    report.write(unless=options.short)


if __name__ == "__main__":
    main()
