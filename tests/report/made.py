"""Run folders with plausible curves, and pages as a browser reads them."""

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, cast

import numpy as np

from fedss.evaluation.baselines import Floors
from fedss.evaluation.intervals import ClassScores
from fedss.files import write_json
from fedss.report import write_report
from fedss.runs import reading
from fedss.runs.findings import write_scores
from fedss.runs.records import WAYS, Record, open_records
from fedss.runs.summaries import summarize, write_summaries

N_CLASSES, SIZE, BACKBONE, ROW = 964, 64, 209_344, 64 * 4
# method -> (final MAP@10, class rows per client)
METHODS: dict[str, tuple[float, int | None]] = {
    "full": (0.352, N_CLASSES),
    "fedss": (0.341, SIZE),
    "fedss-uncorrected": (0.303, SIZE),
    "pos-only": (0.270, 32),
    "neg-only": (0.147, SIZE),
    "fedaws": (0.288, 32),
    "central": (0.412, None),
}
# label -> (method, MAP@10, bytes both ways, of these moments)
VARIANTS: dict[str, tuple[str, float, float | None, float]] = {
    "full": ("full", 0.350, 866e3, 0),
    "fedss uniform": ("fedss", 0.340, 407e3, 0),
    "fedss deck": ("fedss", 0.347, 407e3, 0),
    "moments": ("moments", 0.348, 408e3, 16.6e3),
    "moments rank 16": ("moments", 0.340, 400e3, 8.6e3),
    "fedss deck int8": ("fedss", 0.346, 112e3, 0),
    "fedss deck int4": ("fedss", 0.335, 54e3, 0),
    "moments int4": ("moments", 0.334, 54e3, 2e3),
    "pos-only": ("pos-only", 0.270, 391e3, 0),
    "central": ("central", 0.460, None, 0),
}


def fake_run(
    folder: Path,
    method: str = "fedss",
    seed: int = 0,
    rounds: int = 120,
    stop: int | None = None,
    level: float | None = None,
    pixels: np.ndarray | None = None,
    class_name: str = "character {}",
    clients: int = 20,
    depth: int = 5,
    seen: int | None = None,
) -> dict[str, Any]:
    """Write a run folder; return its line of summary.json. pixels: [class, drawing, C, H, W]."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, len(method)])
    final, rows = METHODS.get(method, (0.25, SIZE))
    final = (level or final) + rng.normal(0, 0.006)
    class_bytes = None if rows is None else rows * (ROW + 8)
    each = None if class_bytes is None else BACKBONE + class_bytes
    config: dict[str, Any] = {
        "fedss": "0.1.0",
        "torch": "2.13.0",
        "python": "3.11.7",
        "platform": "Linux x86_64",
        "config": {
            "method": method,
            "data": "omniglot",
            "rounds": rounds,
            "sample_size": SIZE,
            "seed": seed,
            "clients_per_round": 20,
            "batch_size": 8,
            "client_lr": 0.05,
            "class_row_lr": 0.5,
            "scale": 10.0,
            "embedding_size": 64,
            "backbone": "conv4",
            "server_optimizer": "momentum",
            "server_lr": 1.0,
            "normalize_rows": True,
            "workers": None,
        },
        "data": {
            "name": "omniglot",
            "train_images": 19280,
            "train_classes": N_CLASSES,
            "train_clients": 600 if clients == 20 else clients,
            "own_classes": [14, 30, 55],
            "test_queries": 10180,
            "test_gallery": None,
            "test_classes": 509,
            "image_shape": [1, 28, 28],
        },
        "model": {"parameters": 52_336},
    }
    if seen is not None:
        config["data"] |= {"test_classes_seen": seen}
    write_json(folder / "config.json", config)
    traffic = {"backbone": None if rows is None else BACKBONE, "class_row": class_bytes}
    records = []
    for r in range(1, (stop or rounds) + 1):
        share = 1 - np.exp(-3.2 * r / rounds)
        metrics = None
        if r % 5 == 0 or r == rounds:
            score = final if r == rounds else final * share / (1 - np.exp(-3.2))
            score += 0 if r == rounds else float(rng.normal(0, 0.003))
            metrics = scores(score)
        record = {
            "round": r,
            "loss": 1 + len(method) / 20 + 4 * np.exp(-4 * r / rounds) + float(rng.normal(0, 0.04)),
            "clients": clients,
            "examples": 640,
            "class_rows": rows and clients * rows,
            "seconds": {"train": 1.2, "aggregate": 0.1, "evaluate": 0.5, "checkpoint": 0.02},
            "metrics": metrics,
        }
        for way in WAYS:
            record[f"bytes_{way}"] = each and clients * each
            record |= {f"{p}_bytes_{way}": size and clients * size for p, size in traffic.items()}
            record[f"moment_bytes_{way}"] = 0.0
        records.append(cast(Record, record))
    with open_records(folder, []) as add:
        for written in records:
            add(written, False)
    write_neighbours(folder / "retrieval.npz", final, rng, pixels, class_name, depth)
    run = {"method": method, "seed": seed, "rounds": rounds, "sample_size": SIZE}
    return dict(summarize(run, records))


def scores(level: float) -> dict[str, float]:
    return {
        "map_at_10": level,
        "recall_at_1": level + 0.3,
        "recall_at_5": level + 0.45,
        "map_at_r": level - 0.1,
    }


def write_neighbours(
    path: Path,
    quality: float,
    rng: np.random.Generator,
    pixels: np.ndarray | None,
    class_name: str,
    depth: int = 5,
    queries: int = 12,
) -> None:
    if pixels is None:
        pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 1, 8, 8), dtype=np.uint8)
    fixed = np.random.default_rng(7)
    hardness = fixed.random(queries)
    own = fixed.permutation(len(pixels))[:queries]
    labels = np.empty((queries, 1 + depth), dtype=np.int64)
    labels[:, 0] = own
    right = rng.random((queries, depth)) < (quality * 2.6 * (1.3 - hardness))[:, None]
    labels[:, 1:] = np.where(right, own[:, None], rng.integers(0, len(pixels), (queries, depth)))
    drawing = rng.integers(1, pixels.shape[1], (queries, 1 + depth))
    drawing[:, 0] = 0
    np.savez_compressed(
        path,
        pixels=pixels[labels, drawing],
        labels=labels,
        class_names=np.array([[class_name.format(c) for c in row] for row in labels]),
        scores=-np.sort(-rng.uniform(0.55, 0.98, (queries, depth)), axis=1).astype(np.float32),
        query_index=np.arange(queries, dtype=np.int64) * 100,
    )


def fake_comparison(
    folder: Path, methods: list[str], seeds: int = 1, **settings: Any
) -> list[dict[str, Any]]:
    summary = []
    for method in methods:
        for seed in range(seeds):
            name = f"{method}-{seed}"
            summary.append(fake_run(folder / name, method, seed, **settings) | {"folder": name})
    write_summaries(folder, summary)
    return summary


def fake_variants(
    folder: Path, names: list[str] | None = None, seeds: int = 2, **changed: Any
) -> list[dict[str, Any]]:
    """A comparison of variants whose means are those of `VARIANTS`; ``changed``: other scores."""
    summary = []
    for label in names or list(VARIANTS):
        method, score, moved, moments = VARIANTS[label]
        score = changed.get(label, score)
        for seed in range(seeds):
            name = f"{label.replace(' ', '-')}-seed{seed}"
            entry = fake_run(folder / name, method, seed, rounds=10, level=score)
            entry |= {"folder": name, "label": label}
            entry["map_at_10"] = score + 0.004 * (seed - (seeds - 1) / 2)
            if moved is not None:
                backbone = 0.45 * moved
                for way in ("down", "up"):
                    entry |= {
                        f"bytes_{way}_per_client_round": moved / 2,
                        f"backbone_bytes_{way}_per_client_round": backbone,
                        f"class_row_bytes_{way}_per_client_round": moved / 2 - backbone - moments,
                        f"moment_bytes_{way}_per_client_round": moments,
                    }
            summary.append(entry)
    write_summaries(folder, summary)
    return summary


class Page(HTMLParser):
    """What a browser would load, say and show of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.ids: list[str] = []
        self.cells: list[str] = []
        self.titles: list[str] = []
        self.alts: list[str] = []
        self.words = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append(tag)
        for name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
            if name in found:
                self.loads.append(found[name] or "")
        self.ids += [found["id"] or ""] if "id" in found else []
        self.titles += [found["title"] or ""] if "title" in found else []
        self.alts += [found["alt"] or ""] if "alt" in found else []
        if tag in ("td", "th"):
            self.cells.append("")
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.words += data
        if "td" in self.open or "th" in self.open:
            self.cells[-1] += data


def read(folder: Path) -> tuple[str, Page]:
    path = write_report(folder)
    assert path == folder / "report.html"
    assert [p.name for p in folder.glob(".report*")] == []
    html = path.read_text()
    return html, Page(html)


def measured(
    folder: Path,
    methods: dict[str, float],
    seeds: int = 1,
    classes: int = 60,
    noise: float = 0.01,
    pixels: float = 0.1,
) -> Page:
    """A comparison whose runs say what each class has, and floors; read."""
    rng = np.random.default_rng(0)
    usual = rng.uniform(-0.03, 0.03, classes)
    usual -= usual.mean()
    summary = []

    def write(path: Path, by_class: dict[str, np.ndarray]) -> None:
        scores = {
            name: ClassScores(tuple(f"{i:03d}" for i in range(classes)), np.full(classes, 5), v)
            for name, v in by_class.items()
        }
        write_scores(path, Floors({name: s.map_at_10 for name, s in scores.items()}, scores))

    for method, level in methods.items():
        for seed in range(seeds):
            name = f"{method}-{seed}"
            entry = fake_run(folder / name, method, seed, rounds=10)
            values = level + usual + noise * rng.uniform(-1.7, 1.7, classes)
            values += level - values.mean()
            write(folder / name / "by_class.json", {"trained": values})
            floors = {"chance": 0.01, "pixels": pixels, "untrained": 0.05}
            write(folder / name / "floors.json", {n: v + usual * 0.05 for n, v in floors.items()})
            mean = float(values.mean())
            summary.append({**entry, **scores(mean), "map_at_10_by_class": mean, "folder": name})
    write_summaries(folder, summary)
    return read(folder)[1]


def single(folder: Path, **settings: Any) -> dict[str, Any]:
    entry = fake_run(folder, **settings) | {"folder": "."}
    write_summaries(folder, [entry])
    return entry


def rewrite(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> list[Any]:
    """Change each line of records.jsonl; the new lines."""
    path = folder / "records.jsonl"
    lines = [change(json.loads(line)) for line in path.read_text().splitlines()]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return lines


def headline(page: Page) -> str:
    return re.sub(r"\s+", " ", page.words.split("Federated Sampled Softmax ·")[1])


def table_after(page: Page, first: str) -> list[str]:
    return page.cells[page.cells.index(first) :]


def groups_of(folder: Path) -> list[reading.Group]:
    return reading.group_runs(reading.read_runs(folder), folder)
