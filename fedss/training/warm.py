"""Before the first round: whiten features, and give class rows their first values.

See :mod:`fedss.core.features`.
"""

import logging
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from fedss.config import Config
from fedss.core.class_rows import ClassRows, write_
from fedss.core.engine import FeatureEngine
from fedss.core.features import warm_start
from fedss.errors import ConfigError, RunFolderError
from fedss.evaluation.baselines import OVERFLOW
from fedss.losses.methods import METHODS
from fedss.models import Embedder, Whitening
from fedss.seeds import generator
from fedss.wire.messages import encode_feature_sums, encode_whitening, encoded_size

_LOG = logging.getLogger("fedss.training")
MOST_TELLING = 1000
"""So many clients tell of their features, at random, where there are more: that is enough for the
features' covariance."""


def warm_up_(
    config: Config,
    engine: FeatureEngine,
    embedder: Embedder,
    backbone_P: torch.Tensor,
    rows: ClassRows,
) -> dict[str, int] | None:
    """Set the whitening of a model, in place, and its first class rows.

    Returns:
        ``clients``, ``bytes_up`` and ``bytes_down``: who was asked, and the bytes of all messages,
        of which each client gets the whitening once; no bytes where images are pooled. None where
        features are not whitened.

    Raises:
        ConfigError: features that are not finite, or all the same.
        QuorumError: no client told of its features.
    """
    whitening = embedder.whitening
    if not isinstance(whitening, Whitening):
        return None
    count = engine.num_clients(0)
    asked = np.arange(count)
    if count > MOST_TELLING:
        rng = generator(config.seed, "features")
        asked = np.sort(rng.choice(count, MOST_TELLING, replace=False))
    by_class = config.rows_init == "means" and not METHODS[config.method].local_rows
    sums = engine.feature_sums(backbone_P, asked.tolist(), by_class)
    if not all(bool(of_client.sums_PF.isfinite().all()) for of_client in sums):
        raise ConfigError(OVERFLOW)
    size = whitening.axes_FK.shape[1]
    start = warm_start(sums, size, embedder.spec.embedding_size)
    _check_axes(int((start.axes_FK.abs().sum(0) > 0).sum()), embedder.spec.embedding_size)
    whitening.set_(start.mean_F, start.axes_FK)
    engine.whiten(start.mean_F, start.axes_FK)
    if len(start.ids_U):
        slots = {name: torch.zeros_like(start.rows_UD) for name in rows.slots}
        write_(rows, start.ids_U, start.rows_UD, slots, -1)
    if METHODS[config.method].pooled:
        return {"clients": len(sums), "bytes_up": 0, "bytes_down": 0}
    up = sum(encoded_size(encode_feature_sums(of_client)) for of_client in sums)
    down = encoded_size(encode_whitening(start.mean_F, start.axes_FK)) * count
    return {"clients": len(sums), "bytes_up": up, "bytes_down": down}


def _check_axes(varying: int, dim: int) -> None:
    if not varying:
        raise ConfigError(
            "the features of all training images are the same, so there is nothing to whiten: "
            "expected images that differ, or projection_init random"
        )
    if varying < dim:
        _LOG.warning(
            "the features of the training images vary along %d axes; %d of the %d numbers of an "
            "embedding begin as zeros (embedding_size)",
            varying,
            dim - varying,
            dim,
        )


def restore_whitening_(engine: FeatureEngine, embedder: Embedder, first: Path) -> None:
    """That of a run that goes on, from the model in ``first``, in place.

    Raises:
        RunFolderError: it is not there.
    """
    whitening = embedder.whitening
    if not isinstance(whitening, Whitening):
        return
    path = first / "model.safetensors"
    try:
        state = load_file(path)
        mean_F, axes_FK = state["whitening.mean_F"], state["whitening.axes_FK"]
        if (mean_F.shape, axes_FK.shape) != (whitening.mean_F.shape, whitening.axes_FK.shape):
            raise RuntimeError("it is of another size")
        whitening.set_(mean_F, axes_FK)
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise RunFolderError(
            f"{path}: expected the model with which the run began, and its whitening ({error}); "
            "restore it, or start another run"
        ) from error
    engine.whiten(whitening.mean_F, whitening.axes_FK)
