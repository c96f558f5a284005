"""Stanford Online Products (Song et al. 2016, arXiv 1511.06452): photographs of goods on sale.

Sources: the archive's own ``Ebay_train.txt`` and ``Ebay_test.txt``, whose form TensorFlow Datasets'
``stanford_online_products`` and pytorch-metric-learning's ``StanfordOnlineProducts`` read too;
counts from the former.
"""

import sys
from pathlib import Path

from fedss.data.manifest import NOBODY, ListedImage, Listing
from fedss.data.sets.published import Counts, find, published_listing, read_lines
from fedss.errors import DataError

_HEADER = "image_id class_id super_class_id path"
_COUNTS = {"train": Counts(59_551, 11_318), "test": Counts(60_502, 11_316)}


def read_products(root: Path) -> Listing:
    """Stanford Online Products: 59,551 images of 11,318 products to train on, 60,502 of others.

    The other 11,316 products are the test, as published: each image is searched among all
    others. There are no users: ``fedss.data.DATASETS`` says who holds what.

    Args:
        root: The folder with ``Ebay_train.txt``, ``Ebay_test.txt`` and the folders of images, or
            the one that holds ``Stanford_Online_Products/``.
    """
    names = {split: f"Ebay_{split}.txt" for split in ("train", "test")}
    wanted = {k: (name, f"Stanford_Online_Products/{name}") for k, name in names.items()}
    lists = find("Stanford Online Products", root, wanted)
    if lists["train"].parent != lists["test"].parent:
        raise DataError(
            f"{root}: Ebay_train.txt and Ebay_test.txt are in two folders, expected one"
        )
    rows = []
    for split, path in lists.items():
        lines = read_lines(path, _HEADER, r"(\S+)\s+(\d+|class_id)\s+(\d+|super_class_id)\s+(.+)")
        header = next(lines, (1, ()))[1]
        if " ".join(header) != _HEADER:
            raise DataError(f"{path}, line 1: expected {_HEADER!r}, got {' '.join(header)!r}")
        for line, (_, number, _, name) in lines:
            folders, slash, file = name.rpartition("/")
            if not (slash and file) or ".." in folders.split("/") or name.startswith("/"):
                raise DataError(
                    f"{path}, line {line}: expected a path such as bicycle_final/1_0.JPG, below "
                    f"the folder of the list, got {name!r}"
                )
            label = f"{folders.removesuffix('_final')} {number}"
            rows.append(ListedImage(NOBODY, sys.intern(label), name, split, line))
    return published_listing(lists, lists["train"].parent, rows, _COUNTS)
