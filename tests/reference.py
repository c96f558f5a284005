"""Slow loops written from the formulas, in Python floats: what the fast code is held against."""

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import nn

from fedss.config import Config
from fedss.core.class_rows import ClassRows, read
from fedss.core.client import ClientUpdate
from fedss.data import Dataset, Images, RetrievalTask

TINY = Config(
    glyphs_classes=40,
    glyphs_clients=8,
    image_size=12,
    backbone="conv4-4",
    embedding_size=8,
    rounds=2,
    clients_per_round=2,
    workers=1,
)
"""Settings of a run that takes a second."""


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


def logit(cos: float, is_label: bool, scale: float, kind: str, margin: float) -> float:
    if is_label and kind == "cosface":
        cos -= margin
    if is_label and kind == "arcface":
        angle = math.acos(max(-1.0, min(1.0, cos)))
        if angle < math.pi - margin:
            cos = math.cos(angle + margin)
        else:
            cos -= margin * math.sin(margin)
    return scale * cos


def sampled_softmax_loss(
    h: Sequence[float],
    rows: Sequence[Sequence[float]],
    label: int,
    q: Sequence[float],
    scale: float,
    kind: str = "none",
    margin: float = 0.0,
    left_out: Sequence[int] = (),
) -> float:
    """``-o_y + log sum_i exp(o_i) / q_i`` for one image; ``q`` is 1 for own classes."""
    total = 0.0
    for i, row in enumerate(rows):
        if i not in left_out:
            total += math.exp(logit(cosine(h, row), i == label, scale, kind, margin)) / q[i]
    return -logit(cosine(h, rows[label]), True, scale, kind, margin) + math.log(total)


def all_negative_sets(
    own: Sequence[int], num_classes: int, num_negatives: int
) -> Iterator[tuple[int, ...]]:
    others = [i for i in range(num_classes) if i not in own]
    yield from itertools.combinations(others, num_negatives)


def weighted_means(
    updates: Sequence[ClientUpdate], num_classes: int, row_mean: str
) -> tuple[list[float], dict[int, list[float]]]:
    """``sum_k p_k delta_k`` for the backbone and for each class that anybody held."""
    total = sum(u.num_examples for u in updates)
    size = len(updates[0].backbone_delta_P)
    backbone = [
        sum(u.num_examples * float(u.backbone_delta_P[j]) for u in updates) / total
        for j in range(size)
    ]
    rows: dict[int, list[float]] = {}
    for i in range(num_classes):
        holders = [u for u in updates if i in u.ids_S.tolist()]
        if not holders:
            continue
        weight = total if row_mean == "cohort" else sum(u.num_examples for u in holders)
        dim = updates[0].rows_delta_SD.shape[1]
        rows[i] = [
            sum(
                u.num_examples * float(u.rows_delta_SD[u.ids_S.tolist().index(i), j])
                for u in holders
            )
            / weight
            for j in range(dim)
        ]
    return backbone, rows


def tiny_dataset(num_classes: int = 12, num_clients: int = 6, seed: int = 0) -> Dataset:
    """Noisy copies of one random 8 x 8 image per class; each client holds 2 to 4 classes."""
    rng = np.random.default_rng(seed)
    prototypes = rng.integers(0, 256, (num_classes + 4, 1, 8, 8))

    def draw(labels: np.ndarray) -> np.ndarray:
        noise = rng.normal(0, 20, (len(labels), 1, 8, 8))
        return np.clip(prototypes[labels] + noise, 0, 255).astype(np.uint8)

    labels, clients = [], []
    for client in range(num_clients):
        own = {*rng.choice(num_classes, 3, replace=False).tolist(), 2 * client, 2 * client + 1}
        for label in sorted(c % num_classes for c in own):
            copies = int(rng.integers(1, 4))
            labels += [label] * copies
            clients += [client] * copies
    train_labels = np.array(labels)
    train = Images(
        draw(train_labels),
        train_labels,
        np.array(clients),
        [f"class {i}" for i in range(num_classes)],
        [f"client {k}" for k in range(num_clients)],
        [f"{i}.png" for i in range(len(labels))],
    )
    test_labels = np.repeat(np.arange(4), 5)
    query = Images(
        draw(test_labels + num_classes),
        test_labels,
        np.zeros(20, np.int64),
        [f"unseen {i}" for i in range(4)],
        ["test"],
        [f"test{i}.png" for i in range(20)],
    )
    return Dataset("tiny", train, RetrievalTask(query))


def tiny_backbone() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Tanh())


def whole(rows: ClassRows) -> torch.Tensor:
    """W as last written, rows that were never written too."""
    return read(rows, torch.arange(rows.num_classes))[0]
