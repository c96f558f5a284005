"""Listed images, decoded, as a ``Dataset``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from fedss.data.cache import BrokenImagesError, all_colourless, decode_files, in_threads
from fedss.data.decoding import decode
from fedss.data.images import Dataset, Images, LazyNames, RetrievalTask
from fedss.data.manifest import ListedImage, Listing
from fedss.data.missing import why_missing
from fedss.data.names import look_alikes
from fedss.data.splits import arrange
from fedss.errors import DataError
from fedss.text import counted


@dataclass(frozen=True)
class DataOptions:
    """What is asked of a data set.

    Attributes:
        name: The data set's.
        image_size: Side of the images after cutting to the central square and resizing.
        channels: 1 or 3; None is 1 for glyphs and Omniglot, 3 for CIFAR-100, else 1 if every image
            is stored in grayscale and 3 otherwise.
        test_classes: Share of the classes to hold out as the test; that of a few classes is up to
            chance. 0: none, and no test. Of no effect where the data name test images: a CSV that
            does, Omniglot, and the published sets with a test of their own (docs/datasets.md).
        validation_classes: Share of the classes then left to hold out as the validation task, where
            the data name no validation images (glyphs and Omniglot have some of their own). 0:
            none. A configuration with ``eval_split`` validation holds out ``VALIDATION_CLASSES``.
        skip_broken: Leave out image files that are missing or cannot be read; ``Dataset.skipped``
            names them. The rest is as if they had never been listed.
        cache: Folder for decoded images; see ``cache_folder``.
        seed: The data's seed (which glyphs, which classes are held out, who holds what in a
            partition), not the training's.
        at_site: The images are a site's part of a federation. With the same ``seed`` and
            ``test_classes`` a class is trained on at all sites or at none, and a site may have no
            test. A column ``split`` is obeyed, and test images that have no other one of their
            class here are left out as ``Dataset.unpaired``.
        glyphs_classes: Training and test classes together; see ``glyphs_dataset``.
        glyphs_clients: Training clients.
        partition: ``classes:K``, ``dirichlet:ALPHA`` or ``class``: deals the training images to
            clients of its own, instead of those that the data have; see ``deal_images``. None:
            the data's clients; where they have none, ``Source.partition``.
        partition_clients: How many, for ``classes`` (where it may be left out) and ``dirichlet``.
        columns: ``image=path,label=species``: what columns of a CSV are called in it.

    Raises:
        DataError: An image size or a number of channels that no image can have.
    """

    name: str
    image_size: int = 64
    channels: int | None = None
    test_classes: float = 0.2
    validation_classes: float = 0.0
    skip_broken: bool = False
    cache: Path | None = None
    seed: int = 0
    at_site: bool = False
    glyphs_classes: int = 1280
    glyphs_clients: int = 256
    partition: str | None = None
    partition_clients: int | None = None
    columns: str | None = None

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise DataError(f"image_size: expected at least 1, got {self.image_size}")
        if self.channels not in (None, 1, 3):
            raise DataError(f"channels: expected 1 (grayscale) or 3 (colour), got {self.channels}")


def build_dataset(listing: Listing, options: DataOptions) -> Dataset:
    """Decode listed images into a ``Dataset``; without a test it holds classes out (``arrange``).

    Returns:
        Dataset of uint8 [N, C, image_size, image_size]; the same whatever the order of the rows.

    Raises:
        DataError: Anything amiss with the images or an option; says where and what to do.
    """
    rows, file = sorted(listing.rows), listing.file
    kept = [row for row in rows if listing.is_there(row)]
    if len(kept) < len(rows) and not options.skip_broken:
        present = set(kept)
        missing = [row for row in rows if row not in present]
        first, path = missing[0], file(missing[0])
        advice = "Paths are relative to the CSV; correct them" if first.line else "Correct them"
        if listing.published:
            advice = "Unpack the rest of the archives there"
        raise DataError(
            f"{listing.where(first)}: no such image file: {path} ({len(missing)} of "
            f"{len(rows)} are missing{why_missing(path)}). {advice}, or leave missing images "
            "out with skip_broken (--skip-broken)"
        )
    while True:
        if not kept:
            raise DataError(
                f"none of the {len(rows)} images can be read, the first one is {file(rows[0])}"
            )
        splits, unpaired = arrange_by(options, replace(listing, rows=kept))
        pixels, reasons = _decode(listing, kept, splits, options)
        if not reasons:
            break
        if not options.skip_broken:
            raise BrokenImagesError(reasons, len(kept))
        # A class may have become too small to test, so begin again as if these had not been.
        kept = [row for row in kept if file(row) not in reasons]
    readable = {row.name for row in kept}
    skipped = tuple(row.name for row in rows if row.name not in readable)
    data = assemble_dataset(options.name, listing, splits, pixels, unpaired, skipped)
    # Rows by the million are not kept for it.
    again = partial(_decode_again, replace(listing, rows=()), data.train.pixels.shape[1])
    return replace(data, decode_again=again)


def arrange_by(
    options: DataOptions, listing: Listing
) -> tuple[dict[str, list[ListedImage]], list[ListedImage]]:
    """The rows of each split, and those left out as unpaired (``arrange``)."""
    return arrange(
        listing,
        options.test_classes,
        options.seed,
        at_site=options.at_site,
        validation_classes=options.validation_classes,
    )


def _decode(
    listing: Listing,
    rows: Sequence[ListedImage],
    splits: Mapping[str, Sequence[ListedImage]],
    options: DataOptions,
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Pixels by split, and why files cannot be read, by file."""

    def paths(of: Sequence[ListedImage]) -> LazyNames:
        return LazyNames(len(of), lambda i: listing.file(of[i]))

    files = {split: paths(members) for split, members in splits.items()}
    stamps = {split: listing.stamp(of_split) for split, of_split in files.items()}
    channels = options.channels
    if channels is None:
        stamp = "".join(stamps.values())
        gray = all_colourless(paths(rows), stamp, cache=options.cache, opened=listing.open)
        channels = 1 if gray else 3
    pixels: dict[str, np.ndarray] = {}
    reasons: dict[str, str] = {}
    for split in splits:
        try:
            pixels[split] = decode_files(
                files[split],
                stamps[split],
                options.image_size,
                channels,
                cache=options.cache,
                title=f"{options.name}: {split}",
                expect_broken=options.skip_broken,
                opened=listing.open,
            )
        except BrokenImagesError as error:
            reasons |= error.reasons
    return pixels, reasons


def _decode_again(
    listing: Listing, channels: int, names: Sequence[str], image_size: int
) -> np.ndarray:
    """``Dataset.decode_again``.

    Raises:
        DataError: A file that cannot be read any more.
    """

    def block(positions: range) -> np.ndarray:
        pixels = np.empty((len(positions), channels, image_size, image_size), np.uint8)
        for row, position in enumerate(positions):
            file = listing.path(names[position])
            try:
                pixels[row] = decode(listing.open(file), image_size, channels)
            except Exception as error:
                raise DataError(f"{file}: {str(error) or type(error).__name__}") from error
        return pixels

    return np.concatenate([*in_threads(block, len(names))])


def assemble_dataset(
    name: str,
    listing: Listing,
    splits: Mapping[str, Sequence[ListedImage]],
    pixels: Mapping[str, np.ndarray],
    unpaired: Sequence[ListedImage],
    skipped: tuple[str, ...] = (),
) -> Dataset:
    """The ``Dataset`` of a listing's images as ``arrange`` splits them, with their ``pixels``."""
    images: dict[str, Images] = {}
    for split, members in splits.items():
        # Queries and gallery are compared, so they number classes and clients alike.
        pair = ("query", "gallery") if split in ("query", "gallery") else (split,)
        numbered = [row for part in pair for row in splits[part]]
        images[split] = images_of(pixels[split], members, numbered)
    query = images.get("test", images.get("query"))
    train = images.get("train")
    if train is None:
        # A list to judge a trained model on.
        shape = next(iter(images.values())).pixels.shape[1:]
        train = images_of(np.empty((0, *shape), np.uint8), [], [])
    made = "validation" in images and all(row.split != "validation" for row in listing.rows)
    validation = [held_out_remark(images["validation"], train)] if made else []
    classes = look_alikes({row.label for row in listing.rows}, "classes")
    clients = look_alikes({row.client for row in listing.rows}, "clients")
    return Dataset(
        name,
        train,
        test=None if query is None else RetrievalTask(query, images.get("gallery")),
        validation=RetrievalTask(images["validation"]) if "validation" in images else None,
        skipped=skipped,
        unpaired=tuple(row.name for row in unpaired),
        remarks=(*listing.remarks, *validation, *classes, *clients),
        passed_over=listing.passed_over,
    )


def held_out_remark(validation: Images, train: Images) -> str:
    """That training classes are held out as the validation task."""
    held = len(validation.class_names)
    return (
        f"validation: no images are named for it, so {held:,} of "
        f"{counted(held + len(train.class_names), 'training class')} are held out "
        f"({counted(len(validation), 'image')})"
    )


def images_of(
    pixels: np.ndarray, rows: Sequence[ListedImage], numbered: Sequence[ListedImage]
) -> Images:
    """``pixels`` of ``rows``, and the classes and clients of ``numbered`` sorted by name."""
    class_names = sorted({row.label for row in numbered})
    client_names = sorted({row.client for row in numbered})
    label_of = {name: i for i, name in enumerate(class_names)}
    client_of = {name: i for i, name in enumerate(client_names)}
    return Images(
        pixels,
        np.fromiter((label_of[row.label] for row in rows), np.int64, len(rows)),
        np.fromiter((client_of[row.client] for row in rows), np.int64, len(rows)),
        class_names,
        client_names,
        [row.name for row in rows],
    )
