"""Search: our exact search against faiss and usearch; the index file; `fedss index`.

    python benchmarks/search.py              (about 15 minutes on one core; --short: under one)

Needs ``pip install 'fedss[peer-search]'`` (faiss-cpu and usearch; fedss itself needs neither).

1. Search. Made-up embeddings in classes of classes, as real ones lie: groups of 100 classes round a
   center, classes of 10 images. Queries are further images of such classes, one at a time, k =
   10. Recall is the share of the ten that ``fedss.nearest`` finds (exact, in float64). Each engine
   in a process of its own, on one thread. Engines:

   - fedss: ``Collection.search``: every score in float32, the first ones again exactly;
   - faiss flat: ``IndexFlatIP``, every score in float32;
   - faiss HNSW: ``IndexHNSWFlat``, 32 neighbors, efConstruction 80, efSearch 128;
   - usearch: its HNSW, float32, connectivity 32, expansion_add 80, expansion_search 128.

2. Where thumbnails go: as many JPEGs as an index of 100,000 has, in one SQLite file, in one file
   with offsets, and in a folder of files: writing, size, reading ten of them.

3. ``fedss index`` and opening: made-up photographs into an index, the same again, and the opening
   of an index of 100,000.

Writes ``benchmarks/results/search.txt`` (not with --short).
"""

import json
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import common
import numpy as np
import torch
from torch.nn.functional import normalize

import fedss
from fedss.inference.pixels import thumbnail
from fedss.models import build_embedder, fingerprint, save_embedder
from fedss.search import Collection, build_collection, open_collection
from fedss.search.store import (
    Item,
    add_items,
    create_store,
    read_thumbnail,
    transaction,
    write_metadata,
)

K, QUERIES = 10, 100
SIZES = ((10_000, 64), (100_000, 64), (100_000, 512), (1_000_000, 64), (1_000_000, 512))
# Larger graphs take the best part of an hour on one core.
GRAPH_LIMIT = 100_000 * 64
EMBEDDER = build_embedder("conv4", channels=3, image_size=64, embedding_size=64, seed=0)


def made_up(rows: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit embeddings [rows, size], and of queries [QUERIES, size]."""
    draw = torch.Generator().manual_seed(0)
    classes = max(1, rows // 10)
    centers = torch.randn(max(1, classes // 100), size, generator=draw)
    of_class = torch.arange(classes) % len(centers)
    means = centers[of_class] + 0.7 * torch.randn(classes, size, generator=draw)

    def around(labels: torch.Tensor) -> torch.Tensor:
        out = torch.randn(len(labels), size, generator=draw).mul_(0.5)
        for start in range(0, len(labels), 65_536):
            out[start : start + 65_536] += means[labels[start : start + 65_536]]
        return normalize(out, dim=1, out=out)

    order = torch.randperm(rows, generator=draw)
    return around(order % classes), around(order[:QUERIES] % classes)


Search = Callable[[np.ndarray], list[int]]


def ours(rows: np.ndarray) -> Search:
    count = len(rows)
    collection = Collection(
        folder=Path(),
        source=Path(),
        root=Path(),
        embedder=EMBEDDER,
        names=tuple(map(str, range(count))),
        labels=(None,) * count,
        vectors_ND=torch.from_numpy(rows),
        indexed=count,
        skipped=(),
        passed_over={},
        remarks=(),
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
    before = common.resident_megabytes()
    search, building = common.timed(lambda: ENGINES[engine](gallery.numpy()))
    search(queries[0].numpy())
    neighbours, spent = zip(
        *(common.timed(partial(search, query)) for query in queries.numpy()), strict=True
    )
    after = common.resident_megabytes()
    right = 0
    for start_row in range(0, QUERIES, 50):
        block = queries[start_row : start_row + 50]
        _, exact = fedss.nearest(block, gallery, K)
        for expected, actual in zip(
            exact.tolist(), neighbours[start_row : start_row + 50], strict=True
        ):
            right += len(set(expected) & set(actual))
    return {
        "build": building.wall,
        "megabytes": after - before,
        "median": 1e3 * statistics.median(each.wall for each in spent),
        "cpu": 1e3 * statistics.median(each.cpu for each in spent),
        "recall": right / (K * QUERIES),
    }


Reader = Callable[[int], bytes]
Container = Callable[[Path, list[bytes]], Reader]


def containers(folder: Path, count: int) -> list[str]:
    few = [thumbnail(common.photograph(i, 640, 480)) for i in range(200)]
    jpegs = [few[i % len(few)] for i in range(count)]
    some = np.random.default_rng(0).integers(0, count, (100, 10)).tolist()
    total = sum(map(len, jpegs))

    def line(name: str, make: Container, place: Path) -> str:
        def write() -> Reader:
            read = make(place, jpegs)
            os.sync()
            return read

        read, writing = common.timed(write)
        seconds = []
        for ten in some:
            back, reading = common.timed(lambda ten=ten: [read(i) for i in ten])  # type: ignore[misc]
            if back != [jpegs[i] for i in ten]:
                raise SystemExit(f"{name}: another image came back")
            seconds.append(reading.wall)
        inside = place.rglob("*") if place.is_dir() else [place]
        megabytes = sum(file.stat().st_blocks * 512 for file in inside) / 1e6
        ten_ms = 1e3 * statistics.median(seconds)
        return f"{name:<24} {writing.wall:>10.1f} {megabytes:>11.0f} {ten_ms:>13.2f}"

    return [
        f"{count:,} JPEGs of {total / count / 1e3:.1f} kB, {total / 1e6:.0f} MB in all:",
        f"{'':<24} {'writing s':>10} {'MB on disk':>11} {'ten read, ms':>13}",
        line("SQLite, with vectors", in_sqlite, folder / "thumbnails.sqlite"),
        line("one file and offsets", in_one_file, folder / "thumbnails.bin"),
        line("a file each", in_files, folder / "thumbnails"),
    ]


def in_sqlite(path: Path, jpegs: list[bytes]) -> Reader:
    vectors = normalize(torch.randn(len(jpegs), 64), dim=1).numpy()
    create_store(path, {"build": "1"})
    with transaction(path, alone=True) as file:
        add_items(
            file, (Item(f"{i}.jpg", None, (1, 2), vectors[i], x) for i, x in enumerate(jpegs))
        )
    return lambda i: read_thumbnail(path, i + 1, "1") or b""


def in_one_file(path: Path, jpegs: list[bytes]) -> Reader:
    ends = np.cumsum([0, *map(len, jpegs)])
    with path.open("wb") as file:
        file.writelines(jpegs)
    held = np.memmap(path, np.uint8, "r")
    return lambda i: held[ends[i] : ends[i + 1]].tobytes()


def in_files(folder: Path, jpegs: list[bytes]) -> Reader:
    for i, jpeg in enumerate(jpegs):
        path = folder / f"{i // 1000}" / f"{i}.jpg"
        if i % 1000 == 0:
            path.parent.mkdir(parents=True)
        path.write_bytes(jpeg)
    return lambda i: (folder / f"{i // 1000}" / f"{i}.jpg").read_bytes()


def indexing(folder: Path, images: int, opened: int) -> list[str]:
    save_embedder(EMBEDDER, folder / "run" / "model", {})
    (folder / "photos").mkdir()
    for i in range(images):
        path = folder / "photos" / f"{i}.jpg"
        if i < 25:
            common.photograph(i, 640, 480).save(path, quality=90)
        else:
            shutil.copyfile(path.with_name(f"{i % 25}.jpg"), path)
    before = common.peak_megabytes()
    first = common.timed(lambda: build_collection(folder / "run", folder / "photos"))[1]
    grown = common.peak_megabytes() - before
    again = common.timed(lambda: build_collection(folder / "run", folder / "photos"))[1]
    size = (folder / "run" / "index" / "index.sqlite").stat().st_size

    big = folder / "big"
    big.mkdir()
    photos = str(folder / "photos")
    metadata = {"source": photos, "root": photos, "skipped": [], "embedded": 0}
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
        write_metadata(file, {"facts": json.dumps(metadata)})
    opened_in, spent = zip(
        *(common.timed(lambda: open_collection(big, folder / "run")) for _ in range(3)), strict=True
    )
    shape, prototypes = common.timed(lambda: tuple(opened_in[-1].prototypes_CD.shape))
    return [
        f"{images:,} JPEGs of 640 x 480, conv4, d = 64:",
        f"  fedss index, first time  {images / first.cpu:>7,.0f} images per CPU second "
        f"({images / first.wall:,.0f} by the clock),",
        f"    {size / images / 1e3:.1f} kB an image in the index, peak memory + {grown:.0f} MB",
        f"  again, nothing changed   {images / again.cpu:>7,.0f} images per CPU second "
        f"({images / again.wall:,.0f} by the clock)",
        f"opening an index of {opened:,}, model included: {min(spent).wall:.2f} s; "
        f"its {shape[0]:,} prototypes: {prototypes.wall:.2f} s",
    ]


def main() -> None:
    options = common.parser(__doc__, short="10,000 vectors, no file").parse_args()
    report = common.Report("Search in one's own images", ["faiss-cpu", "usearch"])
    report.add(
        f"Search, one thread, one query at a time, k = {K}, {QUERIES} queries, clustered data. MB:",
        "what the process grew by beyond the vectors themselves, which it holds already. CPU ms",
        "and wall ms of a search: medians; other work on the machine shows in the latter.",
        "",
        f"{'vectors':>9} {'d':>4}  {'engine':<11} {'build s':>8} {'MB':>6} {'CPU ms':>8} "
        f"{'wall ms':>8} {'recall':>7}",
    )
    for rows, size in SIZES[: 1 if options.short else None]:
        for engine in ENGINES:
            if rows * size > GRAPH_LIMIT and engine in ("faiss HNSW", "usearch"):
                continue
            result = common.in_own_process("measure", engine, rows, size, threads=1)
            report.add(
                f"{rows:>9,} {size:>4}  {engine:<11} {result['build']:>8.1f} "
                f"{result['megabytes']:>6.0f} {result['cpu']:>8.2f} {result['median']:>8.2f} "
                f"{result['recall']:>7.4f}"
            )
    many = 2_000 if options.short else 100_000
    with tempfile.TemporaryDirectory() as folder:
        report.add("", *containers(Path(folder), many))
    with tempfile.TemporaryDirectory() as folder:
        report.add("", *indexing(Path(folder), many // 50, many))
    report.write(unless=options.short)


if __name__ == "__main__":
    common.run_script(main, measure=measure)
