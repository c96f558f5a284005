"""Classes without training: enrol one from a few pictures, say which one a picture shows."""

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from fedss.embedding import class_name
from fedss.errors import ConfigError, DataError, RunFolderError
from fedss.files import read_json
from fedss.pictures import Picture, name_of, read_pictures
from fedss.search.collection import ENROLLED, Collection, check_model, fingerprint, reopen
from fedss.search.shelf import Item, changing, is_there, make_shelf, put, take_out


@dataclass(frozen=True)
class Identity:
    """What a picture shows.

    Attributes:
        label: the class; None: unknown, as no class is near enough.
        score: cosine of the picture's embedding and the nearest class's prototype.
        nearest: the nearest class, whether near enough or not.
    """

    label: str | None
    score: float
    nearest: str


def enrol(
    collection: Collection,
    label: str,
    pictures: Sequence[Picture],
    *,
    names: Sequence[str] | None = None,
) -> Collection:
    """Add pictures of a class, new or not, to a collection: no training, found at once.

    They are kept in the index (embedding and thumbnail, not the file), also when it is built
    again, until ``remove``. The class's prototype is the mean over all of its pictures.

    Args:
        collection: stays as it is.
        label: the class.
        pictures: files, their content or open images, one or more.
        names: a name for each, for people; None: their file names.

    Returns:
        The collection with them, and with what other processes have done to it meanwhile.

    Raises:
        DataError: no name, no picture, or one that cannot be read: then none is added.
        RunFolderError: the index cannot be written.
    """
    named = class_name(label)
    if named is None:
        raise DataError("a class needs a name: expected some text, got none")
    if not pictures:
        raise DataError(f"class {named}: expected one picture or more to enrol, got none")
    if names is None:
        names = [name_of(picture, at) for at, picture in enumerate(pictures)]
    blocks = read_pictures(collection.embedder, pictures, thumbnails=True)
    items = [
        Item(names[read.position], named, None, read.vector_D, read.thumbnail)
        for block in blocks
        for read in block
    ]
    path = collection.folder / ENROLLED
    model = fingerprint(collection.embedder)
    make_shelf(path, {"model": model, "build": secrets.token_hex(8)})
    check_model(path, collection.embedder)
    with changing(path) as file:
        put(file, items)
    return reopen(collection)


def remove(collection: Collection, label: str) -> Collection:
    """Take the enrolled pictures of a class out again.

    Pictures of that class which lie in the indexed folder stay.

    Raises:
        DataError: no picture of this class was enrolled.
        RunFolderError: the index cannot be written.
    """
    path = collection.folder / ENROLLED
    taken = 0
    if is_there(path):
        check_model(path, collection.embedder)
        with changing(path) as file:
            taken = take_out(file, class_name(label) or "")
    if not taken:
        there = ", ".join(reopen(collection).enrolled) or "none"
        raise DataError(f"no class {label!r} was enrolled; enrolled classes: {there}")
    return reopen(collection)


def identify(collection: Collection, query_QD: Tensor, threshold: float) -> list[Identity]:
    """The class that each picture shows, or unknown.

    A class is known by its prototype, p_c = m_c / ‖m_c‖ with m_c the mean embedding of its
    pictures. A picture h shows argmax_c cos(h, p_c), if that cosine is ``threshold`` or more. Of
    equal scores the class of the first name wins.

    The more classes there are, the more often a picture of none of them comes near to one: a
    threshold measured with N classes is right for about N.

    Args:
        collection: with classes, of its folders or enrolled.
        query_QD: floating point [Q, D], such as from ``Collection.embed``.
        threshold: the least cosine, -1 to 1.

    Raises:
        DataError: no picture of the collection has a class.
        ConfigError: a threshold out of range.
    """
    if not -1.0 <= threshold <= 1.0:
        raise ConfigError(f"threshold: expected a cosine from -1 to 1, got {threshold}")
    if not collection.classes:
        raise DataError(
            f"no picture of {collection.folder} has a class: sort the pictures into folders named "
            "by class, add a column label to the CSV, or enrol classes (fedss enrol)"
        )
    labels = list(collection.classes)
    unit_QD = nn.functional.normalize(query_QD.float(), dim=1)
    best_Q, rows_Q = (unit_QD @ collection.prototypes_CD.T).max(1)
    return [
        Identity(labels[row] if score >= threshold else None, score, labels[row])
        for score, row in zip(best_Q.tolist(), rows_Q.tolist(), strict=True)
    ]


@dataclass(frozen=True)
class Threshold:
    """What a run's evaluation says of identification.

    Attributes:
        threshold: the least cosine at which a class is named.
        fpir: false-positive identification rate: the share of pictures of no enrolled class for
            which one is named all the same.
        enrolled: with so many enrolled classes.
        supported: there were pictures enough to measure that share.
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


def stored_threshold(run: str | Path) -> Threshold | None:
    """The threshold in a run's ``verification.json``; None if it has none.

    Raises:
        RunFolderError: the file is damaged.
    """
    path = Path(run) / "verification.json"
    if not path.exists():
        return None
    found = read_json(path)
    try:
        part = found.get("identification")
        if part is None:
            return None
        stored = Threshold(
            threshold=float(part["threshold"]),
            fpir=float(part["fpir"]),
            enrolled=int(part["enrolled"]),
            supported=bool(part.get("supported", True)),
        )
        if not (math.isfinite(stored.threshold) and 0 <= stored.fpir <= 1 and stored.enrolled > 0):
            raise ValueError(f"out of range: {stored}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RunFolderError(
            f"{path} is damaged ({error}): fedss evaluate {run} writes it"
        ) from error
    return stored
