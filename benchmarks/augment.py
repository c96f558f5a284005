"""What augmentation adds to a round: the local engine's CPU time with and without it, in turns.

    python benchmarks/augment.py     (a minute; --short: fewer rounds, writes no file)

4 clients of 32 images, one epoch in batches of 8, |S| = 64, d = 64; one worker with one torch
thread. Images are glyphs of 28 x 28 and random ones of 64 x 64 in color. One network trains whole;
of another, of timm and with frozen batch norms, the last two stages train. Times are CPU time of
the process; what augmentation adds is the median difference of two neighboring rounds.

Writes ``benchmarks/results/augment.txt``.
"""

import statistics
from dataclasses import replace

import common
import numpy as np

from fedss.core.client import LocalTraining
from fedss.data import ClientIndex, glyphs_dataset
from fedss.data.augment import AUGMENTATIONS
from fedss.engines.allocator import keep_freed_memory
from fedss.models import build_embedder

CLIENTS, IMAGES, CLASSES, SAMPLE, WARM = 4, 32, 80, 64, 1
# Network, channels, side, which part trains, augmentation.
CASES = (
    ("conv4-32", 1, 28, "all", "drawings"),
    ("conv4-32", 1, 28, "all", "photos"),
    ("conv4-64", 1, 28, "all", "drawings"),
    ("conv4-32", 3, 64, "all", "photos"),
    ("timm:tf_efficientnet_lite0", 3, 64, "last-2", "photos"),
)


def clients(channels: int, side: int) -> ClientIndex:
    """With glyphs, or with noise in color: what an image shows changes no time."""
    count = CLIENTS * IMAGES
    pixels = common.random_pixels(count, side, channels)
    if channels == 1:
        pixels = np.array(glyphs_dataset(200, 8, image_size=side).train.pixels[:count])
    return common.clients_of(pixels, (np.arange(count) // 2).reshape(CLIENTS, IMAGES))


def laps(
    backbone: str, channels: int, side: int, trainable: str, name: str, rounds: int
) -> tuple[float, float]:
    """CPU milliseconds of a round without augmentation, and what it adds, both medians."""
    embedder = build_embedder(
        backbone,
        channels=channels,
        image_size=side,
        embedding_size=common.DIM,
        seed=0,
        trainable=trainable,
    )
    state, cohort = common.first_state(embedder, CLASSES), np.arange(CLIENTS)
    plain = common.plan_of(CLASSES, SAMPLE, LocalTraining(1, None, 8, 0.01, 1.0))
    plans = [plain, replace(plain, augmentation=AUGMENTATIONS[name])]
    with common.engine_of(embedder, clients(channels, side), CLASSES, 1) as engine:
        pairs = [
            [common.cpu_milliseconds(engine, state, cohort, plan) for plan in plans]
            for _ in range(WARM + rounds)
        ][WARM:]
    return (
        statistics.median(without for without, _ in pairs),
        statistics.median(augmented - without for without, augmented in pairs),
    )


def main() -> None:
    options = common.parser(__doc__, short="few rounds; write no file").parse_args()
    rounds = 3 if options.short else 7
    keep_freed_memory()
    report = common.Report("What augmentation adds to a round, on a CPU", ["torchvision", "timm"])
    report.add(
        f"CPU ms a round of {CLIENTS} clients with {IMAGES} images each, medians of {rounds}",
        f"{'network':<28}{'images':>14}{'trains':>9}{'augment':>10}{'without':>10}{'adds':>8}",
    )
    for backbone, channels, side, trainable, name in CASES:
        without, adds = laps(backbone, channels, side, trainable, name, rounds)
        shape = f"{channels} x {side} x {side}"
        report.add(
            f"{backbone:<28}{shape:>14}{trainable:>9}{name:>10}{without:>10.1f}"
            f"{adds:>8.1f}{adds / without:>8.1%}"
        )
    report.write(unless=options.short)


if __name__ == "__main__":
    main()
