"""Search: our exact search against faiss and usearch; the index file; `fedss index`.

    python benchmarks/search.py              (about 15 minutes on one core; --short: under one)

Needs ``pip install 'fedss[peer-search]'`` (faiss-cpu and usearch; fedss itself needs neither).

1. Search. Made-up embeddings in classes of classes, as real ones lie: groups of 100 classes round a
   centre, classes of 10 pictures. Queries are further pictures of such classes, one at a time, k =
   10. Recall is the share of the ten that ``fedss.nearest`` finds (exact, in float64). Each engine
   in a process of its own, on one thread. Engines:

   - fedss: ``Collection.search``: every score in float32, the first ones again exactly;
   - faiss flat: ``IndexFlatIP``, every score in float32;
   - faiss HNSW: ``IndexHNSWFlat``, 32 neighbours, efConstruction 80, efSearch 128;
   - usearch: its HNSW, float32, connectivity 32, expansion_add 80, expansion_search 128.

2. Where thumbnails go: as many JPEGs as an index of 100,000 has, in one SQLite file, in one file
   with offsets, and in a folder of files: writing, size, reading ten of them.

3. ``fedss index`` and opening: made-up photographs into an index, the same again, and the opening
   of an index of 100,000.

Writes ``benchmarks/results/search.txt`` (not with --short).
"""

import argparse
import datetime
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omniglot import processor
from PIL import Image
from torch.nn.functional import normalize

import fedss
from fedss.inference.pixels import thumbnail
from fedss.models import build_embedder, save_embedder
from fedss.search import Collection, build_collection, open_collection
from fedss.search.store import Item, add_items, create_store, transaction, write_metadata

RESULTS = Path(__file__).parent / "results" / "search.txt"
K, QUERIES = 10, 100
SIZES = ((10_000, 64), (100_000, 64), (100_000, 512), (1_000_000, 64), (1_000_000, 512))
# Larger graphs take the best part of an hour on one core.
GRAPH_LIMIT = 100_000 * 64
EMBEDDER = build_embedder("conv4", channels=3, image_size=64, embedding_size=64, seed=0)


def made_up(rows: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit embeddings [rows, size], and of queries [QUERIES, size]."""
    draw = torch.Generator().manual_seed(0)
    classes = max(1, rows // 10)
    centres = torch.randn(max(1, classes // 100), size, generator=draw)
    of_class = torch.arange(classes) % len(centres)
    means = centres[of_class] + 0.7 * torch.randn(classes, size, generator=draw)

    def pictures(labels: torch.Tensor) -> torch.Tensor:
        out = torch.randn(len(labels), size, generator=draw).mul_(0.5)
        for start in range(0, len(labels), 65_536):
            out[start : start + 65_536] += means[labels[start : start + 65_536]]
        return normalize(out, dim=1, out=out)

    order = torch.randperm(rows, generator=draw)
    return pictures(order % classes), pictures(order[:QUERIES] % classes)


Search = Callable[[np.ndarray], list[int]]


def ours(rows: np.ndarray) -> Search:
    count = len(rows)
    names = tuple(map(str, range(count)))
    collection = Collection(
        folder=Path(),
        source=Path(),
        root=Path(),
        embedder=EMBEDDER,
        names=names,
        labels=(None,) * count,
        vectors_ND=torch.from_numpy(rows),
        indexed=count,
        skipped=(),
        links=0,
        embedded=0,
        _builds=("", ""),
        _ids=tuple(range(count)),
    )
    return lambda query: [
        match.position for match in collection.search(torch.from_numpy(query[None]), K)[0]
    ]


def faiss_flat(rows: np.ndarray) -> Search:
    import faiss

    faiss.omp_set_num_threads(1)
    index = faiss.IndexFlatIP(rows.shape[1])
    index.add(rows)
    return lambda query: index.search(query[None], K)[1][0].tolist()


def faiss_hnsw(rows: np.ndarray) -> Search:
    import faiss

    faiss.omp_set_num_threads(1)
    index = faiss.IndexHNSWFlat(rows.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction, index.hnsw.efSearch = 80, 128
    index.add(rows)
    return lambda query: index.search(query[None], K)[1][0].tolist()


def usearch(rows: np.ndarray) -> Search:
    from usearch.index import Index

    index = Index(
        ndim=rows.shape[1],
        metric="ip",
        dtype="f32",
        connectivity=32,
        expansion_add=80,
        expansion_search=128,
    )
    index.add(np.arange(len(rows)), rows, threads=1)
    return lambda query: index.search(query, K, threads=1).keys.tolist()


ENGINES: dict[str, Callable[[np.ndarray], Search]] = {
    "fedss": ours,
    "faiss flat": faiss_flat,
    "faiss HNSW": faiss_hnsw,
    "usearch": usearch,
}


def measure(engine: str, rows: int, size: int) -> dict[str, float]:
    torch.set_num_threads(1)
    gallery, queries = made_up(rows, size)
    # Warm-up: imports, and the first call of each kernel.
    small = ENGINES[engine](gallery[:1000].numpy())
    small(queries[0].numpy())
    before = resident_megabytes()
    start = time.perf_counter()
    search = ENGINES[engine](gallery.numpy())
    build = time.perf_counter() - start
    found, seconds, busy = [], [], []
    search(queries[0].numpy())
    for query in queries.numpy():
        start, cpu = time.perf_counter(), time.process_time()
        found.append(search(query))
        seconds.append(time.perf_counter() - start)
        busy.append(time.process_time() - cpu)
    after = resident_megabytes()
    right = 0
    for start_row in range(0, QUERIES, 50):
        block = queries[start_row : start_row + 50]
        _, exact = fedss.nearest(block, gallery, K)
        for there, here in zip(exact.tolist(), found[start_row : start_row + 50], strict=True):
            right += len(set(there) & set(here))
    return {
        "build": build,
        "megabytes": after - before,
        "median": 1e3 * statistics.median(seconds),
        "cpu": 1e3 * statistics.median(busy),
        "recall": right / (K * QUERIES),
    }


def resident_megabytes() -> float:
    """What the process holds now, where the system tells; else its peak."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return pages * resource.getpagesize() / 1e6


def in_own_process(engine: str, rows: int, size: int) -> dict[str, float]:
    words = [sys.executable, __file__, "--engine", engine, "--rows", str(rows), "--size", str(size)]
    quiet = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(words, env={**os.environ, **quiet}, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{engine} failed")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def photograph(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """A smooth random field with some grain."""
    coarse = rng.integers(0, 256, (9, 12, 3), np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    grain = rng.normal(0, 12, (height, width, 3))
    return Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8))


def containers(folder: Path, count: int) -> list[str]:
    rng = np.random.default_rng(0)
    jpegs = [thumbnail(photograph(rng, 640, 480)) for _ in range(200)]
    some = rng.integers(0, count, (100, 10))
    of = [jpegs[i % len(jpegs)] for i in range(count)]
    total = sum(map(len, of))
    vectors = normalize(torch.randn(count, 64), dim=1).numpy()

    def sqlite() -> Callable[[int], bytes]:
        from fedss.search.store import read_thumbnail

        path = folder / "thumbnails.sqlite"
        create_store(path, {"build": "1"})
        with transaction(path, alone=True) as file:
            items = (Item(f"{i}.jpg", None, (1, 2), vectors[i], of[i]) for i in range(count))
            add_items(file, items)
        return lambda i: read_thumbnail(path, i + 1, "1") or b""

    def flat() -> Callable[[int], bytes]:
        path, ends = folder / "thumbnails.bin", np.cumsum([0, *map(len, of)])
        with path.open("wb") as file:
            file.writelines(of)
        held = np.memmap(path, np.uint8, "r")
        return lambda i: held[ends[i] : ends[i + 1]].tobytes()

    def files() -> Callable[[int], bytes]:
        place = folder / "thumbnails"
        for i, jpeg in enumerate(of):
            path = place / f"{i // 1000}" / f"{i}.jpg"
            if i % 1000 == 0:
                path.parent.mkdir(parents=True)
            path.write_bytes(jpeg)
        return lambda i: (place / f"{i // 1000}" / f"{i}.jpg").read_bytes()

    def disk(path: Path) -> int:
        inside = path.rglob("*") if path.is_dir() else [path]
        return sum(file.stat().st_blocks * 512 for file in inside)

    lines = [f"{'':<24} {'writing s':>10} {'MB on disk':>11} {'ten read, ms':>13}"]
    for name, make, place in (
        ("SQLite, with vectors", sqlite, "thumbnails.sqlite"),
        ("one file and offsets", flat, "thumbnails.bin"),
        ("a file each", files, "thumbnails"),
    ):
        start = time.perf_counter()
        read = make()
        os.sync()
        wrote = time.perf_counter() - start
        seconds = []
        for ten in some.tolist():
            start = time.perf_counter()
            for i in ten:
                if read(i) != of[i]:
                    raise SystemExit(f"{name}: another picture came back")
            seconds.append(time.perf_counter() - start)
        megabytes = disk(folder / place) / 1e6
        ten_ms = 1e3 * statistics.median(seconds)
        lines.append(f"{name:<24} {wrote:>10.1f} {megabytes:>11.0f} {ten_ms:>13.2f}")
    return [
        f"{count:,} JPEGs of {total / count / 1e3:.1f} kB, {total / 1e6:.0f} MB in all:",
        *lines,
    ]


def indexing(folder: Path, pictures: int, opened: int) -> list[str]:
    rng = np.random.default_rng(1)
    save_embedder(EMBEDDER, folder / "run" / "model", {})
    (folder / "photos").mkdir()
    for i in range(pictures):
        path = folder / "photos" / f"{i}.jpg"
        if i < 25:
            photograph(rng, 640, 480).save(path, quality=90)
        else:
            shutil.copyfile(path.with_name(f"{i % 25}.jpg"), path)
    seconds, busy = [], []
    for _ in range(2):
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        cpu = time.process_time()
        build_collection(folder / "run", folder / "photos")
        seconds.append(time.perf_counter() - start)
        busy.append(time.process_time() - cpu)
        if len(seconds) == 1:
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3
    size = (folder / "run" / "index" / "index.sqlite").stat().st_size

    big = folder / "big"
    big.mkdir()
    from fedss.search.collection import fingerprint

    photos = str(folder / "photos")
    facts = {"source": photos, "root": photos, "links": 0, "skipped": [], "embedded": 0}
    vectors = normalize(torch.randn(opened, 64), dim=1).numpy()
    create_store(big / "index.sqlite", {"model": fingerprint(EMBEDDER), "build": "1"})
    with transaction(big / "index.sqlite", alone=True) as file:
        add_items(
            file,
            (
                Item(f"class {i % 10_000}/{i}.jpg", f"class {i % 10_000}", (1, 2), vectors[i], b"x")
                for i in range(opened)
            ),
        )
        write_metadata(file, {"facts": json.dumps(facts)})
    opening = []
    for _ in range(3):
        start = time.perf_counter()
        found = open_collection(big, folder / "run")
        opening.append(time.perf_counter() - start)
    start = time.perf_counter()
    shape = tuple(found.prototypes_CD.shape)
    prototypes = time.perf_counter() - start
    return [
        f"{pictures:,} JPEGs of 640 x 480, conv4, d = 64:",
        f"  fedss index, first time  {pictures / busy[0]:>7,.0f} pictures per CPU second "
        f"({pictures / seconds[0]:,.0f} by the clock),",
        f"    {size / pictures / 1e3:.1f} kB a picture in the index, peak memory + {grown:.0f} MB",
        f"  again, nothing changed   {pictures / busy[1]:>7,.0f} pictures per CPU second "
        f"({pictures / seconds[1]:,.0f} by the clock)",
        f"opening an index of {opened:,}, model included: {min(opening):.2f} s; "
        f"its {shape[0]:,} prototypes: {prototypes:.2f} s",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="10,000 vectors, no file")
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine:
        print(json.dumps(measure(options.engine, options.rows, options.size)))
        return
    lines = [
        "Search in one's own pictures",
        "command   python benchmarks/search.py",
        f"date      {datetime.date.today().isoformat()}",
        f"hardware  {processor()}, {os.cpu_count()} cores, no GPU used",
        f"software  fedss {version('fedss')}, torch {version('torch')}, numpy {version('numpy')}, "
        f"faiss-cpu {version('faiss-cpu')}, usearch {version('usearch')}, "
        f"Python {platform.python_version()}",
        "",
        f"Search, one thread, one query at a time, k = {K}, {QUERIES} queries, clustered data. MB:",
        "what the process grew by beyond the vectors themselves, which it holds already. CPU ms",
        "and wall ms of a search: medians; other work on the machine shows in the latter.",
        "",
        f"{'vectors':>9} {'d':>4}  {'engine':<11} {'build s':>8} {'MB':>6} {'CPU ms':>8} "
        f"{'wall ms':>8} {'recall':>7}",
    ]
    print("\n".join(lines), flush=True)

    def say(more: list[str]) -> None:
        lines.extend(more)
        print("\n".join(more), flush=True)

    for rows, size in SIZES[: 1 if options.short else None]:
        for engine in ENGINES:
            if rows * size > GRAPH_LIMIT and engine in ("faiss HNSW", "usearch"):
                continue
            found: dict[str, Any] = in_own_process(engine, rows, size)
            say(
                [
                    f"{rows:>9,} {size:>4}  {engine:<11} {found['build']:>8.1f} "
                    f"{found['megabytes']:>6.0f} {found['cpu']:>8.2f} {found['median']:>8.2f} "
                    f"{found['recall']:>7.4f}"
                ]
            )
    many = 2_000 if options.short else 100_000
    with tempfile.TemporaryDirectory() as folder:
        say(["", *containers(Path(folder), many)])
    with tempfile.TemporaryDirectory() as folder:
        say(["", *indexing(Path(folder), many // 50, many)])
    if not options.short:
        RESULTS.write_text("\n".join(lines) + "\n")
        print(f"written to {RESULTS}")


if __name__ == "__main__":
    main()
