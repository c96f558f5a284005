"""CelebA (Liu et al. 2015, arXiv 1411.7766): faces of celebrities; a client is one celebrity.

Sources: LEAF's ``data/celeba/preprocess/metadata_to_json.py`` (Caldas et al. 2018,
arXiv 1812.01097) for the form of ``identity_CelebA.txt`` and the rule of five images; the
documentation of TensorFlow Federated's ``celeba.load_data`` for counts.
"""

import sys
from collections import Counter
from pathlib import Path

from fedss.data.manifest import ListedImage, Listing
from fedss.data.sets.published import Counts, find, published_listing, read_lines

_FEWEST = 5
# After LEAF's rule: 180,429 and 19,859 images in the two parts of TensorFlow Federated.
_COUNTS = {"": Counts(200_288, 9_343, 9_343)}


def read_celeba(root: Path) -> Listing:
    """CelebA: 200,288 images of the 9,343 celebrities who have five or more.

    Celebrities with fewer are left out, as in LEAF. No split by celebrity is published with the
    identities, so some celebrities are held out as the test (``test_classes``); LEAF and
    TensorFlow Federated draw theirs as well.

    Args:
        root: The folder with ``identity_CelebA.txt`` (or ``Anno/`` that holds it) and
            ``img_align_celeba/`` (or ``Img/`` that holds it).
    """
    lists = ("identity_CelebA.txt", "Anno/identity_CelebA.txt")
    folders = ("img_align_celeba/", "Img/img_align_celeba/")
    found = find("CelebA", root, {"list": lists, "images": folders})
    rows, folder = [], found["images"].relative_to(root).as_posix()
    lines = read_lines(found["list"], "000001.jpg 2880", r"([\w-]+\.(?:jpg|png))\s+(\d+)")
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
    return published_listing(found, root, kept, _COUNTS, remarks)
