"""Which listed images train and which test; where a list does not say, which classes do."""

import hashlib
from collections import Counter
from collections.abc import Mapping
from typing import Literal

from fedss.data.images import unanswerable
from fedss.data.manifest import SPLITS, ListedImage, Listing
from fedss.errors import DataError
from fedss.text import counted

VALIDATION_CLASSES = 0.2
"""Share of the training classes to hold out where a validation task is asked for and none given."""


def arrange(
    listing: Listing,
    test_classes: float,
    seed: int,
    *,
    at_site: bool,
    validation_classes: float = 0.0,
) -> tuple[dict[str, list[ListedImage]], list[ListedImage]]:
    """The rows of each split, in order, and the rows left out as unpaired.

    The splits are ``train``, ``test`` or ``query`` and ``gallery``, and ``validation``; those
    without a row are not there. Where no row is for testing, the classes whose ``lot`` is below
    ``test_classes`` are held out of training; the others are never tested. A held-out class of a
    single image cannot be tested: the image is left out. Where no row is for validation, a share
    ``validation_classes`` of the classes that are then left is held out of training for that.

    On one machine a test of unseen classes is a must (unless ``test_classes`` is 0): the class of
    the lowest lot among those of two or more images is always held out; and if all classes were,
    the one of the highest lot among the others is trained on. At a site nothing is forced, so that
    a class is on the same side everywhere: lots alone decide, or the column ``split`` alone.

    At a site, and of a published list, images for testing that no image here could match are left
    out, and so is a gallery without queries.

    Raises:
        DataError: Splits that do not go together, nothing to train on, no class that could be held
            out; elsewhere than at a site, a row for testing that no image could match.
    """
    splits: dict[str, list[ListedImage]] = {split: [] for split in SPLITS}
    for row in sorted(listing.rows):
        splits[row.split or "train"].append(row)
    to_test = splits["test"] or splits["query"] or splits["validation"]
    if not splits["train"] and (at_site or not to_test):
        raise DataError(
            f"no training images: {len(listing.rows)} rows, none with split 'train'; give some "
            "that split"
        )
    pair = [split for split in ("query", "gallery") if splits[split]]
    if pair and splits["test"]:
        raise DataError(
            f"both 'test' and {pair[0]!r} rows: use 'test' alone (each image is searched among "
            "the others) or 'query' with 'gallery'"
        )
    if len(pair) == 1 and not at_site:
        other = "gallery" if pair == ["query"] else "query"
        raise DataError(
            f"{pair[0]!r} rows but no {other!r} rows: give both, or use 'test' for images that "
            "are each searched among the others"
        )
    # Another site may hold the test that this one's column does not name.
    named = listing.rows[0].split is not None if at_site else bool(pair or splits["test"])
    if not named:
        count = Counter(row.label for row in splits["train"])
        held_out = hold_out_classes(count, test_classes, seed, at_site=at_site)
        splits["test"] = [row for row in splits["train"] if row.label in held_out]
        splits["train"] = [row for row in splits["train"] if row.label not in held_out]
    chosen = bool(splits["validation"])
    if validation_classes and splits["train"] and not chosen:
        count = Counter(row.label for row in splits["train"])
        held_out = hold_out_classes(
            count, validation_classes, seed, at_site=at_site, split="validation"
        )
        splits["validation"] = [row for row in splits["train"] if row.label in held_out]
        splits["train"] = [row for row in splits["train"] if row.label not in held_out]

    # RetrievalTask checks this too, but only once all images are decoded, and knows no lines.
    unpaired: list[ListedImage] = []
    gallery = [row.label for row in splits["gallery"]]
    for split, others in (("test", None), ("validation", None), ("query", gallery)):
        members = splits[split]
        reasons = dict(unanswerable([row.label for row in members], others))
        listed = chosen if split == "validation" else named
        if reasons and listed and not (at_site or listing.published):
            position, reason = next(iter(reasons.items()))
            raise DataError(f"{listing.where(members[position])}, split {split!r}: {reason}")
        unpaired += [members[position] for position in reasons]
        splits[split] = [row for i, row in enumerate(members) if i not in reasons]
    if not splits["query"]:
        unpaired += splits.pop("gallery")
    return {split: members for split, members in splits.items() if members}, unpaired


def lot(seed: int | str, label: str) -> float:
    """A class's number from 0 to 1: SHA-256 of ``seed:label`` in UTF-8, divided by 2^256."""
    # Names of folders may hold bytes that are no UTF-8.
    digest = hashlib.sha256(f"{seed}:{label}".encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest) / 2**256


def hold_out_classes(
    count: Mapping[str, int],
    test_classes: float,
    seed: int = 0,
    *,
    at_site: bool = False,
    split: Literal["test", "validation"] = "test",
) -> set[str]:
    """Of classes with their numbers of images, those to test with and never to train on.

    They are those whose ``lot`` is below ``test_classes``, so adding a class changes the side of
    no other one. For the ``split`` validation the lots are others than for the test. On one
    machine, unless ``test_classes`` is 0, the class of the lowest lot among those of two or more
    images is always held out, and if all were, the one of the highest lot among the others is
    trained on; ``at_site`` lots alone decide.

    Raises:
        DataError: a share that is none, or no class to hold out or to train on.
    """
    share = f"{split}_classes"
    if not 0.0 <= test_classes < 1.0:
        raise DataError(
            f"{share}, the share of the classes to hold out as a {split}: expected 0 (no {split}) "
            f"or more, and below 1, got {test_classes}"
        )
    drawn = seed if split == "test" else f"{split} {seed}"
    lots = {label: lot(drawn, label) for label in count}
    held_out = {label for label in count if lots[label] < test_classes}
    if at_site:
        if len(held_out) == len(count):
            raise DataError(
                f"nothing to train on at this site: all its classes ({len(count)}) are among those "
                f"that {share} = {test_classes} and the seed {seed} hold out as the {split} at "
                "all sites; add images of other classes, leave this site out, or have the share "
                "lowered for all sites"
            )
        return held_out
    if test_classes == 0.0:
        return held_out
    eligible = [label for label, images in count.items() if images >= 2]
    if not eligible or len(count) < 2:
        raise DataError(
            f"cannot hold out a class for {'testing' if split == 'test' else split}: expected at "
            f"least 2 classes, one of them with 2 or more images; got "
            f"{counted(len(count), 'class')}, {len(eligible)} of them with 2 or more"
        )
    tested = min(eligible, key=lots.__getitem__)
    held_out.add(tested)
    if len(held_out) == len(count):
        held_out.remove(max((label for label in count if label != tested), key=lots.__getitem__))
    return held_out
