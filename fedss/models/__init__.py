"""Embedding models: backbones by name or of your own, projection, unit norm, flat parameters.

An `Embedder` maps pixels to h = f_θ(x)/‖f_θ(x)‖. `build_embedder` makes one from a name or from a
module of your own and sees to what federated training needs of it: no running statistics, no
randomness in the forward pass, a known output size. `flatten_` then gives θ as one vector.
"""

from fedss.models.backbones import conv4
from fedss.models.border import Border, find_border
from fedss.models.embedder import (
    Embedder,
    EmbedderSpec,
    build_embedder,
    embed_pixels,
)
from fedss.models.flat import FlatParameters, flatten_
from fedss.models.frozen import frozen_fingerprint
from fedss.models.layout import pool_before_relu_
from fedss.models.norms import FrozenBatchNorm, freeze_batch_norm, norm_groups, replace_batch_norm
from fedss.models.saving import fingerprint, load_embedder, safetensors_of, save_embedder
from fedss.models.whitening import Whitening, whitening_axes

__all__ = [
    "Border",
    "Embedder",
    "EmbedderSpec",
    "FlatParameters",
    "FrozenBatchNorm",
    "Whitening",
    "build_embedder",
    "conv4",
    "embed_pixels",
    "find_border",
    "fingerprint",
    "flatten_",
    "freeze_batch_norm",
    "frozen_fingerprint",
    "load_embedder",
    "norm_groups",
    "pool_before_relu_",
    "replace_batch_norm",
    "safetensors_of",
    "save_embedder",
    "whitening_axes",
]
