"""What augmentation adds to a round: the local engine's CPU time with and without it, in turns.

    python benchmarks/augment.py     (a minute; --short: fewer rounds, writes no file)

4 clients of 32 pictures, one epoch in batches of 8, |S| = 64, d = 64; one worker with one torch
thread. Glyphs of 28 x 28, and made-up photographs of 64 x 64 in colour; a network that trains
whole, and one of timm with frozen batch norms of which the last two stages train. CPU time of the
process, not time on the clock, and the median of what pairs of rounds differ by.

Writes ``benchmarks/results/augment.txt``.
"""

import argparse
import datetime
import os
import platform
import statistics
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from omniglot import processor

from fedss.core.algorithm import ServerState
from fedss.core.class_rows import create_class_rows
from fedss.core.client import LocalTraining, RoundPlan
from fedss.core.optimizers import ServerOptimizer
from fedss.data import Images, glyphs_dataset, index_clients
from fedss.data.augment import AUGMENTATIONS
from fedss.engines.allocator import keep_freed_memory
from fedss.engines.local import local_engine
from fedss.losses.methods import METHODS
from fedss.losses.softmax import Scoring
from fedss.models import build_embedder, flatten_
from fedss.sampling.samplers import SAMPLERS
from fedss.wire.messages import WireFormat

RESULTS = Path(__file__).parent / "results" / "augment.txt"
CLIENTS, PICTURES, CLASSES, SAMPLE, DIM, WARM = 4, 32, 80, 64, 64, 1
OPTIMIZER = ServerOptimizer("momentum")
# Network, channels, side, which part trains, augmentation.
CASES = (
    ("conv4-32", 1, 28, "all", "drawings"),
    ("conv4-32", 1, 28, "all", "photos"),
    ("conv4-64", 1, 28, "all", "drawings"),
    ("conv4-32", 3, 64, "all", "photos"),
    ("timm:tf_efficientnet_lite0", 3, 64, "last-2", "photos"),
)


def pictures(channels: int, side: int) -> Images:
    """Glyphs, or colourful noise: what a picture shows changes no time."""
    count, rng = CLIENTS * PICTURES, np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count, channels, side, side), dtype=np.uint8)
    if channels == 1:
        pixels = np.array(glyphs_dataset(200, 8, image_size=side).train.pixels[:count])
    return Images(
        pixels,
        np.arange(count) // 2,
        np.arange(count) // PICTURES,
        [f"class {i}" for i in range(CLASSES)],
        [f"client {k}" for k in range(CLIENTS)],
        [f"{i}.png" for i in range(count)],
    )


def laps(
    backbone: str, channels: int, side: int, trainable: str, name: str, rounds: int
) -> tuple[float, float]:
    """CPU milliseconds of a round without augmentation, and what it adds, both medians."""
    embedder = build_embedder(
        backbone,
        channels=channels,
        image_size=side,
        embedding_size=DIM,
        seed=0,
        trainable=trainable,
    )
    wire = WireFormat(
        tuple(p.shape for p in embedder.parameters() if p.requires_grad), DIM, CLASSES
    )
    theta_P = flatten_(embedder).theta_P.clone()
    rows = create_class_rows(CLASSES, DIM, OPTIMIZER.slots, 0)
    state = ServerState(theta_P, {"momentum": torch.zeros_like(theta_P)}, rows, 0)
    local, scoring = LocalTraining(1, None, 8, 0.01, 1.0), Scoring(10.0)
    fedss, uniform = METHODS["fedss"], SAMPLERS["uniform"]
    plain = RoundPlan(0, 0, fedss, uniform, CLASSES, SAMPLE, 0, scoring, local)
    plans = [plain, replace(plain, augmentation=AUGMENTATIONS[name])]
    found: list[list[float]] = []
    with local_engine(
        embedder, index_clients(pictures(channels, side)), OPTIMIZER, wire, 1
    ) as engine:
        for _ in range(WARM + rounds):
            found.append([])
            for plan in plans:
                begin = time.process_time()
                list(engine.train(state, np.arange(CLIENTS), plan))
                found[-1].append(1000 * (time.process_time() - begin))
    pairs = found[WARM:]
    return (
        statistics.median(without for without, _ in pairs),
        statistics.median(augmented - without for without, augmented in pairs),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="few rounds; write no file")
    options = parser.parse_args()
    rounds = 3 if options.short else 7
    keep_freed_memory()
    lines = [
        "What augmentation adds to a round, on a CPU",
        f"command   python {' '.join(['benchmarks/augment.py', *sys.argv[1:]])}",
        f"date      {datetime.date.today().isoformat()}",
        f"hardware  {processor()}, {os.cpu_count()} cores, no GPU used",
        f"software  fedss {version('fedss')}, torch {torch.__version__}, "
        f"torchvision {version('torchvision')}, timm {version('timm')}, "
        f"numpy {np.__version__}, Python {platform.python_version()}",
        "",
        f"CPU ms a round of {CLIENTS} clients with {PICTURES} pictures each, medians of {rounds}",
        f"{'network':<28}{'pictures':>14}{'trains':>9}{'augment':>10}{'without':>10}"
        f"{'adds':>8}{'':>8}",
    ]
    for backbone, channels, side, trainable, name in CASES:
        without, adds = laps(backbone, channels, side, trainable, name, rounds)
        shape = f"{channels} x {side} x {side}"
        lines.append(
            f"{backbone:<28}{shape:>14}{trainable:>9}{name:>10}{without:>10.1f}"
            f"{adds:>8.1f}{adds / without:>8.1%}"
        )
        print(lines[-1], flush=True)
    text = "\n".join(lines) + "\n"
    if not options.short:
        RESULTS.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
