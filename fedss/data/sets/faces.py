"""Faces, a client being one person: CelebA and Labeled Faces in the Wild.

Sources: LEAF's ``data/celeba/preprocess/metadata_to_json.py`` (Caldas et al. 2018,
arXiv 1812.01097) for the form of ``identity_CelebA.txt`` and the rule of five images; the
documentation of TensorFlow Federated's ``celeba.load_data`` for counts; LFW's own README
(vis-www.cs.umass.edu/lfw/README.txt) for layout, the form of the lists of people and counts.
"""

import sys
from collections import Counter
from pathlib import Path

from fedss.data.manifest import ListedImage, Listing
from fedss.data.sets.published import Counts, find, published_listing, read_lines
from fedss.errors import DataError

_FEWEST = 5
# After LEAF's rule: 180,429 and 19,859 images in the two parts of TensorFlow Federated.
_CELEBA_COUNTS = {"": Counts(200_288, 9_343, 9_343)}
_LFW_COUNTS = {"": Counts(13_233, 5_749, 5_749)}
_LFW_LISTS = {"train": "peopleDevTrain.txt", "test": "peopleDevTest.txt"}


def read_celeba(root: Path) -> Listing:
    """CelebA (Liu et al. 2015, arXiv 1411.7766): 200,288 images of 9,343 celebrities.

    Those with fewer than five images are left out, as in LEAF. No split by celebrity is published
    with the identities, so some are held out as the test (``test_classes``); LEAF and TensorFlow
    Federated draw theirs as well.

    Args:
        root: The folder with ``identity_CelebA.txt`` (or ``Anno/`` that holds it) and
            ``img_align_celeba/`` (or ``Img/`` that holds it).
    """
    lists = ("identity_CelebA.txt", "Anno/identity_CelebA.txt")
    folders = ("img_align_celeba/", "Img/img_align_celeba/")
    paths = find("CelebA", root, {"list": lists, "images": folders})
    rows, folder = [], paths["images"].relative_to(root).as_posix()
    lines = read_lines(paths["list"], "000001.jpg 2880", r"([\w-]+\.(?:jpg|png))\s+(\d+)")
    for line, (file, person) in lines:
        person = sys.intern(person)
        rows.append(ListedImage(person, person, f"{folder}/{file}", None, line))
    times, remarks = Counter(row.label for row in rows), []
    kept = [row for row in rows if times[row.label] >= _FEWEST]
    if few := sum(count < _FEWEST for count in times.values()):
        remarks.append(
            f"left out, as in LEAF, celebrities with fewer than {_FEWEST} images: {few:,}, with "
            f"{len(rows) - len(kept):,} images"
        )
    return published_listing(paths, root, kept, _CELEBA_COUNTS, remarks)


def read_lfw(root: Path) -> Listing:
    """Labeled Faces in the Wild (Huang et al. 2007): 13,233 images of 5,749 people.

    The people of ``peopleDevTrain.txt`` are for training, those of ``peopleDevTest.txt``, whom
    training never sees, are the test (View 1): each of their images is searched among the others.
    Most people have a single image; in the test there is nothing to find for them, and they are
    left out of it (``Dataset.unpaired``). The pairs of the verification protocol are not read.

    Args:
        root: The folder with both lists (or ``view1/`` that holds them) and with one of ``lfw/``,
            ``lfw_funneled/`` and ``lfw-deepfunneled/`` (name/name_0001.jpg).
    """
    lists = {split: (name, f"view1/{name}") for split, name in _LFW_LISTS.items()}
    folders = ("lfw/", "lfw_funneled/", "lfw-deepfunneled/")
    paths = find("Labeled Faces in the Wild", root, {**lists, "images": folders})
    rows, folder = [], paths["images"].name
    for split in _LFW_LISTS:
        path = paths[split]
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
    return published_listing(paths, root, rows, _LFW_COUNTS)
