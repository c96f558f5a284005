"""Search in one's own images: an index, exact search, classes enrolled by example.

`build_collection` makes the index of a run, `open_collection` opens it; `enrol` and `remove` change
its classes without training, `identify` names the class that an image shows, or none.
"""

from fedss.search.build import build_collection
from fedss.search.classes import (
    Identity,
    Threshold,
    enrol,
    identify,
    remove,
    stored_threshold,
    why_no_threshold,
)
from fedss.search.collection import Collection, Match, open_collection, reopen

__all__ = [
    "Collection",
    "Identity",
    "Match",
    "Threshold",
    "build_collection",
    "enrol",
    "identify",
    "open_collection",
    "remove",
    "reopen",
    "stored_threshold",
    "why_no_threshold",
]
