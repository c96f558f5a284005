"""CIFAR-100 (Krizhevsky 2009): 60,000 images of 32 x 32 pixels in 100 classes.

Source: the data set's own page (www.cs.toronto.edu/~kriz/cifar.html). The binary version is read:
the Python version is made of pickles, and to read a pickle is to run what it says.
"""

import io
from pathlib import Path

import numpy as np

from fedss.data.assembly import DataOptions, arrange_by, assemble_dataset
from fedss.data.cache import cached_array, stamp_files
from fedss.data.decoding import decode
from fedss.data.images import Dataset
from fedss.data.manifest import NOBODY, ListedImage
from fedss.data.sets.published import Counts, find, published_listing, read_lines
from fedss.errors import DataError

_SIDE, _CHANNELS = 32, 3
_PIXELS = _CHANNELS * _SIDE * _SIDE
_RECORD = 2 + _PIXELS  # <1 x coarse label><1 x fine label><3072 x pixel>
_FILES = {"train": "train.bin", "test": "test.bin", "names": "fine_label_names.txt"}


def cifar100_dataset(root: Path, options: DataOptions) -> Dataset:
    """CIFAR-100, with some classes held out of training as the test.

    ``train.bin`` (500 images a class) and ``test.bin`` (100) are taken together: both have all
    100 classes, and what is tested is retrieval of classes that training never saw. There are no
    users: ``fedss.data.DATASETS`` says who holds what.

    Args:
        root: The folder with ``train.bin``, ``test.bin`` and ``fine_label_names.txt``, or the one
            that holds ``cifar-100-binary/``.
        options: ``channels=None`` is 3.
    """
    wanted = {key: (name, f"cifar-100-binary/{name}") for key, name in _FILES.items()}
    try:
        paths = find("CIFAR-100's binary version", root, wanted)
    except DataError as error:
        if (root / "cifar-100-python").is_dir() or (root / "meta").is_file():
            raise DataError(
                f"{error}. This is the Python version, made of pickles, which run code when they "
                "are read; get the binary version (cifar-100-binary.tar.gz) from the same page"
            ) from error
        raise
    lines = read_lines(paths["names"], "a class's name", r"([\w -]+)")
    class_names = [name for _, (name,) in lines]
    files = {part: paths[part] for part in ("train", "test")}
    records = {part: _records(path, len(class_names)) for part, path in files.items()}
    rows = [
        ListedImage(NOBODY, class_names[label], f"{part}.bin/{position:05}", None, 0)
        for part, of_part in records.items()
        for position, label in enumerate(of_part[:, 1].tolist())
    ]
    counts = {"": Counts(60_000, 100)}
    listing = published_listing(paths, root, rows, counts)
    splits, unpaired = arrange_by(options, listing)
    stamp = stamp_files([str(path) for path in files.values()])
    side, channels = options.image_size, options.channels or _CHANNELS
    pixels = {
        split: cached_array(
            ("cifar100", stamp, *(row.name for row in members)),
            (len(members), channels, side, side),
            (_decode(records, row.name, side, channels)[None] for row in members),
            cache=options.cache,
            title=f"cifar100: {split}",
        )
        for split, members in splits.items()
    }
    return assemble_dataset(options.name, listing, splits, pixels, unpaired)


def _records(path: Path, num_classes: int) -> np.ndarray:
    """The file's records as uint8 [N, 3074], read from disk as they are used."""
    size = path.stat().st_size
    if size == 0 or size % _RECORD:
        raise DataError(
            f"{path}: expected records of {_RECORD:,} bytes (two labels, 3 x 32 x 32 pixels), got "
            f"{size:,} bytes, which is no multiple of that; download and unpack the archive again"
        )
    records = np.memmap(path, np.uint8, "r").reshape(-1, _RECORD)
    wrong = np.flatnonzero(records[:, 1] >= num_classes)
    if len(wrong):
        raise DataError(
            f"{path}, record {int(wrong[0]) + 1}: expected a fine label from 0 to "
            f"{num_classes - 1}, as fine_label_names.txt has {num_classes} names, got "
            f"{int(records[wrong[0], 1])}; is it another data set's file?"
        )
    return records


def _decode(records: dict[str, np.ndarray], name: str, side: int, channels: int) -> np.ndarray:
    file, _, position = name.rpartition("/")
    pixels = records[file.removesuffix(".bin")][int(position), 2:]
    # As a file of portable pixels, so that it is resized as any other image is.
    interleaved = pixels.reshape(_CHANNELS, _SIDE, _SIDE).transpose(1, 2, 0).tobytes()
    return decode(io.BytesIO(b"P6 32 32 255\n" + interleaved), side, channels)
