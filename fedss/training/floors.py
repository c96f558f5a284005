"""Floors of a frozen backbone, at the size of a run's images and at the one its weights know.

A smaller size costs more than training gains, so both stand beside a figure.
"""

import logging
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fedss.config import Config
from fedss.data import Dataset, Images, RetrievalTask
from fedss.engines.local import Workers, start_workers
from fedss.errors import DataError
from fedss.evaluation.baselines import Floors, backbone_floors
from fedss.log import Progress, progress_log
from fedss.models import EmbedderSpec
from fedss.settings import made_for
from fedss.training.build import model_for

_LOG = logging.getLogger("fedss.training")
_FITTED = 2000  # training images decoded again, for mean and PCA
_AT_ONCE = 512  # images decoded again at a time


def frozen_floors(
    config: Config,
    data: Dataset,
    task: RetrievalTask,
    spec: EmbedderSpec,
    workers: Workers,
    backbone_P: Tensor,
) -> Floors:
    """Those of :func:`fedss.evaluation.baselines.backbone_floors`, and the same for images of
    :func:`weights_side`, if that is not None.

    At that size the weights are those that the configuration names, also in a run that began with
    those of another one.

    Args:
        config: without ``auto``.
        data: for its training images, and files.
        task: its test.
        spec: of the run's network.
        workers: with that network.
        backbone_P: its first weights.
    """

    def features(images: Images, which: np.ndarray) -> Tensor:
        return workers.features(backbone_P, images.pixels, which)

    floors, side = backbone_floors(spec, features, task, data.train), weights_side(config, data)
    if not floors.map_at_10 or side is None or spec.is_own:
        return floors
    try:
        return floors | _floors_at(side, config, data, task, spec, workers)
    except DataError as error:
        _LOG.warning("no floors at %d px: an image cannot be decoded again: %s", side, error)
        return floors


def weights_side(config: Config, data: Dataset) -> int | None:
    """The size of images that the trained weights were made for, where it is not that of the data
    set and its images can be decoded again."""
    side = made_for(config)
    known = side in (None, data.train.pixels.shape[2]) or data.decode_again is None
    return None if known else side


def _floors_at(
    side: int,
    config: Config,
    data: Dataset,
    task: RetrievalTask,
    spec: EmbedderSpec,
    workers: Workers,
) -> Floors:
    decode_again = data.decode_again
    assert decode_again is not None
    log, done = progress_log(), 0
    counts = len(task.query), len(task.gallery or ()), min(len(data.train), _FITTED)
    # All of it is frozen, so that other runs find what it gives, as with a run's own images.
    embedder = model_for(replace(config, trainable="head"), spec.channels, side)
    few = np.zeros((2, spec.channels, side, side), np.uint8)  # they show the shape alone
    with start_workers(
        embedder,
        few,
        workers.count,
        device=workers.device,
        precision=config.precision,
        frozen_once=config.cache_activations,
        augmented=True,  # what stands for training images here need not be computed
    ) as others:
        with others.replica() as model:
            backbone_P = model.theta_P.clone()

        def features(images: Images, which: np.ndarray) -> Tensor:
            nonlocal done
            found = []
            for start in range(0, len(which), _AT_ONCE):
                names = [images.names[i] for i in which[start : start + _AT_ONCE].tolist()]
                found.append(others.features(backbone_P, decode_again(names, side)))
                others.known.clear()  # Not all pixels are in memory at once.
                done += len(names)
                title = f"frozen backbone at {side} px"
                log(Progress(title, done, sum(counts), "images"), False)
            return torch.cat(found)

        return backbone_floors(embedder.spec, features, task, data.train, _FITTED, side)
