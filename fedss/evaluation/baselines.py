"""Floors: what a test gives for nothing, against which a trained model is judged.

``chance`` is a random ranking, ``pixels`` the images themselves, ``untrained`` the network before
its first round. Where it begins with trained weights, ``frozen`` is what its backbone gives as it
comes, without the projection, which is random, ``frozen_centred`` the same less the mean of the
training images, and ``frozen_whitened`` after PCA.

Shape suffixes: N images, C classes (of scores) or channels (of pixels), D numbers per image.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedss.data import Images, RetrievalTask
from fedss.errors import ConfigError
from fedss.evaluation.intervals import ClassScores
from fedss.evaluation.task import EmbedPixels, count_classes, embed_task, score_classes
from fedss.models import Embedder, embed_pixels

# Of 6 to 16 pixels a side, with and without their mean, what stays within 7 % of the best on each
# of glyphs, Omniglot, photographs and Chinese characters.
SIDE = 12

_BATCH = 4096  # images reduced at a time
_FITTED = 10_000  # training images that whitening is fitted on
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


def backbone_floors(
    embedder: Embedder, task: RetrievalTask, train: Images, device: torch.device
) -> Floors:
    """``frozen``, ``frozen_centred`` and ``frozen_whitened``, if the network begins with trained
    weights.

    Mean and PCA are fitted on the training images, up to 10,000 of them spread evenly; where no two
    differ there is ``frozen`` alone.

    Raises:
        ConfigError: features that are not finite, or the same for all images of the test.
    """
    if not embedder.spec.pretrained:
        return Floors()
    embed = partial(embed_pixels, _features(embedder).to(device))
    embedded = embed_task(embed, task)
    query_QD, pixels = embedded[0], task.query.pixels
    if not bool(query_QD.isfinite().all()):
        raise ConfigError(_OVERFLOW)
    if bool((query_QD == query_QD[:1]).all()) and bool((pixels != pixels[:1]).any()):
        raise ConfigError(
            "the weights give the same features for all images of the test: expected weights "
            "that tell images apart, on the scale of pixels that they were trained with "
            "(weights, pixel_mean, pixel_std)"
        )
    found = floor("frozen", score_classes(task, embedded)[1])
    spread = np.unique(np.linspace(0, len(train) - 1, min(len(train), _FITTED)).astype(np.int64))
    fitted_ND = embed(train.pixels[spread])
    if not bool(fitted_ND.isfinite().all()):
        raise ConfigError(_OVERFLOW)
    whiten = fit_whitening(fitted_ND, embedder.spec.embedding_size)
    if not whiten(fitted_ND[:1]).shape[1]:
        return found
    mean_D = fitted_ND.double().mean(0)
    changes = {"centred": lambda rows_ND: (rows_ND.double() - mean_D).float(), "whitened": whiten}
    for name, change in changes.items():
        query_QD, gallery_GD = embedded
        changed = change(query_QD), None if gallery_GD is None else change(gallery_GD)
        found |= floor(f"frozen_{name}", score_classes(task, changed)[1])
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
    mean_D = rows_ND.double().mean(0)
    centred_ND = rows_ND.double() - mean_D
    variance_D, axes_DD = torch.linalg.eigh(centred_ND.T @ centred_ND / max(len(rows_ND) - 1, 1))
    kept = variance_D.flip(0)[:size]
    # Below the second bound, rounding of float32 alone varies.
    squares = rows_ND.double().square().sum(1).mean()
    kept = kept[(kept > 1e-9 * kept[0]) & (kept > 1e-12 * squares)]
    whitening_DK = axes_DD.flip(1)[:, : len(kept)] / kept.sqrt()
    return lambda rows_MD: ((rows_MD.double() - mean_D) @ whitening_DK).float()


def _scores(embed: EmbedPixels, task: RetrievalTask) -> ClassScores:
    return score_classes(task, embed_task(embed, task))[1]


_OVERFLOW = (
    "the weights overflow: what the trained backbone gives for images is not finite; expected "
    "weights that fit it and its scale of pixels (weights, pixel_mean, pixel_std)"
)


def _features(embedder: Embedder) -> Embedder:
    """The backbone alone, as an embedder: what it gives, scaled to length 1."""
    spec = embedder.spec
    probe = torch.zeros(1, spec.channels, spec.image_size, spec.image_size)
    with torch.no_grad():
        size = embedder.backbone(probe.to(embedder.mean.device)).shape[1]
    return Embedder(
        copy.deepcopy(embedder.backbone),
        nn.Identity(),
        mean=embedder.mean.tolist(),
        std=embedder.std.tolist(),
        spec=replace(spec, embedding_size=size),
        channels_last=embedder.channels_last,
    )
