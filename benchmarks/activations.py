"""What it spares to compute the frozen part of a backbone once: CPU time of a round, in turns.

    python benchmarks/activations.py     (five minutes; --short: 64 pixels alone, writes no file)

EfficientNet-Lite0, random weights, batch norms frozen as trained ones are; 8 clients of 32 random
images in colour, one epoch, |S| = 64; one worker with one torch thread. A projection of features to
64 numbers, random at first, batches of 8; and "auto": as fedss trains by itself, on features
whitened to 512 numbers, the last blocks in one batch. CPU time of the process, not time on the
clock, so that it hardly matters what else runs. Activations are made before the first round.

Writes ``benchmarks/results/activations.txt``.
"""

import os
import statistics
import tempfile
from contextlib import ExitStack

import common
import numpy as np
import torch

from fedss.core.client import LocalTraining
from fedss.engines.allocator import keep_freed_memory
from fedss.models import Whitening, build_embedder

CLIENTS, IMAGES, CLASSES, SAMPLE, ROUNDS, WARM = 8, 32, 964, 64, 5, 1
WAYS = (False, True)


def milliseconds(size: int, trainable: str, auto: bool) -> list[float]:
    """Median CPU milliseconds of a round: everything computed, the frozen part computed once."""
    labels = common.paired_labels(CLIENTS, IMAGES, CLASSES)
    index = common.clients_of(common.random_pixels(CLIENTS * IMAGES, size, 3), labels)
    embedder = build_embedder(
        "timm:tf_efficientnet_lite0",
        channels=3,
        image_size=size,
        embedding_size=512 if auto else common.DIM,
        seed=0,
        trainable=trainable,
        batch_norm="freeze",
        whitened=auto,
    )
    if isinstance(embedder.whitening, Whitening):
        torch.nn.init.orthogonal_(embedder.whitening.axes_FK)
    batch = 128 if auto and trainable != "head" else 8
    state, cohort = common.first_state(embedder, CLASSES), np.arange(CLIENTS)
    plan = common.plan_of(CLASSES, SAMPLE, LocalTraining(1, None, batch, 0.005, 0.4))
    times: dict[bool, list[float]] = {once: [] for once in WAYS}
    with ExitStack() as opened:
        engines = {
            once: opened.enter_context(
                common.engine_of(embedder, index, CLASSES, 1, frozen_once=once)
            )
            for once in WAYS
        }
        for _ in range(WARM + ROUNDS):
            for once, engine in engines.items():
                times[once].append(common.cpu_milliseconds(engine, state, cohort, plan))
    return [statistics.median(times[once][WARM:]) for once in WAYS]


def main() -> None:
    options = common.parser(__doc__, short="64 pixels, write no file").parse_args()
    keep_freed_memory()
    report = common.Report("The frozen part of a backbone, computed once", ["timm"])
    report.add(
        f"CPU ms a round of {CLIENTS} clients, median of {ROUNDS}",
        f"{'':<20}{'each round':>12}{'once':>10}{'ratio':>9}",
    )
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FEDSS_CACHE"] = folder
        for size in (64,) if options.short else (64, 128):
            for trainable in ("head", "last-1", "last-2"):
                for auto in (False, True):
                    each, once = milliseconds(size, trainable, auto)
                    name = f"{size} px, {trainable}{', auto' * auto}"
                    report.add(f"{name:<20}{each:>12.0f}{once:>10.1f}{f'{each / once:.1f} x':>9}")
    report.write(unless=options.short)


if __name__ == "__main__":
    main()
