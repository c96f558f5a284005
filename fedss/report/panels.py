"""Retrieval panels: which queries to show, and their images as data URIs."""

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from fedss.evaluation.task import Neighbours
from fedss.runs.reading import Group

MOST_THUMBNAILS = 260
SMALL_SIDE = 64  # up to here an image is enlarged pixel by pixel


def augmented(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """For each augmentation, the images of the first run with it that stored some: each training
    image followed by what clients may make of it."""
    by_name: dict[str, np.ndarray] = {}
    for run in (run for group in groups for run in group.runs):
        if run.augmented is not None:
            by_name.setdefault(str(run.settings.get("augment")), run.augmented)
    return [
        {
            "name": name,
            "rows": [[data_uri(image) for image in row] for row in pixels],
            "small": is_small(pixels),
        }
        for name, pixels in by_name.items()
    ]


def retrieval(groups: Sequence[Group], slots: Sequence[str]) -> dict[str, Any] | None:
    """Choose queries and draw them; None if no run stored its neighbours.

    Each method is shown by its first run that stored them, on the queries that all of them share.
    """
    shown = [
        (group.label, slot, neighbours)
        for group, slot in zip(groups, slots, strict=True)
        if (neighbours := next((run.neighbours for run in group.runs if run.neighbours), None))
    ]
    shared = set.intersection(*(set(n.query_index.tolist()) for _, _, n in shown)) if shown else ()
    if not shared:
        return None
    queries = sorted(shared)
    rows = [np.array([n.query_index.tolist().index(q) for q in queries]) for _, _, n in shown]
    depth = min(neighbours.right.shape[1] for _, _, neighbours in shown)
    right_MQK = np.stack([n.right[row, :depth] for (_, _, n), row in zip(shown, rows, strict=True)])
    first = shown[0][2]
    chosen = _choose(
        right_MQK,
        classes=first.labels[rows[0], 0],
        most=max(2, MOST_THUMBNAILS // (1 + depth * len(shown))),
    )

    def panel(position: int) -> dict[str, Any]:
        answers = [
            {
                "label": label,
                "slot": slot,
                "thumbnails": _thumbnails(neighbours, row[position], depth),
                "right": int(right_QK[position].sum()),
            }
            for (label, slot, neighbours), row, right_QK in zip(shown, rows, right_MQK, strict=True)
        ]
        return {"query": _thumbnails(first, rows[0][position], 0)[0], "answers": answers}

    return {
        "chapters": [(title, [*map(panel, positions)]) for title, positions in chosen],
        "queries": len(queries),
        "depth": depth,
        "shares": [
            (label, slot, float(right_QK.mean()))
            for (label, slot, _), right_QK in zip(shown, right_MQK, strict=True)
        ],
        "small": is_small(first.pixels),
    }


def _choose(right_MQK: np.ndarray, classes: np.ndarray, most: int) -> list[tuple[str, list[int]]]:
    """Pick positions of queries per chapter, of as many different classes as possible."""
    depth = right_MQK.shape[2]
    # Above depth: the first is right.
    quality_MQ = right_MQK.sum(axis=2) + depth * right_MQK[:, :, 0]
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
        # They stand in pairs; one alone has the whole width.
        picked = picked[: max(1, len(picked) // 2 * 2)]
        if picked:
            chosen.append((title, picked))
    return chosen


def _thumbnails(neighbours: Neighbours, row: int, depth: int) -> list[dict[str, Any]]:
    """A query's ``depth`` nearest images; of depth 0 itself."""
    labels, scores = neighbours.labels[row], neighbours.scores[row]
    return [
        {
            "uri": data_uri(neighbours.pixels[row, k]),
            "name": str(neighbours.class_names[row, k]),
            "right": bool(labels[k] == labels[0]),
            "score": float(scores[k - 1]),
        }
        for k in (range(1, depth + 1) if depth else (0,))
    ]


def is_small(pixels: np.ndarray) -> bool:
    """Whether images [..., H, W] are to be enlarged pixel by pixel."""
    return bool(max(pixels.shape[-2:]) <= SMALL_SIDE)


def data_uri(pixels_CHW: np.ndarray) -> str:
    """Small images as PNG, bit for bit; larger ones shrunk to a JPEG thumbnail."""
    gray = pixels_CHW.shape[0] == 1
    array = pixels_CHW[0] if gray else np.moveaxis(pixels_CHW, 0, -1)
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
