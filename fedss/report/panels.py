"""Retrieval panels: which queries to show, and their images as data URIs."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from fedss.evaluation.evaluate import Neighbours
from fedss.runs.reading import Group

MOST_THUMBNAILS = 260
SMALL_SIDE = 64  # up to here an image is enlarged pixel by pixel


@dataclass(frozen=True)
class Thumbnail:
    """One thumbnail; ``right`` and ``score`` are None for a query."""

    uri: str
    name: str
    right: bool | None = None
    score: float | None = None


@dataclass(frozen=True)
class MethodAnswer:
    """What one method found for a query."""

    label: str
    slot: str
    thumbnails: list[Thumbnail]

    @property
    def right(self) -> int:
        """How many of the images have the query's class."""
        return sum(bool(thumbnail.right) for thumbnail in self.thumbnails)


@dataclass(frozen=True)
class QueryPanel:
    """One query and the answers to it."""

    query: Thumbnail
    answers: list[MethodAnswer]


@dataclass(frozen=True)
class Chapter:
    """Panels chosen for one reason."""

    title: str
    panels: list[QueryPanel]


@dataclass(frozen=True)
class Retrieval:
    """All panels, and the share of right neighbours over every stored query per method."""

    chapters: list[Chapter]
    queries: int
    depth: int
    shares: list[tuple[str, str, float]]
    small: bool


@dataclass(frozen=True)
class Augmented:
    """Training images, each followed by what clients may make of it, as data URIs."""

    name: str
    rows: list[list[str]]
    small: bool


def augmented(groups: Sequence[Group]) -> list[Augmented]:
    """For each augmentation, the images of the first run with it that stored some."""
    found: dict[str, np.ndarray] = {}
    for run in (run for group in groups for run in group.runs):
        if run.augmented is not None:
            found.setdefault(str(run.settings.get("augment")), run.augmented)
    return [
        Augmented(
            name,
            [[data_uri(image) for image in row] for row in pixels],
            max(pixels.shape[-2:]) <= SMALL_SIDE,
        )
        for name, pixels in found.items()
    ]


def retrieval(groups: Sequence[Group], slots: Sequence[str]) -> Retrieval | None:
    """Choose queries and draw them; None if no run stored its neighbours.

    Each method is shown by its first run that stored them, on the queries that all of them share.
    """
    stored = [
        (group, slot, next((run.neighbours for run in group.runs if run.neighbours), None))
        for group, slot in zip(groups, slots, strict=True)
    ]
    shown = [(group, slot, found) for group, slot, found in stored if found is not None]
    shared = set.intersection(*(set(f.query_index.tolist()) for _, _, f in shown)) if shown else ()
    if not shared:
        return None
    queries = np.array(sorted(shared))
    rows = [np.array([f.query_index.tolist().index(q) for q in queries]) for _, _, f in shown]
    depth = min(found.right.shape[1] for _, _, found in shown)
    right_MQK = np.stack(
        [found.right[row, :depth] for (_, _, found), row in zip(shown, rows, strict=True)]
    )
    classes = shown[0][2].labels[rows[0], 0]
    per_query = 1 + depth * len(shown)
    chosen = _choose(right_MQK, classes, most=max(2, MOST_THUMBNAILS // per_query))
    chapters = []
    for title, positions in chosen:
        panels = []
        for position in positions:
            first, first_row = shown[0][2], rows[0][position]
            query = Thumbnail(
                data_uri(first.pixels[first_row, 0]), str(first.class_names[first_row, 0])
            )
            answers = [
                MethodAnswer(group.label, slot, _thumbnails(found, row[position], depth))
                for (group, slot, found), row in zip(shown, rows, strict=True)
            ]
            panels.append(QueryPanel(query, answers))
        chapters.append(Chapter(title, panels))
    shares = [
        (group.label, slot, float(right.mean()))
        for (group, slot, _), right in zip(shown, right_MQK, strict=True)
    ]
    small = max(shown[0][2].pixels.shape[-2:]) <= SMALL_SIDE
    return Retrieval(chapters, len(queries), depth, shares, small)


def _choose(right_MQK: np.ndarray, classes: np.ndarray, most: int) -> list[tuple[str, list[int]]]:
    """Pick positions of queries per chapter, of as many different classes as possible."""
    depth = right_MQK.shape[2]
    quality_MQ = (
        right_MQK.sum(axis=2) + depth * right_MQK[:, :, 0]
    )  # above depth: the first is right
    best, worst = quality_MQ.max(axis=0), quality_MQ.min(axis=0)
    if len(right_MQK) == 1:
        half = min(4, most // 2)
        plans = [
            ("Nearest neighbour right", half, best > depth, -best),
            ("Nearest neighbour wrong", half, best < depth, best),
        ]
    else:
        plans = [
            ("Where the methods differ", min(4, most), best > worst, worst - best),
            ("Nearest neighbour right for all methods", min(2, most), worst > depth, -worst),
            ("Nearest neighbour wrong for all methods", min(2, most), best < depth, best),
        ]
    taken: list[int] = []
    chosen = []
    for title, number, fits, cost in plans:
        picked: list[int] = []
        for _ in range(number):
            seen = np.isin(classes, classes[taken])
            order = np.lexsort((cost, seen))  # new classes first, then by cost, then by position
            left = [int(q) for q in order if fits[q] and q not in taken]
            picked += left[:1]
            taken += left[:1]
        if picked:
            chosen.append((title, picked))
    return chosen


def _thumbnails(found: Neighbours, row: int, depth: int) -> list[Thumbnail]:
    return [
        Thumbnail(
            data_uri(found.pixels[row, k]),
            str(found.class_names[row, k]),
            bool(found.labels[row, k] == found.labels[row, 0]),
            float(found.scores[row, k - 1]),
        )
        for k in range(1, depth + 1)
    ]


def data_uri(pixels_CHW: np.ndarray) -> str:
    """Small images as PNG, bit for bit; larger ones shrunk to a JPEG thumbnail."""
    grey = pixels_CHW.shape[0] == 1
    array = pixels_CHW[0] if grey else np.moveaxis(pixels_CHW, 0, -1)
    image = Image.fromarray(np.ascontiguousarray(array))
    out = io.BytesIO()
    if max(image.size) <= SMALL_SIDE:
        kind = "png"
        image.save(out, "PNG", optimize=True)
    else:
        kind = "jpeg"
        image.thumbnail((112, 112), Image.Resampling.LANCZOS)
        image.save(out, "JPEG", quality=80)
    return f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}"
