"""Labeled Faces in the Wild (Huang et al. 2007): faces from news; a client is one person.

Source: the data set's own README (vis-www.cs.umass.edu/lfw/README.txt) for layout, the form of the
lists of people and counts.
"""

import sys
from pathlib import Path

from fedss.data.manifest import ListedImage, Listing
from fedss.data.sets.published import Counts, find, published_listing, read_lines
from fedss.errors import DataError

_COUNTS = {"": Counts(13_233, 5_749, 5_749)}
_LISTS = {"train": "peopleDevTrain.txt", "test": "peopleDevTest.txt"}


def read_lfw(root: Path) -> Listing:
    """Labeled Faces in the Wild: 13,233 images of 5,749 people.

    The people of ``peopleDevTrain.txt`` are for training, those of ``peopleDevTest.txt``, whom
    training never sees, are the test (View 1): each of their images is searched among the others.
    Most people have a single image; in the test there is nothing to find for them, and they are
    left out of it (``Dataset.unpaired``). The pairs of the verification protocol are not read.

    Args:
        root: The folder with both lists (or ``view1/`` that holds them) and with one of ``lfw/``,
            ``lfw_funneled/`` and ``lfw-deepfunneled/`` (name/name_0001.jpg).
    """
    lists = {split: (name, f"view1/{name}") for split, name in _LISTS.items()}
    folders = ("lfw/", "lfw_funneled/", "lfw-deepfunneled/")
    found = find("Labeled Faces in the Wild", root, {**lists, "images": folders})
    rows, folder = [], found["images"].name
    for split in _LISTS:
        path = found[split]
        lines = read_lines(path, "Aaron_Eckhart\t1", r"([^\s/]+)(?:\s+([1-9]\d{0,3}))?")
        _, (people, more) = next(lines, (1, ("nothing", None)))
        if more is not None or not people.isdigit():
            raise DataError(f"{path}, line 1: expected the number of people, got {people!r}")
        listed = list(lines)
        if len(listed) != int(people):
            raise DataError(
                f"{path}: line 1 says {people} people, and {len(listed)} follow; download it again"
            )
        for line, (person, count) in listed:
            if count is None:
                raise DataError(
                    f"{path}, line {line}: expected a name and a number of images, got {person!r}"
                )
            person = sys.intern(person)
            for number in range(1, int(count) + 1):
                name = f"{folder}/{person}/{person}_{number:04}.jpg"
                rows.append(ListedImage(person, person, name, split, line))
    return published_listing(found, root, rows, _COUNTS)
