"""Landmarks-User-160k and gld23k: photographs of landmarks (Google Landmarks v2) by photographer.

Sources: Hsu, Qi, Brown 2020 (arXiv 2003.08082), whose split files and their columns
google-research's ``federated_vision_datasets/README.md`` describes; TensorFlow Federated's
``simulation/datasets/gldv2.py`` for gld23k, file names and counts; cvdfoundation's
``google-landmark/README.md`` for where an image's file is.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from fedss.data.manifest import Listing
from fedss.data.sets.published import Counts, find
from fedss.data.sets.user_split import read_user_split


def read_landmarks(root: Path) -> Listing:
    """Landmarks-User-160k: 164,172 training images of 2,028 landmarks at 1,262 photographers.

    ``federated_train.csv`` is for training, ``test.csv``, which has no users, is the test: each of
    its images is searched among the others. Its landmarks are those of the training.

    Args:
        root: The folder with both CSVs, or with ``landmarks-user-160k/`` that holds them, and with
            either ``train/`` as Google Landmarks v2 unpacks (``0/1/2/0123456789abcdef.jpg``) or
            ``images/`` with all files side by side, as TensorFlow Federated keeps them.

    Raises:
        DataError: A file is missing, or a line is of another form.
    """
    lists = {"train": "federated_train.csv", "test": "test.csv"}
    wanted = {split: (name, f"landmarks-user-160k/{name}") for split, name in lists.items()}
    return _listing("Landmarks-User-160k", root, wanted, Counts(164_172, 2_028, 1_262))


def read_gld23k(root: Path) -> Listing:
    """gld23k, a part of Landmarks-User-160k: 23,080 images of 203 landmarks at 233 photographers.

    ``mini_gld_train_split.csv`` is for training, ``mini_gld_test.csv`` is the test. The rest is as
    for ``read_landmarks``.

    Raises:
        DataError: A file is missing, or a line is of another form.
    """
    wanted = {"train": ("mini_gld_train_split.csv",), "test": ("mini_gld_test.csv",)}
    return _listing("gld23k", root, wanted, Counts(23_080, 203, 233))


def _listing(
    title: str, root: Path, wanted: Mapping[str, Sequence[str]], counts: Counts
) -> Listing:
    found = find(title, root, {**wanted, "images": ("train/", "images/")})
    folder = found["images"].name
    nested = folder == "train"

    def name(image: str) -> str:
        below = f"{image[0]}/{image[1]}/{image[2]}/" if nested else ""
        return f"{folder}/{below}{image}.jpg"

    return read_user_split(root, found, name, {"train": counts}, shortest=3)
