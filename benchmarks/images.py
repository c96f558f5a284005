"""The image cache: making it against bare Pillow, training from it against images in RAM.

    python benchmarks/images.py            (about 6 minutes on two cores; --short: under one)

Made-up photographs (smooth random fields with some grain) are written to a temporary folder.

1. making: ``fedss.load_dataset`` on a CSV, from reading the CSV to the finished cache, against
   Pillow alone on the same files with as many threads: open, draft, convert, resize the central
   square; nothing is kept. Both give the same pixels, which is checked.
2. training: the same run, read from the memory-mapped cache and from an array in RAM.

The two sides of each figure take turns, and figures are medians of the ratios of neighbouring
turns. CPU ratios hold on a busy machine too, wall-clock ratios need a quiet one.

Writes ``benchmarks/results/images.txt`` (not with --short).
"""

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import common
import numpy as np
from PIL import Image, features

import fedss

CLIENTS = 50


@dataclass(frozen=True)
class Files:
    """``count`` images to write, of ``sizes`` in turn, and how they are read again."""

    title: str
    count: int
    sizes: tuple[tuple[int, int], ...]
    mode: str
    suffix: str
    image_size: int
    channels: int | None


MIXED = ((640, 480), (480, 640), (1024, 768), (500, 375))
SETS = (
    Files("JPEG 640 x 480 to 64", 3000, ((640, 480),), "RGB", "jpg", 64, None),
    Files("JPEG 500 to 1024 to 64", 3000, MIXED, "RGB", "jpg", 64, None),
    Files("JPEG 500 to 1024 to 224", 2000, MIXED, "RGB", "jpg", 224, None),
    Files("PNG 256 x 256 to 64", 3000, ((256, 256),), "RGB", "png", 64, None),
    Files("JPEG 160 x 120 to 64", 10000, ((160, 120),), "RGB", "jpg", 64, None),
    Files("PNG 105 x 105 gray to 28", 10000, ((105, 105),), "L", "png", 28, 1),
    Files("  same, gray not told", 10000, ((105, 105),), "L", "png", 28, None),
)


def write_files(folder: Path, wanted: Files) -> Path:
    """The files, each cut from somewhere in a landscape, and the CSV that lists them."""
    folder.mkdir()
    landscapes = [common.photograph(seed, 2000, 1500, wanted.mode) for seed in range(4)]

    def write(i: int) -> None:
        rng, (width, height) = np.random.default_rng(i), wanted.sizes[i % len(wanted.sizes)]
        left, top = int(rng.integers(2000 - width)), int(rng.integers(1500 - height))
        image = landscapes[i % 4].crop((left, top, left + width, top + height))
        image.save(folder / f"{i:06d}.{wanted.suffix}", quality=90)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(write, range(wanted.count)))
    lines = ["image,label,client,split"]
    for i in range(wanted.count):
        # A tenth is the test, in classes of their own.
        split = "test" if i < wanted.count // 10 else "train"
        label = i % (wanted.count // 100) + (wanted.count if split == "test" else 0)
        lines.append(f"{i:06d}.{wanted.suffix},class {label},client {i % CLIENTS},{split}")
    path = folder / "images.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def bare(path: Path, wanted: Files) -> Image.Image:
    """What any program must do with an image, and nothing else."""
    side = wanted.image_size
    with Image.open(path) as image:
        image.draft(None, (2 * side, 2 * side))
        small = image.convert(wanted.mode)
        width, height = small.size
        left, top, edge = (width - height) / 2, (height - width) / 2, min(width, height)
        left, top = max(left, 0.0), max(top, 0.0)
        box = (left, top, left + edge, top + edge)
        return small.resize((side, side), Image.Resampling.BILINEAR, box)


def making(wanted: Files, place: Path, turns: int) -> str:
    """A line of the first table."""
    path = write_files(place / "files", wanted)
    files = sorted(path.parent.glob(f"*.{wanted.suffix}"))
    cache = place / "cache"

    def load() -> fedss.Dataset:
        side, channels = wanted.image_size, wanted.channels
        return fedss.load_dataset("csv", path, image_size=side, channels=channels, cache=cache)

    def alone() -> None:
        # A share of the files for each thread: no queue, nothing to wait for.
        cores = os.cpu_count() or 1
        with ThreadPoolExecutor(cores) as pool:
            list(pool.map(lambda i: [bare(f, wanted) for f in files[i::cores]], range(cores)))

    sides = {"ours": load, "theirs": alone}
    took: dict[str, list[common.Spent]] = {name: [] for name in sides}
    for turn in range(turns + 1):
        shutil.rmtree(cache, ignore_errors=True)
        for name in common.rotated([*sides], turn):
            took[name].append(common.timed(sides[name])[1])
    same(load(), path.parent, wanted)
    shutil.rmtree(place / "files")
    shutil.rmtree(cache)
    ours, theirs = took["ours"][1:], took["theirs"][1:]  # the first turn warms up
    wall, cpu = ratios(theirs, ours)
    rate = wanted.count / statistics.median(spent.wall for spent in ours)
    line = f"{wanted.title:<26} {wanted.count:>8,} {rate:>10,.0f} {wall:>8.3f} {cpu:>8.3f}"
    print(line, flush=True)
    return line


def same(data: fedss.Dataset, folder: Path, wanted: Files) -> None:
    """Whether both sides did the same work: every hundredth image, bit for bit."""
    assert data.test is not None
    for images in (data.train, data.test.query):
        for i in range(0, len(images), 100):
            expected = np.asarray(bare(folder / images.names[i], wanted))
            if not np.array_equal(np.atleast_3d(expected).transpose(2, 0, 1), images.pixels[i]):
                raise SystemExit(f"{wanted.title}: {images.names[i]} differs")


def training(place: Path, wanted: Files, rounds: int, turns: int) -> list[str]:
    """The second table."""
    path = write_files(place / "files", wanted)
    mapped = fedss.load_dataset("csv", path, image_size=wanted.image_size, cache=place / "cache")
    in_ram = replace(mapped, train=replace(mapped.train, pixels=np.array(mapped.train.pixels)))
    lines = []
    for workers in dict.fromkeys((1, os.cpu_count() or 1)):
        config = fedss.Config(rounds=rounds, eval_every=0, checkpoint_every=rounds, workers=workers)
        took: dict[str, list[common.Spent]] = {"cache": [], "RAM": []}
        models = set()
        for turn in range(turns):
            for name, data in common.rotated([("RAM", in_ram), ("cache", mapped)], turn):
                out = place / f"{name}-{workers}-{turn}"
                took[name].append(seconds_per_round(config, data, out))
                models.add((out / "model" / "model.safetensors").read_bytes())
        if len(models) != 1:
            raise SystemExit("runs on the same images differ")
        wall, cpu = ratios(took["cache"], took["RAM"])
        ram, cache = (statistics.median(t.wall for t in took[name]) for name in ("RAM", "cache"))
        lines.append(f"{workers:>7} {ram:>14.4f} {cache:>14.4f} {wall:>8.3f} {cpu:>8.3f}")
        print(lines[-1], flush=True)
    return lines


def seconds_per_round(config: fedss.Config, data: fedss.Dataset, out: Path) -> common.Spent:
    """Those of the median round, without the first and the last."""
    clocks = []
    fedss.train(
        config,
        out,
        data=data,
        on_round=lambda _: clocks.append((time.perf_counter(), time.process_time())),
    )
    rounds = np.diff(np.array(clocks[:-1]), axis=0)
    return common.Spent(*map(float, np.median(rounds, axis=0)))


def ratios(above: Sequence[common.Spent], below: Sequence[common.Spent]) -> tuple[float, float]:
    """By the clock, and by CPU time."""
    wall, cpu = (common.median_ratio([s[i] for s in above], [s[i] for s in below]) for i in (0, 1))
    return wall, cpu


def main() -> None:
    options = common.parser(__doc__, short="a tenth of the images, no file").parse_args()
    sets = [replace(s, count=s.count // 10) for s in SETS] if options.short else SETS
    turns, rounds = (2, 4) if options.short else (4, 8)
    with tempfile.TemporaryDirectory() as folder:
        made = [making(wanted, Path(folder), turns) for wanted in sets]
        trained = training(Path(folder), sets[0], rounds, turns)
    report = common.Report("The image cache", ["pillow"])
    side = sets[0].image_size
    report.add(
        "Making it: fedss.load_dataset on a CSV, from reading the CSV to the finished cache on the",
        f"disk. Bare: Pillow alone on the same files, {os.cpu_count()} threads: open, draft,",
        "convert, resize; nothing kept. Ratio: time of bare / time of fedss; above 1 fedss is",
        "faster. Both give the same pixels. Files are in the page cache. libjpeg-turbo "
        f"{features.version('libjpeg_turbo')}.",
        "",
        f"{'':<26} {'images':>8} {'fedss, /s':>10} {'wall':>8} {'CPU':>8}",
        *made,
        "",
        f"Training: {sets[0].count * 9 // 10:,} images 3 x {side} x {side}, {CLIENTS} clients, 20",
        "a round, settings of `fedss train`. Same bits. Ratio: time from the memory-mapped cache /",
        "time from an array in RAM.",
        "",
        f"{'workers':>7} {'RAM, s a round':>14} {'cache':>14} {'wall':>8} {'CPU':>8}",
        *trained,
    )
    report.write(unless=options.short)


if __name__ == "__main__":
    main()
