"""Images: one type (``Images``), and a function for each place they can come from."""

from fedss.data.assembly import DataOptions
from fedss.data.cache import cache_folder
from fedss.data.images import (
    ClientIndex,
    Dataset,
    Images,
    LazyNames,
    RetrievalTask,
    count_own_classes,
    data_fingerprint,
    holdings,
    index_clients,
    seen_classes,
)
from fedss.data.load import DATASETS, load_dataset, locate, usual_side
from fedss.data.partition import (
    Partition,
    deal_images,
    parse_partition,
    rotate_classes,
    split_clients,
)
from fedss.data.sets.glyphs import glyphs_dataset
from fedss.data.sets.omniglot import omniglot_dataset
from fedss.data.splits import VALIDATION_CLASSES, hold_out_classes
from fedss.data.table import parse_columns

# The names before 0.3, for one release.
deal_pictures, fingerprint, own_classes = deal_images, data_fingerprint, count_own_classes

__all__ = [
    "DATASETS",
    "VALIDATION_CLASSES",
    "ClientIndex",
    "DataOptions",
    "Dataset",
    "Images",
    "LazyNames",
    "Partition",
    "RetrievalTask",
    "cache_folder",
    "count_own_classes",
    "data_fingerprint",
    "deal_images",
    "glyphs_dataset",
    "hold_out_classes",
    "holdings",
    "index_clients",
    "load_dataset",
    "locate",
    "omniglot_dataset",
    "parse_columns",
    "parse_partition",
    "rotate_classes",
    "seen_classes",
    "split_clients",
    "usual_side",
]
