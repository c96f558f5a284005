"""The report, from fake records with plausible curves."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedss.errors import RunFolderError
from fedss.report import write_report

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


def fake_run(
    folder: Path,
    method: str = "fedss",
    seed: int = 0,
    rounds: int = 120,
    stop: int | None = None,
    level: float | None = None,
    pixels: np.ndarray | None = None,
    class_name: str = "character {}",
) -> dict[str, Any]:
    """Write a run folder; returns its line of summary.json. ``pixels`` [class, drawing, C, H, W]."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, len(method)])
    final, rows = METHODS.get(method, (0.25, SIZE))
    final = (level or final) + rng.normal(0, 0.006)
    class_bytes = None if rows is None else rows * (ROW + 8)
    each = None if class_bytes is None else BACKBONE + class_bytes
    config = {
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
            "renormalise": True,
            "workers": None,
        },
        "data": {
            "name": "omniglot",
            "train_images": 19280,
            "train_classes": N_CLASSES,
            "train_clients": 600,
            "own_classes": [14, 30, 55],
            "test_queries": 10180,
            "test_gallery": None,
            "test_classes": 509,
            "image_shape": [1, 28, 28],
        },
        "model": {"parameters": 52_336},
    }
    (folder / "config.json").write_text(json.dumps(config))
    lines = []
    for r in range(1, (stop or rounds) + 1):
        share = 1 - np.exp(-3.2 * r / rounds)
        metrics = None
        if r % 5 == 0 or r == rounds:
            score = final if r == rounds else final * share / (1 - np.exp(-3.2))
            score += 0 if r == rounds else float(rng.normal(0, 0.003))
            metrics = scores(score)
        line = {
            "round": r,
            "loss": 1 + 4 * np.exp(-4 * r / rounds) + float(rng.normal(0, 0.04)),
            "clients": 20,
            "examples": 640,
            "bytes_down": None if each is None else 20 * each,
            "bytes_up": None if each is None else 20 * each,
            "seconds": {"train": 1.2, "aggregate": 0.1, "evaluate": 0.5, "checkpoint": 0.02},
            "metrics": metrics,
        }
        lines.append(json.dumps(line))
    (folder / "records.jsonl").write_text("".join(f"{line}\n" for line in lines))
    write_neighbours(folder / "retrieval.npz", final, rng, pixels, class_name)
    return {
        "method": method,
        "seed": seed,
        "rounds": rounds,
        "sample_size": SIZE,
        **scores(final),
        **{f"bytes_{way}_per_client_round": each for way in ("down", "up")},
        **{f"class_row_bytes_{way}_per_client_round": class_bytes for way in ("down", "up")},
        "backbone_bytes_down_per_client_round": None if rows is None else BACKBONE,
        "backbone_bytes_up_per_client_round": None if rows is None else BACKBONE,
        "class_rows_per_client": rows,
        "seconds": 218.4,
    }


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
    queries: int = 12,
) -> None:
    if pixels is None:
        pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 1, 8, 8), dtype=np.uint8)
    fixed = np.random.default_rng(7)
    hardness = fixed.random(queries)
    own = fixed.permutation(len(pixels))[:queries]
    labels = np.empty((queries, 6), dtype=np.int64)
    labels[:, 0] = own
    right = rng.random((queries, 5)) < (quality * 2.6 * (1.3 - hardness))[:, None]
    labels[:, 1:] = np.where(right, own[:, None], rng.integers(0, len(pixels), (queries, 5)))
    drawing = rng.integers(1, pixels.shape[1], (queries, 6))
    drawing[:, 0] = 0
    np.savez_compressed(
        path,
        pixels=pixels[labels, drawing],
        labels=labels,
        class_names=np.array([[class_name.format(c) for c in row] for row in labels]),
        scores=-np.sort(-rng.uniform(0.55, 0.98, (queries, 5)), axis=1).astype(np.float32),
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
    (folder / "summary.json").write_text(json.dumps(summary))
    return summary
