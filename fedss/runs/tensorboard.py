"""What TensorBoard shows of a run: scalars, images with their neighbours, the projector."""

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageDraw

from fedss.data import RetrievalTask
from fedss.evaluation.task import Embedded, find_neighbours
from fedss.runs.records import Record, scalars
from fedss.seeds import generator
from fedss.text import encodable

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_QUERIES, _SIDE, _FRAME, _GAP = 6, 56, 3, 4  # of the image of neighbours; the last three: pixels
_RIGHT, _WRONG = (10, 122, 85), (179, 38, 30)  # the colours of the report
# TensorBoard colours the points of up to 50 names. Whole classes, since of a class with a single
# point nobody sees whether it stands together.
_CLASSES, _OF_A_CLASS = 50, 10
_THUMBNAIL = 48  # 23 x 23 of them are far below the 8192 pixels that a sprite's side may have


@contextmanager
def open_writer(folder: Path, round: int) -> "Iterator[SummaryWriter]":
    """Open a run folder's TensorBoard events; what is there of ``round`` and later is hidden."""
    # Here, since importing it takes a second that most commands need not spend.
    from torch.utils.tensorboard import SummaryWriter

    place = str(folder / "tensorboard")
    before = threading.excepthook

    def quiet(failed: threading.ExceptHookArgs) -> None:
        # The next write raises it here again: on a full disk no traceback need be printed too.
        if not type(failed.thread).__module__.startswith("tensorboard"):
            before(failed)

    threading.excepthook = quiet
    try:
        with SummaryWriter(place, purge_step=round, flush_secs=10) as writer:
            yield writer
    finally:
        threading.excepthook = before


def add_scalars(writer: "SummaryWriter", record: Record, failures: bool) -> None:
    """A round's record as scalars; those of failures only where there were any so far."""
    for name, value in scalars(record, failures).items():
        writer.add_scalar(name, value, record["round"])


def add_metrics(writer: "SummaryWriter", record: Record) -> None:
    """The retrieval figures of a round's record, if it has any."""
    for name, value in (record["metrics"] or {}).items():
        writer.add_scalar(f"test/{name}", value, record["round"])


def add_neighbours(
    writer: "SummaryWriter", task: RetrievalTask, embedded: Embedded, seed: int, round: int
) -> None:
    """An image of some queries and what is nearest to them, the same queries in every round."""
    shown = find_neighbours(task, embedded, seed, _QUERIES)
    image = draw_neighbours(shown.pixels, shown.labels)
    writer.add_image("test/neighbours", image, round, dataformats="HWC")


def draw_neighbours(pixels_QKCHW: np.ndarray, labels_QK: np.ndarray) -> np.ndarray:
    """A row per query: itself, then its neighbours in frames, whole if right, broken if wrong.

    From uint8 [Q, 1 + K, 1 or 3, H, W] and labels [Q, 1 + K], the query's first, to uint8
    [height, width, 3].
    """
    pitch = _SIDE + 2 * _FRAME + _GAP
    rows, columns = labels_QK.shape
    # A gap of its own behind the queries.
    sheet = Image.new("RGB", (columns * pitch + 2 * _GAP, rows * pitch + _GAP), "white")
    for row in range(rows):
        for column in range(columns):
            x = _GAP + column * pitch + (_GAP if column else 0)
            y = _GAP + row * pitch
            if column:
                right = labels_QK[row, column] == labels_QK[row, 0]
                _frame(ImageDraw.Draw(sheet), x, y, right)
            sheet.paste(_thumbnail(pixels_QKCHW[row, column], _SIDE), (x + _FRAME, y + _FRAME))
    return np.asarray(sheet)


def _frame(draw: ImageDraw.ImageDraw, x: int, y: int, right: bool) -> None:
    end = _SIDE + 2 * _FRAME - 1
    draw.rectangle((x, y, x + end, y + end), fill=_RIGHT if right else _WRONG)
    if not right:  # so that who sees no colours sees it too
        for start in range(8, end, 16):
            draw.rectangle((x + start, y, x + start + 7, y + end), fill="white")
            draw.rectangle((x, y + start, x + end, y + start + 7), fill="white")


def _thumbnail(pixels_CHW: np.ndarray, side: int) -> Image.Image:
    """In colour; large images shrunk, small ones enlarged pixel by pixel."""
    array = pixels_CHW[0] if len(pixels_CHW) == 1 else np.moveaxis(pixels_CHW, 0, -1)
    image = Image.fromarray(np.ascontiguousarray(array)).convert("RGB")
    small = max(image.size) <= side
    way = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
    return image.resize((side, side), way)


def add_projection(
    writer: "SummaryWriter", task: RetrievalTask, embedded: Embedded, seed: int, round: int
) -> None:
    """Embeddings of some test classes, with names and thumbnails, for TensorBoard's projector."""
    images = task.gallery or task.query
    query_QD, gallery_GD = embedded
    embeddings_ND = query_QD if gallery_GD is None else gallery_GD
    chosen = choose_points(images.labels, seed)
    logs = Path(writer.log_dir)
    # A run that was stopped right after writing it writes it again.
    shutil.rmtree(logs / f"{round:05d}", ignore_errors=True)
    # TensorBoard's tables are UTF-8, one name a line; names of folders may be any bytes.
    plain = [encodable(images.class_names[i], "utf-8") for i in images.labels[chosen]]
    names = [" ".join(name.split()) or "–" for name in plain]
    side = min(_THUMBNAIL, images.pixels.shape[-1])
    tiles = [np.asarray(_thumbnail(pixels, side)) for pixels in images.pixels[chosen]]
    tiles_NCHW = torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2) / 255
    # Written as text: digits that nobody sees would be half of it.
    shown = embeddings_ND[chosen].cpu().double().round(decimals=6)
    writer.add_embedding(shown, names, tiles_NCHW, round, "test")
    # It must not look like an image to who takes all that are below a folder with this run in it.
    sprite, config = logs / f"{round:05d}/test/sprite.png", logs / "projector_config.pbtxt"
    sprite.rename(sprite.with_suffix(""))
    config.write_text(config.read_text().replace("sprite.png", "sprite"))


def choose_points(labels_N: np.ndarray, seed: int) -> np.ndarray:
    """Positions of at most 500 images: up to 50 classes drawn by the seed, of each up to 10.

    Classes of several images are taken first.
    """
    rng = generator(seed, "projection")
    order = rng.permutation(len(labels_N))
    classes, counts = np.unique(labels_N, return_counts=True)
    shuffled = rng.permutation(len(classes))
    several_first = shuffled[np.argsort(counts[shuffled] < 2, kind="stable")]
    taken = [order[labels_N[order] == classes[c]][:_OF_A_CLASS] for c in several_first[:_CLASSES]]
    return np.sort(np.concatenate(taken))
