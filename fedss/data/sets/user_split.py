"""The split files of Hsu, Qi, Brown 2020 (arXiv 2003.08082): who took which image of what.

Source: google-research's ``federated_vision_datasets/README.md``. The training's CSV has the
columns ``user_id,image_id,class``, the test's CSV ``image_id,class``; others may stand beside them.
"""

import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from fedss.data.manifest import ListedImage, Listing
from fedss.data.sets.published import NOBODY, Counts, published_listing
from fedss.data.table import read_table
from fedss.errors import DataError


def read_user_split(
    root: Path,
    found: Mapping[str, Path],
    name: Callable[[str], str],
    counts: Mapping[str, Counts],
    shortest: int = 1,
) -> Listing:
    """The images of a ``train`` and a ``test`` list.

    Args:
        root: The folder that names are relative to.
        found: The CSV of each, as ``find`` gives them.
        name: The file of an ``image_id``, relative to ``root``.
        counts: What was published.
        shortest: Characters that an ``image_id`` has at least.

    Raises:
        DataError: Anything amiss with a CSV or a line.
    """
    rows = []
    well_formed = re.compile(rf"[\w-]{{{shortest},}}").fullmatch
    for split, columns in (
        ("train", ("image_id", "class", "user_id")),
        ("test", ("image_id", "class")),
    ):
        path = found[split]
        for line, (image, label, *user) in read_table(path, columns).rows:
            if not well_formed(image):
                raise DataError(
                    f"{path}, line {line}: expected an image_id of {shortest} or more letters and "
                    f"digits, the name of a file without .jpg, got {image!r}"
                )
            client, label = sys.intern(user[0] if user else NOBODY), sys.intern(label)
            rows.append(ListedImage(client, label, name(image), split, line))
    return published_listing(found, root, rows, counts)
