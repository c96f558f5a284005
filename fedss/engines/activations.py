"""Activations at the border of a backbone's frozen part, kept on the disk beside decoded images.

Shape suffixes: N images, X numbers at the border.
"""

import hashlib
import logging
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch

from fedss.data.cache import cached_array, drop_cached
from fedss.errors import DataError
from fedss.models import Embedder, frozen_fingerprint

_LOG = logging.getLogger("fedss.engines")
BLOCK = 64  # images whose activations are computed at a time
_FEW = 8  # images that are computed anew to see that what is kept is current


def pays(embedder: Embedder) -> bool:
    """Whether activations are to be kept: there is a border, and they take no more room than
    pixels do in float32."""
    if embedder.border is None:
        return False
    spec = embedder.spec
    return 2 * math.prod(embedder.border.shape) <= 4 * spec.channels * spec.image_size**2


def cached_activations(
    embedder: Embedder, pixels: np.ndarray, work: Callable[[np.ndarray], Iterator[np.ndarray]]
) -> np.ndarray | None:
    """Activations of images, float16 [N, X], read-only from the disk; made first if need be.

    They depend on the images, the frozen weights, the network and its precision, and are found by
    a digest of all of these. Of those that are found a few are computed anew, to be sure.

    Args:
        embedder: with a border.
        pixels: uint8 [N, C, H, W].
        work: gives the activations of images, block by block.

    Returns:
        None where a number is beyond float16, or the disk has no room for them.
    """
    assert embedder.border is not None
    digest, spec = hashlib.sha256(), embedder.spec
    for start in range(0, len(pixels), 1024):
        digest.update(np.ascontiguousarray(pixels[start : start + 1024]).data)
    network = (spec.backbone, spec.code, spec.trainable, spec.image_size, spec.group_values)
    weights = (frozen_fingerprint(embedder), embedder.precision, torch.__version__)
    key = ("activations", digest.hexdigest(), *network, *weights)
    shape = (len(pixels), *embedder.border.shape)

    def blocks() -> Iterator[np.ndarray]:
        for activations_BX in work(pixels):
            if not np.isfinite(activations_BX).all():
                raise OverflowError
            yield activations_BX

    def stored() -> np.ndarray:
        title = "frozen part of the backbone"
        return cached_array(key, shape, blocks(), cache=None, title=title, dtype=np.float16)

    try:
        found = stored()
        if not _is_current(found, pixels, work):
            drop_cached(key, shape, cache=None)
            found = stored()
        return found
    except OverflowError:
        _LOG.warning("activations of the frozen part are beyond float16, and computed every round")
    except DataError as error:
        _LOG.warning("activations of the frozen part are computed every round: %s", error)
    return None


def _is_current(
    found: np.ndarray, pixels: np.ndarray, work: Callable[[np.ndarray], Iterator[np.ndarray]]
) -> bool:
    """Whether the first few are what the network gives today: what its code computes, no key
    knows."""
    first = pixels[:_FEW]
    if not len(first):
        return True
    expected = next(iter(work(first))).astype(np.float32)
    return bool(np.abs(found[:_FEW] - expected).max() <= 0.01 * np.abs(expected).max() + 1e-6)
