"""Activations at the border of a backbone's frozen part, kept on the disk beside decoded images.

Shape suffixes: N images, X numbers at the border.
"""

import hashlib
import logging
import math
from collections.abc import Callable, Iterator

import numpy as np

from fedss.data.cache import cached_array
from fedss.models import Embedder, frozen_fingerprint

_LOG = logging.getLogger("fedss.engines")
BLOCK = 64  # images whose activations are computed at a time


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
    a digest of all of these.

    Args:
        embedder: with a border.
        pixels: uint8 [N, C, H, W].
        work: gives the activations of images, block by block.

    Returns:
        None where a number is beyond float16.

    Raises:
        DataError: the disk has no room for them.
    """
    assert embedder.border is not None
    digest = hashlib.sha256()
    for start in range(0, len(pixels), 1024):
        digest.update(np.ascontiguousarray(pixels[start : start + 1024]).data)
    fingerprint = frozen_fingerprint(embedder)
    key = ("activations", digest.hexdigest(), fingerprint, repr(embedder.spec), embedder.precision)

    def blocks() -> Iterator[np.ndarray]:
        for activations_BX in work(pixels):
            if not np.isfinite(activations_BX).all():
                raise OverflowError
            yield activations_BX

    shape = (len(pixels), *embedder.border.shape)
    title = "frozen part of the backbone"
    try:
        return cached_array(key, shape, blocks(), cache=None, title=title, dtype=np.float16)
    except OverflowError:
        _LOG.warning("activations of the frozen part are beyond float16, and computed every round")
        return None
