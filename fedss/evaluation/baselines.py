"""Floors: what a test gives for nothing, against which a trained model is judged.

``chance`` is a random ranking, ``pixels`` the images themselves, ``untrained`` the network before
its first round. Where it begins with trained weights, ``frozen`` is what its backbone gives as it
comes, without the projection, which is random, ``frozen_centred`` the same less the mean of the
training images, and ``frozen_whitened`` after PCA. ``frozen_at_224`` and so on are the same for
images of another size than the run's, that of the weights (:mod:`fedss.training.floors`).

Shape suffixes: N images, C classes (of scores) or channels (of pixels), D numbers per image.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fedss.data import Images, RetrievalTask
from fedss.errors import ConfigError
from fedss.evaluation.intervals import ClassScores
from fedss.evaluation.task import EmbedPixels, count_classes, embed_task, score_classes
from fedss.models import EmbedderSpec, whitening_axes

# Of 6 to 16 pixels a side, with and without their mean, what stays within 7 % of the best on each
# of glyphs, Omniglot, photographs and Chinese characters.
SIDE = 12

_BATCH = 4096  # images reduced at a time
_DEPTH = 10


@dataclass(frozen=True)
class Floors:
    """MAP@10 by the name of the floor, and of each class where the classes are known here."""

    map_at_10: Mapping[str, float] = field(default_factory=dict)
    by_class: Mapping[str, ClassScores] = field(default_factory=dict)

    def __or__(self, other: "Floors") -> "Floors":
        return Floors({**self.map_at_10, **other.map_at_10}, {**self.by_class, **other.by_class})


def floor(name: str, scores: ClassScores) -> Floors:
    """One floor by its classes."""
    return Floors({name: scores.map_at_10}, {name: scores})


def data_floors(task: RetrievalTask) -> Floors:
    """Those that need no network: ``chance`` and ``pixels``."""
    return floor("chance", chance(task)) | floor("pixels", _scores(pixel_vectors, task))


Features = Callable[[Images, np.ndarray], Tensor]
"""What a backbone gives for those images that have these numbers, float32 [N, D]."""


def backbone_floors(
    spec: EmbedderSpec,
    features: Features,
    task: RetrievalTask,
    train: Images,
    fitted: int = 10_000,
    at_side: int | None = None,
) -> Floors:
    """``frozen``, ``frozen_centred`` and ``frozen_whitened``, if the network begins with trained
    weights.

    Mean and PCA are fitted on the training images; where no two differ there is ``frozen`` alone.

    Args:
        spec: of the network; PCA leaves as many numbers as an embedding has, at most.
        features: of the backbone.
        task: the test.
        train: training images.
        fitted: how many of them are used at most, spread evenly.
        at_side: of the images that ``features`` reads, where it is not that of the run's.

    Raises:
        ConfigError: features that are not finite, or the same for all images of the test.
    """
    if not spec.pretrained:
        return Floors()

    def embed(images: Images, which: np.ndarray | None = None) -> Tensor:
        which = np.arange(len(images)) if which is None else which
        return F.normalize(features(images, which), dim=1)

    embedded = embed(task.query), None if task.gallery is None else embed(task.gallery)
    query_QD, pixels = embedded[0], task.query.pixels
    if not bool(query_QD.isfinite().all()):
        raise ConfigError(OVERFLOW)
    if bool((query_QD == query_QD[:1]).all()) and bool((pixels != pixels[:1]).any()):
        raise ConfigError(
            "the weights give the same features for all images of the test: expected weights "
            "that tell images apart, on the scale of pixels that they were trained with "
            "(weights, pixel_mean, pixel_std)"
        )
    at = f"_at_{at_side}" if at_side else ""
    found = floor(f"frozen{at}", score_classes(task, embedded)[1])
    spread = np.unique(np.linspace(0, len(train) - 1, min(len(train), fitted)).astype(np.int64))
    fitted_ND = embed(train, spread)
    if not bool(fitted_ND.isfinite().all()):
        raise ConfigError(OVERFLOW)
    whiten = fit_whitening(fitted_ND, spec.embedding_size)
    if not whiten(fitted_ND[:1]).shape[1]:
        return found
    mean_D = fitted_ND.double().mean(0)
    changes = {"centred": lambda rows_ND: (rows_ND.double() - mean_D).float(), "whitened": whiten}
    for name, change in changes.items():
        query_QD, gallery_GD = embedded
        changed = change(query_QD), None if gallery_GD is None else change(gallery_GD)
        found |= floor(f"frozen_{name}{at}", score_classes(task, changed)[1])
    return found


def expected_precision(relevant_C: np.ndarray, candidates: int) -> np.ndarray:
    """The mean of AP@10 over all orders of the gallery, of queries with R relevant items, exactly.

    With M candidates, R of them relevant, rank i is relevant with probability R/M, and ranks i and
    j < i both with R(R-1) / (M(M-1)). P(i) rel(i) = (1/i) (rel(i) + sum_{j<i} rel(i) rel(j)), so

        E[AP@10] = 1/min(R, 10) * sum_{i<=min(10, M)} (1/i) (R/M + (i-1) R(R-1) / (M(M-1)))
    """
    rank_K = np.arange(1, min(_DEPTH, candidates) + 1)
    relevant_C1 = np.asarray(relevant_C, np.float64)[:, None]
    one_C1 = relevant_C1 / candidates
    both_C1 = one_C1 * (relevant_C1 - 1) / max(candidates - 1, 1)
    sums_C = ((one_C1 + (rank_K - 1) * both_C1) / rank_K).sum(1)
    return np.asarray(sums_C / np.minimum(relevant_C, _DEPTH))


def chance(task: RetrievalTask) -> ClassScores:
    """What a random ranking gives on average."""
    gallery, alone = task.gallery or task.query, task.gallery is None
    queries, held = count_classes(task.query), count_classes(gallery)
    relevant_C = np.array([held[name] for name in queries]) - alone
    expected_C = expected_precision(relevant_C, len(gallery) - alone)
    return ClassScores(tuple(queries), np.array([*queries.values()]), expected_C)


def pixel_vectors(pixels_NCHW: np.ndarray) -> Tensor:
    """Images averaged down to 12 x 12 (smaller ones stay as they are), less their own mean: float32
    [N, C * side * side].
    """
    channels, side = pixels_NCHW.shape[1], min(SIDE, pixels_NCHW.shape[2])
    vectors_ND = torch.empty(len(pixels_NCHW), channels * side * side)
    for first in range(0, len(pixels_NCHW), _BATCH):
        block = torch.from_numpy(np.array(pixels_NCHW[first : first + _BATCH]))
        small = F.adaptive_avg_pool2d(block.float() / 255, side)
        small -= small.mean((1, 2, 3), keepdim=True)
        vectors_ND[first : first + len(block)] = small.flatten(1)
    return vectors_ND


def fit_whitening(rows_ND: Tensor, size: int) -> Callable[[Tensor], Tensor]:
    """PCA-whitening: less the mean, on the leading components, each divided by its deviation.

    Jegou and Chum 2012 (ECCV, "Negative evidences and co-occurences in image retrieval"): of
    vectors of length 1, and cosines afterwards. A function from [M, D] to [M, size]; fewer where so
    many do not vary, none where no two rows differ.
    """
    rows_ND = rows_ND.double()
    mean_D = rows_ND.mean(0)
    axes_DK = whitening_axes(rows_ND.T @ rows_ND / len(rows_ND), mean_D, size)
    axes_DK *= math.sqrt(max(len(rows_ND) - 1, 1) / len(rows_ND))  # of a sample
    return lambda rows_MD: ((rows_MD.double() - mean_D) @ axes_DK).float()


def _scores(embed: EmbedPixels, task: RetrievalTask) -> ClassScores:
    return score_classes(task, embed_task(embed, task))[1]


OVERFLOW = (
    "the weights overflow: what the trained backbone gives for images is not finite; expected "
    "weights that fit it and its scale of pixels (weights, pixel_mean, pixel_std)"
)
