"""The picture cache: making it against bare Pillow, training from it against pictures in RAM.

    python benchmarks/pictures.py            (about 6 minutes on two cores; --short: under one)

Made-up photographs (smooth random fields with some grain) are written to a temporary folder.

1. making: ``fedss.load_dataset`` on a CSV, from reading the CSV to the finished cache, against
   Pillow alone on the same files with as many threads: open, draft, convert, resize the central
   square; nothing is kept. Both give the same pixels, which is checked.
2. training: the same run, read from the memory-mapped cache and from an array in RAM.

The two sides of each figure take turns, and figures are medians of the ratios of neighbouring
turns. CPU ratios hold on a busy machine too, wall-clock ratios need a quiet one.

Writes ``benchmarks/results/pictures.txt`` (not with --short).
"""

import argparse
import datetime
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
from omniglot import processor
from PIL import Image, features

import fedss

RESULTS = Path(__file__).parent / "results" / "pictures.txt"
CLIENTS = 50


@dataclass(frozen=True)
class Pictures:
    """``count`` files to make, of ``sizes`` in turn; how ``fedss.load_dataset`` is to read them."""

    title: str
    count: int
    sizes: tuple[tuple[int, int], ...]
    mode: str
    suffix: str
    image_size: int
    channels: int | None


MIXED = ((640, 480), (480, 640), (1024, 768), (500, 375))
SETS = (
    Pictures("JPEG 640 x 480 to 64", 3000, ((640, 480),), "RGB", "jpg", 64, None),
    Pictures("JPEG 500 to 1024 to 64", 3000, MIXED, "RGB", "jpg", 64, None),
    Pictures("JPEG 500 to 1024 to 224", 2000, MIXED, "RGB", "jpg", 224, None),
    Pictures("PNG 256 x 256 to 64", 3000, ((256, 256),), "RGB", "png", 64, None),
    Pictures("JPEG 160 x 120 to 64", 10000, ((160, 120),), "RGB", "jpg", 64, None),
    Pictures("PNG 105 x 105 gray to 28", 10000, ((105, 105),), "L", "png", 28, 1),
    Pictures("  same, gray not told", 10000, ((105, 105),), "L", "png", 28, None),
)


def landscape(seed: int) -> np.ndarray:
    """Random fields from coarse to fine, and grain: uint8 [1500, 2000, 3]."""
    rng = np.random.default_rng(seed)
    bands = []
    for _ in range(3):
        band = rng.normal(128, 3, (1500, 2000)).astype(np.float32)
        for cells, strength in ((8, 60), (32, 35), (128, 20)):
            field = rng.normal(0, strength, (cells, cells)).astype(np.float32)
            band += np.asarray(
                Image.fromarray(field).resize((2000, 1500), Image.Resampling.BICUBIC)
            )
        bands.append(np.clip(band, 0, 255).astype(np.uint8))
    return np.stack(bands, axis=2)


def write_pictures(folder: Path, wanted: Pictures) -> Path:
    """The files, each cut from somewhere in a landscape, and the CSV that lists them."""
    folder.mkdir()
    landscapes = [Image.fromarray(landscape(seed)).convert(wanted.mode) for seed in range(4)]

    def write(i: int) -> None:
        rng, (width, height) = np.random.default_rng(i), wanted.sizes[i % len(wanted.sizes)]
        left, top = int(rng.integers(2000 - width)), int(rng.integers(1500 - height))
        picture = landscapes[i % 4].crop((left, top, left + width, top + height))
        picture.save(folder / f"{i:06d}.{wanted.suffix}", quality=90)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(write, range(wanted.count)))
    lines = ["image,label,client,split"]
    for i in range(wanted.count):
        # A tenth is the test, in classes of their own.
        split = "test" if i < wanted.count // 10 else "train"
        label = i % (wanted.count // 100) + (wanted.count if split == "test" else 0)
        lines.append(f"{i:06d}.{wanted.suffix},class {label},client {i % CLIENTS},{split}")
    path = folder / "pictures.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def bare(path: Path, wanted: Pictures) -> Image.Image:
    """What any program must do with a picture, and nothing else."""
    side = wanted.image_size
    with Image.open(path) as image:
        image.draft(None, (2 * side, 2 * side))
        small = image.convert(wanted.mode)
        width, height = small.size
        left, top, edge = (width - height) / 2, (height - width) / 2, min(width, height)
        left, top = max(left, 0.0), max(top, 0.0)
        box = (left, top, left + edge, top + edge)
        return small.resize((side, side), Image.Resampling.BILINEAR, box)


def bare_all(paths: Sequence[Path], wanted: Pictures) -> None:
    for path in paths:
        bare(path, wanted)


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Wall-clock and CPU seconds (all threads) of a piece of work."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def making(wanted: Pictures, place: Path, turns: int) -> str:
    """A line of the first table."""
    path = write_pictures(place / "files", wanted)
    files = sorted(path.parent.glob(f"*.{wanted.suffix}"))
    cache = place / "cache"

    def load() -> fedss.Dataset:
        side, channels = wanted.image_size, wanted.channels
        return fedss.load_dataset("csv", path, image_size=side, channels=channels, cache=cache)

    def alone() -> None:
        # A share of the files for each thread: no queue, nothing to wait for.
        cores = os.cpu_count() or 1
        with ThreadPoolExecutor(cores) as pool:
            list(pool.map(lambda start: bare_all(files[start::cores], wanted), range(cores)))

    ours, theirs = [], []
    for turn in range(turns + 1):
        shutil.rmtree(cache, ignore_errors=True)
        pair = [seconds(work) for work in ((alone, load) if turn % 2 else (load, alone))]
        if turn % 2:
            pair.reverse()
        if turn:  # the first turn warms up
            ours.append(pair[0])
            theirs.append(pair[1])
    same(load(), path.parent, wanted)
    shutil.rmtree(place / "files")
    shutil.rmtree(cache)
    wall, cpu = (
        statistics.median(b[i] / a[i] for a, b in zip(ours, theirs, strict=True)) for i in (0, 1)
    )
    rate = wanted.count / statistics.median(a[0] for a in ours)
    line = f"{wanted.title:<26} {wanted.count:>8,} {rate:>10,.0f} {wall:>8.3f} {cpu:>8.3f}"
    print(line, flush=True)
    return line


def same(data: fedss.Dataset, folder: Path, wanted: Pictures) -> None:
    """Whether both sides did the same work: every hundredth picture, bit for bit."""
    for images in (data.train, data.test.query):
        for i in range(0, len(images), 100):
            expected = np.asarray(bare(folder / images.names[i], wanted))
            if not np.array_equal(np.atleast_3d(expected).transpose(2, 0, 1), images.pixels[i]):
                raise SystemExit(f"{wanted.title}: {images.names[i]} differs")


def training(place: Path, wanted: Pictures, rounds: int, turns: int) -> list[str]:
    """The second table."""
    path = write_pictures(place / "files", wanted)
    mapped = fedss.load_dataset("csv", path, image_size=wanted.image_size, cache=place / "cache")
    in_ram = replace(mapped, train=replace(mapped.train, pixels=np.array(mapped.train.pixels)))
    lines = []
    for workers in dict.fromkeys((1, os.cpu_count() or 1)):
        config = fedss.Config(rounds=rounds, eval_every=0, checkpoint_every=rounds, workers=workers)
        took: dict[str, list[tuple[float, float]]] = {"cache": [], "RAM": []}
        models = set()
        for turn in range(turns):
            sides = [("cache", mapped), ("RAM", in_ram)]
            for name, data in sides if turn % 2 else reversed(sides):
                out = place / f"{name}-{workers}-{turn}"
                took[name].append(seconds_per_round(config, data, out))
                models.add((out / "model" / "model.safetensors").read_bytes())
        if len(models) != 1:
            raise SystemExit("runs on the same pictures differ")
        wall, cpu = (
            statistics.median(a[i] / b[i] for a, b in zip(took["cache"], took["RAM"], strict=True))
            for i in (0, 1)
        )
        ram, cache = (statistics.median(t[0] for t in took[name]) for name in ("RAM", "cache"))
        lines.append(f"{workers:>7} {ram:>14.4f} {cache:>14.4f} {wall:>8.3f} {cpu:>8.3f}")
        print(lines[-1], flush=True)
    return lines


def seconds_per_round(config: fedss.Config, data: fedss.Dataset, out: Path) -> tuple[float, float]:
    """Wall-clock and CPU seconds of the median round, the first and the last left out."""
    clocks = []
    fedss.train(
        config,
        out,
        data=data,
        on_round=lambda _: clocks.append((time.perf_counter(), time.process_time())),
    )
    rounds = np.diff(np.array(clocks[:-1]), axis=0)
    return float(np.median(rounds[:, 0])), float(np.median(rounds[:, 1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="a tenth of the pictures, no file")
    options = parser.parse_args()
    sets = [replace(s, count=s.count // 10) for s in SETS] if options.short else SETS
    turns, rounds = (2, 4) if options.short else (4, 8)
    with tempfile.TemporaryDirectory() as folder:
        made = [making(wanted, Path(folder), turns) for wanted in sets]
        trained = training(Path(folder), sets[0], rounds, turns)
    text = report(made, trained, sets[0])
    if not options.short:
        RESULTS.write_text(text)
    print(f"\n{text}")


def report(made: Sequence[str], trained: Sequence[str], wanted: Pictures) -> str:
    lines = [
        "The picture cache",
        "command   python benchmarks/pictures.py",
        f"date      {datetime.date.today().isoformat()}",
        f"hardware  {processor()}, {os.cpu_count()} cores, no GPU used",
        f"software  fedss {version('fedss')}, pillow {version('pillow')} (libjpeg-turbo "
        f"{features.version('libjpeg_turbo')}), torch {version('torch')}, numpy "
        f"{version('numpy')}, Python {platform.python_version()}",
        "",
        "Making it: fedss.load_dataset on a CSV, from reading the CSV to the finished cache on the",
        f"disk. Bare: Pillow alone on the same files, {os.cpu_count()} threads: open, draft,",
        "convert, resize; nothing kept. Ratio: time of bare / time of fedss; above 1 fedss is",
        "faster. Both give the same pixels. Files are in the page cache.",
        "",
        f"{'':<26} {'pictures':>8} {'fedss, /s':>10} {'wall':>8} {'CPU':>8}",
        *made,
        "",
        f"Training: {wanted.count * 9 // 10:,} pictures 3 x {wanted.image_size} x "
        f"{wanted.image_size} of {CLIENTS} clients, 20 a round, settings of `fedss train`. Same",
        "bits. Ratio: time from the memory-mapped cache / time from an array in RAM.",
        "",
        f"{'workers':>7} {'RAM, s a round':>14} {'cache':>14} {'wall':>8} {'CPU':>8}",
        *trained,
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
