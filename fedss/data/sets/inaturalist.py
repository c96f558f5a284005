"""iNaturalist-User-120k: photographs of animals and plants (iNaturalist 2017) by observer.

Sources: Hsu, Qi, Brown 2020 (arXiv 2003.08082) and google-research's
``federated_vision_datasets/README.md``; TensorFlow Federated's
``simulation/datasets/inaturalist.py`` for counts; visipedia's ``inat_comp/2017/README.md`` for
where images are.
"""

import os
from pathlib import Path

from fedss.data.manifest import Listing
from fedss.data.sets.published import Counts, find
from fedss.data.sets.user_split import read_user_split
from fedss.errors import DataError

_FOLDER = "train_val_images"


def read_inaturalist(root: Path) -> Listing:
    """iNaturalist-User-120k: 120,300 training images of 1,203 species at 9,275 observers.

    ``federated_train_user_120k.csv`` is for training, ``test.csv``, 35,641 images without users,
    is the test: each is searched among the others. Its species are those of the training.

    Args:
        root: The folder with both CSVs, or with ``inaturalist-user-120k/`` that holds them, and
            with ``train_val_images/`` as iNaturalist 2017 unpacks (super category/species/file).

    Raises:
        DataError: A file is missing, a line is of another form, or two images have one id.
    """
    lists = {"train": "federated_train_user_120k.csv", "test": "test.csv"}
    wanted = {split: (name, f"inaturalist-user-120k/{name}") for split, name in lists.items()}
    found = find("iNaturalist-User-120k", root, {**wanted, "images": (f"{_FOLDER}/",)})
    places = _places(found["images"])

    def name(image: str) -> str:
        # A name that no file has stands for one that is missing.
        return f"{_FOLDER}/{places.get(image, f'*/*/{image}.jpg')}"

    counts = {"train": Counts(120_300, 1_203, 9_275), "test": Counts(35_641)}
    return read_user_split(root, found, name, counts)


def _places(folder: Path) -> dict[str, str]:
    """Each image's path below the folder by its id, the name of its file without the ending."""
    places: dict[str, str] = {}
    for above in _folders(folder):
        for species in _folders(above):
            for entry in _entries(species):
                image, dot, ending = entry.name.rpartition(".")
                if not dot or ending.lower() not in ("jpg", "jpeg"):
                    continue
                place = f"{above.name}/{species.name}/{entry.name}"
                if image in places:
                    raise DataError(
                        f"{folder}: two images have the id {image}: {places[image]} and {place}; "
                        "remove the one that is no part of iNaturalist 2017"
                    )
                places[image] = place
    return places


def _entries(folder: Path | os.DirEntry[str]) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return list(entries)


def _folders(folder: Path | os.DirEntry[str]) -> list[os.DirEntry[str]]:
    return [entry for entry in _entries(folder) if entry.is_dir()]
