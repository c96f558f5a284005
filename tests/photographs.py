"""Images of made-up things, as a camera might take them: for backbones that know photographs.

A class is a thing: a few solids put together, with a pattern carved through them in colours of its
own. Things share solids, patterns and colours, so that neither tells the class alone. An image is
that thing seen from somewhere, at some distance, under a light of some direction and colour, before
a background that has nothing to do with it, with blur and noise.

Shape suffixes: N images, Q pixels of one.
"""

from pathlib import Path

import numpy as np
import torch

from examples.made_up_photographs import Thing, colour_of, hit, make_thing, rotation
from fedss import Config
from fedss.data import Dataset, Images, RetrievalTask
from fedss.evaluation.task import embed_task, score
from fedss.models import Embedder
from tests.pretrained import LITE0


def make_photographs(
    classes: int = 40, test_classes: int = 16, per_class: int = 16, side: int = 64, seed: int = 0
) -> Dataset:
    """Training images of the first classes, at eight clients, and test images of the last.

    Two clients have images of each training class, half of them each: 6 classes a client.
    """
    rng = np.random.default_rng(seed)
    things = [make_thing(rng) for _ in range(classes)]
    pixels = np.stack([_photograph(thing, side, rng) for thing in things for _ in range(per_class)])
    labels = np.repeat(np.arange(classes), per_class)
    known = classes - test_classes
    second_half = np.arange(len(labels)) % per_class >= per_class // 2
    clients = (labels * 5 + second_half) % 8
    names = [f"{i}.png" for i in range(len(labels))]

    def part(chosen: np.ndarray, first: int, last: int, owners: list[str]) -> Images:
        return Images(
            pixels[chosen],
            labels[chosen] - first,
            clients[chosen] if len(owners) > 1 else np.zeros(chosen.sum(), np.int64),
            [f"thing {i}" for i in range(first, last)],
            owners,
            [name for name, wanted in zip(names, chosen.tolist(), strict=True) if wanted],
        )

    train = part(labels < known, 0, known, [f"client {k}" for k in range(8)])
    test = part(labels >= known, known, classes, ["test"])
    return Dataset("photographs", train, RetrievalTask(test))


def of_pixels(photos: Dataset) -> float:
    """MAP@10 of the pixels themselves, by the cosine of what they differ from middle gray by."""
    assert photos.test is not None

    def gray(pixels: np.ndarray) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.from_numpy(pixels / 255.0 - 0.5).flatten(1))

    return score(photos.test, *embed_task(gray, photos.test)).map_at_10


def of_features(embedder: Embedder, photos: Dataset) -> float:
    """MAP@10 of what the backbone gives, without projection."""
    assert photos.test is not None

    @torch.no_grad()
    def features(pixels: np.ndarray) -> torch.Tensor:
        scaled = torch.from_numpy(pixels) / 255 - embedder.mean[:, None, None]
        found = embedder.eval().backbone(scaled / embedder.std[:, None, None])
        return torch.nn.functional.normalize(found)

    return score(photos.test, *embed_task(features, photos.test)).map_at_10


def fine_tuning(weights: Path) -> Config:
    """How the trained backbone learns more, with these images."""
    return Config(
        backbone=f"timm:{LITE0}",
        weights=str(weights),
        trainable="last-2",
        augment="photos",
        embedding_size=256,
        sample_size=12,
        rounds=10,
        clients_per_round=4,
        client_lr=0.02,
        class_row_lr=1.0,
        server_momentum=0.5,
        eval_every=0,
        workers=1,
    )


def _photograph(thing: Thing, side: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 [3, side, side]."""
    where = (np.arange(side) + 0.5) / side * 2 - 1
    y_Q, x_Q = (grid.ravel() for grid in np.meshgrid(where, where, indexing="ij"))
    turn = rotation(rng.uniform([-70, -25, -20], [70, 25, 20]))
    zoom, shift = rng.uniform(0.75, 1.15), rng.uniform(-0.2, 0.2, 2)
    from_Q3 = np.stack([(x_Q - shift[0]) / zoom, (y_Q - shift[1]) / zoom, 0 * x_Q - 4], 1) @ turn
    along_3 = np.array([0.0, 0.0, 1.0]) @ turn
    depth_Q, normal_Q3 = np.full(side**2, np.inf), np.zeros((side**2, 3))
    for kind, centre, size in thing.solids:
        t_Q, n_Q3 = hit(kind, (from_Q3 - centre) / size, along_3 / size)
        nearer_Q = t_Q < depth_Q
        depth_Q[nearer_Q], normal_Q3[nearer_Q] = t_Q[nearer_Q], (n_Q3 / size)[nearer_Q]
    seen_Q = np.isfinite(depth_Q)
    image_Q3 = _background(x_Q, y_Q, rng)
    point_S3 = from_Q3[seen_Q] + depth_Q[seen_Q, None] * along_3
    normal_S3 = normal_Q3[seen_Q] / np.linalg.norm(normal_Q3[seen_Q], axis=1, keepdims=True)
    light = rng.normal(size=3) * [1, 1, 0.4] - [0, 0.5, 1.2]
    light_3 = (light / np.linalg.norm(light)) @ turn
    facing_S = np.clip(normal_S3 @ light_3, 0, 1)
    halfway = light_3 - along_3
    gloss_S = np.clip(normal_S3 @ (halfway / np.linalg.norm(halfway)), 0, 1) ** 30
    tint = rng.uniform(0.8, 1.1, 3) * rng.uniform(0.7, 1.1)
    lit_S3 = colour_of(thing, point_S3) * (0.3 + 0.8 * facing_S[:, None]) * tint
    image_Q3[seen_Q] = lit_S3 + 0.35 * gloss_S[:, None]
    image = image_Q3.reshape(side, side, 3)
    if rng.random() < 0.5:
        image = (image + np.roll(image, 1, 0) + np.roll(image, 1, 1)) / 3
    noisy = image + rng.normal(0, rng.uniform(0.005, 0.04), image.shape)
    return (np.clip(noisy, 0, 1) * 255).astype(np.uint8).transpose(2, 0, 1)


def _background(x_Q: np.ndarray, y_Q: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Blurred surroundings in colours at random, sometimes with an edge, [Q, 3]."""
    one, other = rng.uniform(0.1, 0.9, (2, 3))
    waves_Q = sum(
        np.sin(x_Q * kx + y_Q * ky + phase) / len(phases)
        for phases in [rng.uniform(0, 6, 4)]
        for (kx, ky), phase in zip(rng.normal(0, 4, (4, 2)), phases, strict=True)
    )
    mix_Q = 0.5 + 0.5 * waves_Q
    if rng.random() < 0.5:
        mix_Q = np.where(y_Q + 0.2 * x_Q > rng.uniform(-0.5, 0.7), mix_Q * 0.3, 0.7 + 0.3 * mix_Q)
    return mix_Q[:, None] * one + (1 - mix_Q[:, None]) * other
