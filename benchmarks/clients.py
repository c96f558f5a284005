"""A million clients: what registering them costs, and that a round does not notice.

    python benchmarks/clients.py             (about 10 minutes on two cores; --short: 2 minutes)

1. training: 10,000 and 1,000,000 clients of 3 images each in a memory-mapped file, names made up
   when asked for, 10,000 classes, a cohort of 100. The two take turns, each time in a process of
   its own; ratios are medians over neighboring turns.
2. manifest: a CSV of 1,000,000 images, each of its own client (hard links to a few small PNGs),
   against the least that can be done with it: ``csv.reader`` over its lines and ``os.stat`` of
   its files, in the same process.

Writes ``benchmarks/results/clients.txt`` (not with --short).
"""

import csv
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import common
import numpy as np
from PIL import Image

import fedss
from fedss.core.algorithm import draw_cohort

IMAGES, CLASSES, COHORT, SIDE = 3, 10_000, 100, 16
ROUNDS, DRAWS = 12, 200


@contextmanager
def memory() -> Iterator[dict[str, float]]:
    """Memory of this process in MB, without mapped files: before the block, and at its peak."""
    status, over = Path("/proc/self/status"), threading.Event()

    def now() -> float:
        (line,) = (s for s in status.read_text().splitlines() if s.startswith("RssAnon"))
        return int(line.split()[1]) / 1000

    memory = {"MB before": now(), "MB peak": 0.0}

    def watch() -> None:
        while not over.wait(0.005):
            memory["MB peak"] = max(memory["MB peak"], now())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield memory
    finally:
        over.set()
        watcher.join()


def dataset(path: Path, clients: int) -> fedss.Dataset:
    """``clients`` times three images of the file, and a small test."""
    count = IMAGES * clients
    pixels = np.memmap(path, np.uint8, "r", shape=(count, 1, SIDE, SIDE))
    train = common.named_images(
        pixels, np.arange(count) * 7919 % CLASSES, np.arange(count) // IMAGES
    )
    labels, nobody = np.arange(200) // 2, np.zeros(200, np.int64)
    test = common.named_images(np.array(pixels[:200]), labels, nobody, "unseen")
    return fedss.Dataset("random", train, fedss.RetrievalTask(test))


def train(path: str, clients: int) -> dict[str, float]:
    """One run; what it took."""
    config = fedss.Config(
        clients_per_round=COHORT, rounds=ROUNDS, eval_every=0, checkpoint_every=ROUNDS, workers=1
    )
    clocks = [(time.perf_counter(), time.process_time())]

    def on_round(_: object) -> None:
        clocks.append((time.perf_counter(), time.process_time()))

    with tempfile.TemporaryDirectory() as out, memory() as megabytes:
        fedss.train(config, out, data=dataset(Path(path), clients), on_round=on_round)

    def draw(round: int) -> float:
        return common.timed(lambda: draw_cohort(clients, COHORT, 0, round))[1].wall

    # The first round warms up, the last one has the evaluation.
    wall, cpu = np.median(np.diff(np.array(clocks[1:-1]), axis=0), axis=0)
    return {
        **megabytes,
        "CPU s to start": clocks[1][1] - clocks[0][1] - cpu,
        "CPU s a round": cpu,
        "s a round": wall,
        "us to draw": 1e6 * statistics.median(map(draw, range(DRAWS))),
    }


def write_manifest(root: Path, clients: int) -> Path:
    """An image for each client, files in folders of a thousand."""
    rng, count = np.random.default_rng(0), clients
    originals = []
    for i in range(-(-count // 50_000)):  # file systems bound the links to one file
        originals.append(root / f"original{i}.png")
        Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(originals[-1])
    path = root / "images.csv"
    with path.open("w") as file:
        file.write("image,label,client\n")
        for i in range(count):
            name = f"{i // 1000:04d}/{i % 1000:03d}.png"
            if i % 1000 == 0:
                (root / name).parent.mkdir()
            os.link(originals[i % len(originals)], root / name)
            file.write(f"{name},class {i * 7919 % CLASSES},client {i}\n")
    return path


def load(path: str) -> dict[str, float]:
    """One load of a manifest, and the least that can be done with it."""
    folder = Path(path).parent
    options: dict[str, Any] = {"image_size": 8, "channels": 1, "test_classes": 0.01}
    with memory() as megabytes:
        data, loading = common.timed(
            lambda: fedss.load_dataset("csv", path, cache=folder / "cache", **options)
        )

    def read_and_stat() -> None:
        with open(path, newline="") as file:
            lines = csv.reader(file)
            next(lines)
            for line in lines:
                os.stat(os.path.join(folder, line[0]))

    assert data.test is not None
    return {
        "images": len(data.train) + len(data.test.query),
        **megabytes,
        "CPU s to load": loading.cpu,
        "CPU s to read and stat": common.timed(read_and_stat)[1].cpu,
    }


def run_job(job: str, *args: object) -> dict[str, float]:
    """``train`` or ``load`` in a process of its own."""
    result = common.in_own_process(job, *args)
    print({name: float(f"{value:.4g}") for name, value in result.items()}, flush=True)
    return result


def training(folder: Path, few: int, many: int, turns: int) -> list[str]:
    path = folder / "pixels"
    rng = np.random.default_rng(0)
    with path.open("wb") as file:
        for _ in range(0, IMAGES * many, 10_000):
            file.write(rng.bytes(10_000 * SIDE * SIDE))
    runs: dict[int, list[dict[str, float]]] = {few: [], many: []}
    for turn in range(turns):
        for clients in common.rotated([many, few], turn):
            runs[clients].append(run_job("train", path, clients))
    path.unlink()
    lines = [f"{'':<24} {few:>12,} {many:>12,} {'ratio':>8}"]
    for name in runs[few][0]:
        left, right = ([run[name] for run in runs[clients]] for clients in (few, many))
        a, b = statistics.median(left), statistics.median(right)
        lines.append(f"{name:<24} {a:>12.4g} {b:>12.4g} {common.median_ratio(right, left):>8.3f}")
    return lines


def manifest(folder: Path, clients: int) -> list[str]:
    path = write_manifest(folder, clients)
    first, again = (run_job("load", path) for _ in range(2))
    lines = [f"{'':<24} {'first':>12} {'again':>12}"]
    lines += [f"{name:<24} {first[name]:>12.4g} {again[name]:>12.4g}" for name in first]
    ratio = again["CPU s to load"] / again["CPU s to read and stat"]
    return [*lines, f"{'ratio to read and stat':<24} {'':>12} {ratio:>12.2f}"]


def main() -> None:
    options = common.parser(__doc__, short="a tenth of the clients, no file").parse_args()
    few, many, turns = (1_000, 100_000, 2) if options.short else (10_000, 1_000_000, 3)
    index_megabytes = (3 * 8 * IMAGES + 8) * many / 1e6
    with tempfile.TemporaryDirectory() as folder:
        trained = training(Path(folder), few, many, turns)
    with tempfile.TemporaryDirectory() as folder:
        loaded = manifest(Path(folder), many)
    report = common.Report("A million clients")
    report.add(
        f"Training: {few:,} and {many:,} clients of {IMAGES} images 1 x {SIDE} x {SIDE} each,",
        f"{CLASSES:,} classes, fedss with |S| = 64, a cohort of {COHORT}, one worker, settings of",
        "`fedss train`. Rounds are medians without the first and the last; start: all before the",
        "first round, without imports; MB: resident memory without mapped files.",
        "",
        *trained,
        "",
        f"At {many:,} clients labels, clients and the order of images by client, 8 bytes each an",
        f"image, and 8 bytes a client are {index_megabytes:.0f} MB of it.",
        "",
        f"Manifest: a CSV of {many:,} images, each of its own client. First: with decoding, on",
        "all cores. Again: from the cache. Read and stat: csv.reader over the lines and os.stat of",
        "each file, nothing else.",
        "",
        *loaded,
    )
    report.write(unless=options.short)


if __name__ == "__main__":
    common.run_script(main, train=train, load=load)
