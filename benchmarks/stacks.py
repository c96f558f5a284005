"""Whether ``--stack`` pays on a CPU: the engine's CPU time for several stacks, in turns.

    python benchmarks/stacks.py     (half a minute; --short: writes no file)

16 clients of 32 pictures, one epoch in batches of 8, |S| = 64, d = 64; one worker with one torch
thread. CPU time of the process, not time on the clock, so that it hardly matters what else runs.
No GPU is used: ``gpu.py`` is for that.

Writes ``benchmarks/results/stacks.txt``.
"""

import argparse
import datetime
import os
import platform
import statistics
import sys
import time
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from omniglot import processor
from torch import nn

from fedss.core.algorithm import ServerState
from fedss.core.class_rows import create_class_rows
from fedss.core.client import LocalTraining, RoundPlan
from fedss.core.optimizers import ServerOptimizer
from fedss.data import ClientIndex, Images
from fedss.engines.allocator import keep_freed_memory
from fedss.engines.local import local_engine
from fedss.losses.methods import METHODS
from fedss.losses.softmax import Scoring
from fedss.models import build_embedder, flatten_
from fedss.sampling.samplers import SAMPLERS
from fedss.wire.messages import WireFormat

RESULTS = Path(__file__).parent / "results" / "stacks.txt"
CLIENTS, PICTURES, CLASSES, SAMPLE, DIM, ROUNDS, WARM = 16, 32, 964, 64, 64, 9, 2
STACKS = (1, 4, 16)
OPTIMIZER = ServerOptimizer("momentum")


def clients() -> ClientIndex:
    rng, count = np.random.default_rng(0), CLIENTS * PICTURES
    own = [rng.choice(CLASSES, PICTURES // 2, replace=False) for _ in range(CLIENTS)]
    images = Images(
        rng.integers(0, 256, (count, 1, 28, 28), dtype=np.uint8),
        np.concatenate([np.repeat(classes, 2) for classes in own]),
        np.repeat(np.arange(CLIENTS), PICTURES),
        [f"class {i}" for i in range(CLASSES)],
        [f"client {k}" for k in range(CLIENTS)],
        [f"{i}.png" for i in range(count)],
    )
    return ClientIndex(images, np.arange(count), np.arange(0, count + 1, PICTURES))


def block(inputs: int) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, 64, 3, padding=1)
    return [convolution, nn.GroupNorm(8, 64), nn.ReLU(), nn.MaxPool2d(2)]


def networks() -> dict[str, str | nn.Module]:
    """What is trained, from a single layer to convolutions of 64 channels at full size."""
    return {
        "linear 784-64": nn.Sequential(nn.Flatten(), nn.Linear(784, DIM)),
        "linear 784-128-64": nn.Sequential(
            nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, DIM)
        ),
        "conv4-8": "conv4-8",
        "conv4-32": "conv4-32",
        "conv4-64": "conv4-64",
        "64 channels from 28 x 28": nn.Sequential(
            *block(1), *block(64), *block(64), *block(64), nn.Flatten()
        ),
    }


def laps(backbone: str | nn.Module, index: ClientIndex) -> dict[int, float]:
    """Median CPU milliseconds of a round, by stack."""
    embedder = build_embedder(backbone, channels=1, image_size=28, embedding_size=DIM, seed=0)
    wire = WireFormat(tuple(p.shape for p in embedder.parameters()), DIM, CLASSES)
    theta_P = flatten_(embedder).theta_P.clone()
    rows = create_class_rows(CLASSES, DIM, OPTIMIZER.slots, 0)
    state = ServerState(theta_P, {"momentum": torch.zeros_like(theta_P)}, rows, 0)
    local, scoring = LocalTraining(1, None, 8, 0.05, 2.0), Scoring(10.0)
    fedss, uniform = METHODS["fedss"], SAMPLERS["uniform"]
    plan = RoundPlan(0, 0, fedss, uniform, CLASSES, SAMPLE, 0, scoring, local)
    found: dict[int, list[float]] = {stack: [] for stack in STACKS}
    with ExitStack() as opened:
        engines = {
            stack: opened.enter_context(
                local_engine(embedder, index, OPTIMIZER, wire, 1, stack=stack)
            )
            for stack in STACKS
        }
        for _ in range(WARM + ROUNDS):
            for stack, engine in engines.items():
                begin = time.process_time()
                list(engine.train(state, np.arange(CLIENTS), plan))
                found[stack].append(time.process_time() - begin)
    return {stack: 1000 * statistics.median(times[WARM:]) for stack, times in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="write no file")
    options = parser.parse_args()
    keep_freed_memory()
    lines = [
        "Clients that share calls of the network, on a CPU",
        f"command   python {' '.join(['benchmarks/stacks.py', *sys.argv[1:]])}",
        f"date      {datetime.date.today().isoformat()}",
        f"hardware  {processor()}, {os.cpu_count()} cores, no GPU used",
        f"software  fedss {version('fedss')}, torch {torch.__version__}, "
        f"numpy {np.__version__}, Python {platform.python_version()}",
        "",
        f"CPU ms a round of {CLIENTS} clients, median of {ROUNDS}; 'x': of the plain engine's",
        f"{'':<26}" + "".join(f"{f'stack {stack}':>16}" for stack in STACKS),
    ]
    index = clients()
    for name, backbone in networks().items():
        times = laps(backbone, index)
        cells = "".join(f"{ms:>9.1f} {ms / times[1]:>5.2f}x" for ms in times.values())
        lines.append(f"{name:<26}{cells}")
    text = "\n".join(lines) + "\n"
    if not options.short:
        RESULTS.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
