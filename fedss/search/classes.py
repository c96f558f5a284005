"""Classes without training: enrol one from a few images, say which one an image shows."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fedss.errors import ConfigError, DataError
from fedss.evaluation.retrieval import nearest
from fedss.evaluation.verification import REJECT_ALL
from fedss.inference.embedding import class_name
from fedss.inference.pixels import ImageSource, Read, name_of, read_images
from fedss.models import fingerprint
from fedss.runs.about import read_any_config
from fedss.runs.findings import read_verification
from fedss.search.collection import ENROLLED, Collection, check_model, checked_queries, reopen
from fedss.search.store import (
    Item,
    add_items,
    create_store,
    remove_class,
    store_exists,
    transaction,
)
from fedss.text import counted


@dataclass(frozen=True)
class Identity:
    """What an image shows.

    Attributes:
        label: the class; None: unknown, as no class is near enough.
        score: cosine of the image's embedding and the nearest class's prototype.
        nearest: the nearest class, whether near enough or not.
    """

    label: str | None
    score: float
    nearest: str


def enrol(
    collection: Collection,
    label: str,
    images: Sequence[ImageSource],
    *,
    names: Sequence[str] | None = None,
) -> Collection:
    """Add images of a class, new or not, to a collection: no training, found at once.

    They are kept in the index (embedding and thumbnail, not the file), also when it is built
    again, until ``remove``. The class's prototype is the mean over all of its images.

    Args:
        collection: stays as it is.
        label: the class.
        images: files, their content or open images, one or more.
        names: a name for each, for people; None: their file names.

    Returns:
        The collection with them, and with what other processes have done to it meanwhile.

    Raises:
        DataError: no name, no image, or one that cannot be read: then none is added.
        RunFolderError: the index cannot be written.
    """
    named = class_name(label)
    if named is None:
        raise DataError("a class needs a name: expected some text, got none")
    if not images:
        raise DataError(f"class {named}: expected one image or more to enrol, got none")
    if names is None:
        names = [name_of(image, at) for at, image in enumerate(images)]
    blocks = read_images(collection.embedder, images, thumbnails=True)
    return keep(collection, named, [read for block in blocks for read in block], names)


def keep(
    collection: Collection, label: str, images: Sequence[Read], names: Sequence[str]
) -> Collection:
    """:func:`enrol`, for images that were read before, with thumbnails."""
    items = [
        Item(names[read.position], label, None, read.vector_D, read.thumbnail) for read in images
    ]
    path = collection.folder / ENROLLED
    model = fingerprint(collection.embedder)
    create_store(path, {"model": model, "build": secrets.token_hex(8)})
    check_model(path, collection.embedder)
    with transaction(path) as file:
        add_items(file, items)
    return reopen(collection)


def remove(collection: Collection, label: str) -> Collection:
    """Take the enrolled images of a class out again.

    Images of that class which lie in the indexed folder stay.

    Raises:
        DataError: no image of this class was enrolled.
        RunFolderError: the index cannot be written.
    """
    path = collection.folder / ENROLLED
    taken = 0
    if store_exists(path):
        check_model(path, collection.embedder)
        with transaction(path) as file:
            taken = remove_class(file, class_name(label) or "")
    if not taken:
        there = ", ".join(reopen(collection).enrolled) or "none"
        raise DataError(f"no class {label!r} was enrolled; enrolled classes: {there}")
    return reopen(collection)


def identify(collection: Collection, query_QD: Tensor, threshold: float) -> list[Identity]:
    """The class that each image shows, or unknown.

    A class is known by its prototype, p_c = m_c / ‖m_c‖ with m_c the mean embedding of its
    images. An image h shows argmax_c cos(h, p_c), if that cosine is ``threshold`` or more. Of
    equal scores the class of the first name wins. Scores are those of ``fedss.nearest``: exact, so
    that they do not depend on what else is asked for at one time.

    The more classes there are, the more often an image of none of them comes near to one: a
    threshold measured with N classes is right for about N.

    Args:
        collection: with classes, of its folders or enrolled.
        query_QD: floating point [Q, D], such as from ``Collection.embed``.
        threshold: the least cosine, -1 to 1; or ``fedss.evaluation.verification.REJECT_ALL``, as
            a run's test may have measured it: then all images are unknown.

    Raises:
        DataError: no image of the collection has a class; queries of another size, NaN or
            infinite.
        ConfigError: a threshold out of range.
    """
    if not -1.0 <= threshold <= 1.0 and threshold != REJECT_ALL:
        raise ConfigError(f"threshold: expected a cosine from -1 to 1, got {threshold}")
    if not collection.classes:
        raise DataError(
            f"no image of {collection.folder} has a class: sort the images into folders named "
            "by class, add a column label to the CSV, or enrol classes (fedss enrol)"
        )
    labels, prototypes_CD = list(collection.classes), collection.prototypes_CD
    query_QD = checked_queries(query_QD, prototypes_CD.shape[1])
    if not len(query_QD):
        return []
    best_Q1, rows_Q1 = nearest(query_QD, prototypes_CD, 1)
    return [
        Identity(labels[row] if score >= threshold else None, score, labels[row])
        for score, row in zip(best_Q1[:, 0].tolist(), rows_Q1[:, 0].tolist(), strict=True)
    ]


@dataclass(frozen=True)
class Threshold:
    """What a run's evaluation says of identification.

    Attributes:
        threshold: the least cosine at which a class is named;
        ``fedss.evaluation.verification.REJECT_ALL``: at
            every other one more strangers than ``fpir`` were named, so that no class ever is.
        fpir: false-positive identification rate: the share of images of no enrolled class for
            which one is named all the same.
        enrolled: with so many enrolled classes.
        supported: there were images enough to measure that share.
    """

    threshold: float
    fpir: float
    enrolled: int
    supported: bool = True

    def fpir_among(self, classes: int) -> float:
        """What to expect with another number of classes, as good as independent of each other.

        1 - (1 - fpir)^(classes / enrolled): each class is one more chance to be taken for it.
        """
        return 1.0 - float((1.0 - self.fpir) ** (classes / self.enrolled))

    def worth(self, classes: int) -> str:
        """What to know of it where there are so many classes, in words."""
        if self.threshold > 1:
            return (
                "the test of this run allows no name at a false-positive rate of "
                f"{self.fpir:.1%}: at every threshold more strangers had one"
            )
        doubt = "" if self.supported else "; too few images were at hand to be sure"
        return (
            f"of strangers {self.fpir:.1%} are named among {counted(self.enrolled, 'class')}, as "
            f"measured; here about {self.fpir_among(classes):.1%}{doubt}"
        )


def stored_threshold(run: str | Path) -> Threshold | None:
    """The threshold in a run's ``verification.json``; None if it has none.

    Raises:
        RunFolderError: the file is damaged.
    """
    found = read_verification(Path(run))
    known = None if found is None else found.identification
    if known is None:
        return None
    return Threshold(min(known.threshold, REJECT_ALL), known.fpir, known.enrolled, known.supported)


def why_no_threshold(run: str | Path) -> str:
    """Why ``stored_threshold`` gives None, and what to do."""
    has_config = (Path(run) / "config.json").exists()
    data = read_any_config(Path(run)).get("data", {}) if has_config else {}
    if (Path(run) / "verification.json").exists():
        why = "its test has no classes to find, or none to reject"
    elif data.get("evaluated_at") == "sites":
        why = (
            "its images were evaluated at the sites, which gives none. To measure one on other "
            f"images: fedss evaluate {run} with their --data-path"
        )
    else:
        why = f"fedss evaluate {run} measures one, if its test images are of several classes"
    return (
        f"{run} has no threshold of its own: {why}. Or give a least cosine with --threshold, such "
        "as 0.6"
    )
