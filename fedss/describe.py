"""What is in a data set, and what each method would move: before any training."""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedss.build import build_model, class_counts, evaluation_task, num_trainable
from fedss.config import Config
from fedss.data import Dataset, fingerprint, own_classes, seen_classes
from fedss.methods import METHODS
from fedss.models import Embedder
from fedss.seeds import generator


def describe(config: Config, data: Dataset) -> dict[str, Any]:
    """What is in a data set, as a run writes it down."""
    images, task, own_K = data.train, evaluation_task(config, data), own_classes(data.train)
    return {
        "name": data.name,
        "fingerprint": fingerprint(data),
        "train_images": len(images),
        "train_classes": len(images.class_names),
        "train_clients": len(images.client_names),
        "own_classes": [int(own_K.min()), float(np.median(own_K)), int(own_K.max())],
        "test_queries": len(task.query),
        "test_gallery": None if task.gallery is None else len(task.gallery),
        "test_classes": len(np.unique(task.query.labels)),
        "test_classes_seen": seen_classes(data),
        "image_shape": list(images.pixels.shape[1:]),
        "skipped_pictures": len(data.skipped),
    }


def describe_model(embedder: Embedder) -> dict[str, Any]:
    """What a run writes down of its model's structure: a module of your own has no name."""
    shapes = [(name, tuple(p.shape)) for name, p in embedder.named_parameters()]
    return {
        "backbone": type(embedder.backbone).__name__,
        "parameters": num_trainable(embedder),
        "structure": hashlib.sha256(f"{embedder}{shapes}".encode()).hexdigest()[:16],
    }


@dataclass(frozen=True)
class Cost:
    """What a method moves each way per client and round, on average over clients.

    ``bytes`` and ``class_row_bytes`` are the tensors' bytes (class ids in the former) without
    headers; None where pictures are pooled.
    """

    method: str
    class_rows: float
    share: float
    class_row_bytes: float | None
    bytes: float | None


def costs(config: Config, data: Dataset) -> list[Cost]:
    """What each method would move, worked out from class counts, before any training.

    Raises:
        ConfigError: ``sample_size`` is above the number of classes, or no such backbone.
    """
    num_classes, sample_size = class_counts(config, data)
    backbone = 4 * num_trainable(build_model(config, data, None))
    own, clients = np.unique(own_classes(data.train), return_counts=True)
    result = []
    for method in METHODS.values():
        rng = generator(config.seed, "costs")
        sizes = [
            len(method.sampler(np.arange(count), num_classes, sample_size, rng).ids_S)
            for count in own
        ]
        rows = float(np.average(sizes, weights=clients))
        row_bytes = 4 * config.embedding_size * rows
        ids = 0 if rows == num_classes else 8 * rows
        moved = (None, None) if method.pooled else (row_bytes, backbone + row_bytes + ids)
        result.append(Cost(method.name, rows, rows / num_classes, *moved))
    return result
