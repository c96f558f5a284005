"""A small trained run, images of 30 classes with names in many scripts, and an index of them."""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

import fedss
from fedss.search import Collection, build_collection

NAMES = [
    "猫",
    "кошка",
    "قطة",
    "Ünïcode É",
    "<b onmouseover=alert(1)>bold</b>",
    "a/b\\c",
    "..",
    "../../etc/passwd",
    'O\'Hara & "Söhne" 100 %',
    "q?x=1#y",
    "🐈 cat",
    *(f"mug {number}" for number in range(1, 20)),
]
COPIES = 4


@dataclass(frozen=True)
class Site:
    """A run with its index, and images that are not in it."""

    run: Path
    photos: Path
    new: Path
    collection: Collection


def make_site(folder: Path) -> Site:
    """Four images of each class are indexed; ``new`` has 5 of a class that is not."""
    config = fedss.Config(
        data="glyphs",
        image_size=28,
        backbone="conv4-8",
        embedding_size=16,
        rounds=2,
        clients_per_round=2,
        workers=1,
        glyphs_classes=64,
        glyphs_clients=8,
        sample_size=8,
        eval_every=0,
    )
    data = fedss.load_data(config)
    run = fedss.train(config, folder / "run", data=data).folder
    firsts = np.unique(data.train.labels, return_index=True)[1]
    glyphs = [data.train.pixels[first, 0] for first in firsts[: len(NAMES) + 1]]
    photos, new = folder / "photos", folder / "new"
    photos.mkdir()
    new.mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for number, (name, glyph) in enumerate(zip(NAMES, glyphs[:-1], strict=True)):
        for copy in range(COPIES):
            file = f"{number:02}-{copy}.png"
            write_image(photos / file, glyph, rng)
            rows.append((file, name))
    with (photos / "photos.csv").open("w", newline="", encoding="utf-8") as listing:
        csv.writer(listing).writerows([("image", "label"), *rows])
    for copy in range(5):
        write_image(new / f"new-{copy}.png", glyphs[-1], rng)
    return Site(run, photos, new, build_collection(run, photos / "photos.csv"))


def write_image(path: Path, glyph_HW: np.ndarray, rng: np.random.Generator) -> None:
    """A glyph three times as large, moved by up to a pixel and with noise."""
    moved = np.roll(np.kron(glyph_HW, np.ones((3, 3))), rng.integers(-1, 2, 2), (0, 1))
    noisy = np.clip(moved + rng.normal(0, 4, moved.shape), 0, 255)
    Image.fromarray(noisy.astype(np.uint8)).save(path)
