"""Landmarks-User-160k, gld23k and iNaturalist-User-120k: who took which image of what.

Sources: Hsu, Qi, Brown 2020 (arXiv 2003.08082) and google-research's
``federated_vision_datasets/README.md``: the training's CSV has the columns
``user_id,image_id,class``, the test's ``image_id,class``, perhaps others beside them. TensorFlow
Federated's ``simulation/datasets/gldv2.py`` and ``inaturalist.py`` for gld23k, file names and
counts. cvdfoundation's ``google-landmark/README.md`` and visipedia's ``inat_comp/2017/README.md``
for where images are.
"""

import glob
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fedss.data.manifest import NOBODY, ListedImage, Listing
from fedss.data.sets.published import Counts, find, published_listing
from fedss.data.table import read_table
from fedss.errors import DataError

_INATURALIST = "train_val_images"


def read_landmarks(root: Path) -> Listing:
    """Landmarks-User-160k: 164,172 training images of 2,028 landmarks at 1,262 photographers.

    ``federated_train.csv`` is for training, ``test.csv``, which has no users, is the test: each of
    its images is searched among the others. Its landmarks are those of the training.

    Args:
        root: The folder with both CSVs, or with ``landmarks-user-160k/`` that holds them, and with
            either ``train/`` as Google Landmarks v2 unpacks (``0/1/2/0123456789abcdef.jpg``) or
            ``images/`` with all files side by side, as TensorFlow Federated keeps them.
    """
    lists = {"train": "federated_train.csv", "test": "test.csv"}
    wanted = {split: (name, f"landmarks-user-160k/{name}") for split, name in lists.items()}
    return _read_landmarks("Landmarks-User-160k", root, wanted, Counts(164_172, 2_028, 1_262))


def read_gld23k(root: Path) -> Listing:
    """gld23k, a part of Landmarks-User-160k: 23,080 images of 203 landmarks at 233 photographers.

    ``mini_gld_train_split.csv`` is for training, ``mini_gld_test.csv`` is the test. The rest is as
    for ``read_landmarks``.
    """
    wanted = {"train": ("mini_gld_train_split.csv",), "test": ("mini_gld_test.csv",)}
    return _read_landmarks("gld23k", root, wanted, Counts(23_080, 203, 233))


def _read_landmarks(
    title: str, root: Path, wanted: Mapping[str, Sequence[str]], counts: Counts
) -> Listing:
    paths = find(title, root, {**wanted, "images": ("train/", "images/")})
    folder = paths["images"].name

    def name(image: str) -> str:
        below = f"{image[0]}/{image[1]}/{image[2]}/" if folder == "train" else ""
        return f"{folder}/{below}{image}.jpg"

    return _read_lists(root, paths, name, {"train": counts}, shortest=3)


def read_inaturalist(root: Path) -> Listing:
    """iNaturalist-User-120k: 120,300 training images of 1,203 species at 9,275 observers.

    ``federated_train_user_120k.csv`` is for training, ``test.csv``, 35,641 images without users,
    is the test: each is searched among the others. Its species are those of the training.

    Args:
        root: The folder with both CSVs, or with ``inaturalist-user-120k/`` that holds them, and
            with ``train_val_images/`` as iNaturalist 2017 unpacks (super category/species/file).
    """
    lists = {"train": "federated_train_user_120k.csv", "test": "test.csv"}
    wanted = {split: (name, f"inaturalist-user-120k/{name}") for split, name in lists.items()}
    paths = find("iNaturalist-User-120k", root, {**wanted, "images": (f"{_INATURALIST}/",)})
    places = _places_by_id(paths["images"])

    def name(image: str) -> str:
        # A name that no file has stands for one that is missing.
        return f"{_INATURALIST}/{places.get(image, f'*/*/{image}.jpg')}"

    counts = {"train": Counts(120_300, 1_203, 9_275), "test": Counts(35_641)}
    return _read_lists(root, paths, name, counts)


def _places_by_id(folder: Path) -> dict[str, str]:
    """Each image's path below the folder by its id, the name of its file without the ending."""
    places: dict[str, str] = {}
    for place in glob.iglob("*/*/*.*", root_dir=folder):
        image, ending = os.path.splitext(os.path.basename(place))
        if ending.lower() not in (".jpg", ".jpeg"):
            continue
        if image in places:
            raise DataError(
                f"{folder}: two images have the id {image}: {places[image]} and {place}; "
                "remove the one that is no part of iNaturalist 2017"
            )
        places[image] = place
    return places


def _read_lists(
    root: Path,
    paths: Mapping[str, Path],
    name: Callable[[str], str],
    counts: Mapping[str, Counts],
    shortest: int = 1,
) -> Listing:
    """The images of a ``train`` and a ``test`` list; ``name`` gives the file of an ``image_id``."""
    rows = []
    well_formed = re.compile(rf"[\w-]{{{shortest},}}").fullmatch
    for split, columns in (
        ("train", ("image_id", "class", "user_id")),
        ("test", ("image_id", "class")),
    ):
        path = paths[split]
        for line, (image, label, *user) in read_table(path, columns).rows:
            if not well_formed(image):
                raise DataError(
                    f"{path}, line {line}: expected an image_id of {shortest} or more letters and "
                    f"digits, the name of a file without .jpg, got {image!r}"
                )
            client, label = sys.intern(user[0] if user else NOBODY), sys.intern(label)
            rows.append(ListedImage(client, label, name(image), split, line))
    return published_listing(paths, root, rows, counts)
