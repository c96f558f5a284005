"""Class sampling by random Fourier features: near classes are drawn more often, in O(log n).

Rawat et al. 2019 (arXiv 1907.10747) draw class i with a probability that follows a random-feature
estimate of the Gaussian kernel between a query and class row i. The estimate is linear in the
class's features, so a tree of feature sums finds a class without looking at all of them (Blanc
and Rendle 2018, arXiv 1712.00527). Here the tree is at the server, and the query is the mean over
the client's own class rows.

Shape suffixes: N all classes (n), D embedding size (d), F frequencies, V nodes of the tree,
P query rows, U some classes, M drawn classes, K some blocks, B classes of a block.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

# Measured for logits 10 cos, d = 64 and 32 draws, as the variance of the estimate of log Z against
# uniform draws. n = 1000: 0.1 to 0.7 of it where classes come in clusters, 0.9 to 1 of it where
# they do not. n = 20,000: 0.7 with one query row, 1 with ten, whose mean is too blunt. Larger
# bandwidths need many more features: where the kernel is below the error of its estimate, classes
# that matter may get no share but the uniform one.
BANDWIDTH = 4.0
NUM_FEATURES = 128
UNIFORM_SHARE = 0.2
BLOCK = 32


@dataclass(frozen=True)
class RffIndex:
    """A copy of the class rows, and the tree of their feature sums. Written in place.

    The tree is a heap: root 1, children of v at 2v and 2v + 1, and at ``size + b`` the sum over
    block b, which is classes ``32 b`` to ``32 b + 31``. Within a block the rows themselves are
    looked at, so features of single classes are not kept (as leaves with many classes save memory
    in Blanc and Rendle 2018, figure 1c). In all
    ``4 (n d + 4 size F + F d)`` bytes, where size is the least power of two not below ``n / 32``:
    for n = 1,000,000, d = 64, F = 128 that is 256 MB of rows and 67 MB of tree. All tensors are
    float32; ``tree_V2F`` is [2 size, 2F], node 0 is not used, and nodes without classes are zero.
    ``bandwidth`` is nu of :func:`features`.
    """

    frequencies_FD: Tensor
    tree_V2F: Tensor
    rows_ND: Tensor
    bandwidth: float

    @property
    def num_classes(self) -> int:
        """Number of classes n."""
        return len(self.rows_ND)

    @property
    def depth(self) -> int:
        """Levels of the tree below its root."""
        return len(self.tree_V2F).bit_length() - 2


def features(frequencies_FD: Tensor, rows_UD: Tensor) -> Tensor:
    """Random Fourier features of the directions of some rows: float32 [U, 2F], of norm 1.

    ``phi(u) = [cos(w_1'u), .., cos(w_F'u), sin(w_1'u), .., sin(w_F'u)] / sqrt(F)``. With
    ``w_j ~ N(0, nu I)``, ``phi(x)'phi(y)`` has mean ``exp(-nu |x - y|^2 / 2)``, for unit vectors
    ``exp(-nu) exp(nu x'y)``: the softmax of logits ``nu cos`` (Rahimi and Recht 2007; Rawat
    et al. 2019).
    """
    angle_UF = F.normalize(rows_UD, dim=1) @ frequencies_FD.T
    return torch.cat([angle_UF.cos(), angle_UF.sin()], dim=1) / math.sqrt(len(frequencies_FD))


def build_index(
    rows_ND: Tensor,
    rng: np.random.Generator,
    num_features: int = NUM_FEATURES,
    bandwidth: float = BANDWIDTH,
) -> RffIndex:
    """The index of all class rows, float32 of any norm, with ``num_features`` frequencies F.

    Rows are copied; nothing but the frequencies is drawn from ``rng``. O(n d F).

    Raises:
        ValueError: no rows, ``num_features < 1``, or ``bandwidth`` not positive.
    """
    if len(rows_ND) < 1 or num_features < 1 or not bandwidth > 0:
        raise ValueError("an index needs class rows, num_features >= 1 and bandwidth > 0")
    num_blocks = -(-len(rows_ND) // BLOCK)
    shape = (num_features, rows_ND.shape[1])
    frequencies = math.sqrt(bandwidth) * rng.standard_normal(shape, dtype=np.float32)
    tree_V2F = torch.zeros(2 << (num_blocks - 1).bit_length(), 2 * num_features)
    rows_ND = rows_ND.detach().float().clone()
    index = RffIndex(torch.from_numpy(frequencies), tree_V2F, rows_ND, bandwidth)
    _sum_up_(index, np.arange(num_blocks))
    return index


def update_index_(index: RffIndex, ids_U: Tensor, rows_UD: Tensor) -> None:
    """Replaces the rows of some classes, by their unique ids, in O(U F (d + log n)).

    Afterwards the index is, bit for bit, what :func:`build_index` makes of all rows with the same
    frequencies: a run that stops and builds it again goes on exactly.

    Raises:
        ValueError: an id is not a class.
    """
    _check_ids(index, ids_U.numpy())
    index.rows_ND[ids_U] = rows_UD.detach().float()
    _sum_up_(index, np.unique(ids_U.numpy() // BLOCK))


def draw(
    index: RffIndex, query_rows_PD: Tensor, num_draws: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The distinct classes of ``num_draws`` independent draws, and how likely each was to be drawn.

    Class i is among them with ``pi_i = 1 - (1 - p_i)^num_draws``, ``p_i`` as stated at
    :func:`class_probability`. So for any values e, the sum of ``e_i / pi_i`` over those of the
    returned classes that are in a set has the sum of e over the set as its mean (Horvitz and
    Thompson 1952), as with the set of all classes that are not own. (Ours. The paper keeps repeated
    draws, each with weight ``1 / (num_draws p_i)``; a class row is sent but once.)

    O(num_draws (F log n + 32 P d)) time, whatever n is.

    Returns:
        int64 [M], sorted class ids, ``1 <= M <= num_draws``; float64 [M], ``pi_i``.

    Raises:
        ValueError: no query rows, or ``num_draws < 1``.
    """
    if num_draws < 1:
        raise ValueError(f"num_draws must be at least 1, not {num_draws}")
    query_2F, unit_PD = _query(index, query_rows_PD)
    num_uniform = rng.binomial(num_draws, UNIFORM_SHARE)
    uniform = rng.integers(index.num_classes, size=num_uniform)
    node = np.ones(num_draws - num_uniform, dtype=np.int64)
    for level in range(index.depth):
        left = _left_probability(index, query_2F, node, level)
        node = 2 * node + (rng.random(len(node)) >= left)
    block = node - (1 << index.depth)
    block_K, position = np.unique(block, return_inverse=True)
    cdf_KB = _within_blocks(index, unit_PD, block_K).cumsum(axis=1)
    # Divided by its last entry it ends at exactly 1, so that no place after the last is hit.
    cdf = (cdf_KB / cdf_KB[:, -1:])[position]
    place = (rng.random((len(block), 1)) >= cdf).sum(axis=1)
    ids_M = np.unique(np.concatenate([uniform, block * BLOCK + place]))
    return ids_M, 1 - (1 - class_probability(index, query_rows_PD, ids_M)) ** num_draws


def class_probability(index: RffIndex, query_rows_PD: Tensor, ids: np.ndarray) -> np.ndarray:
    """The probability of each class in a single draw of :func:`draw`: float64, one for each id.

    ``p_i = a / n + (1 - a) t_i`` with a = ``UNIFORM_SHARE``. ``t_i`` is the product of the shares
    on the way down to class i. Where the tree parts, a child's share is proportional to
    ``max(0, f'z)``, f the mean features of the query rows and z the child's feature sum; if both
    are 0, to its number of classes. Within a block, a class's share is proportional to the mean
    over the query rows of the kernel itself, ``exp(nu (cos - 1))`` (ours: no more work than the
    features, and less variance, as a single class's estimate is mostly error).

    Without errors ``t_i`` is proportional to the mean of the kernel over the query rows. With them,
    where a sum comes out negative, it is 0 for a part of the classes. The uniform part gives all
    ``p_i >= a / n``: with ``p_i = 0`` the sum of :func:`draw` would be biased, and so no class
    weighs more than about 1 / a times what it would in a uniform draw.

    Raises:
        ValueError: no query rows, or an id is not a class.
    """
    query_2F, unit_PD = _query(index, query_rows_PD)
    _check_ids(index, ids)
    block_K, position = np.unique(ids // BLOCK, return_inverse=True)
    reach_K = np.ones(len(block_K))
    for level in range(index.depth):
        node = (block_K + (1 << index.depth)) >> (index.depth - level - 1)
        left = _left_probability(index, query_2F, node // 2, level)
        reach_K *= np.where(node % 2 == 0, left, 1 - left)
    within_KB = _within_blocks(index, unit_PD, block_K)
    tree: np.ndarray = reach_K[position] * within_KB[position, ids % BLOCK]
    return UNIFORM_SHARE / index.num_classes + (1 - UNIFORM_SHARE) * tree


def _check_ids(index: RffIndex, ids: np.ndarray) -> None:
    if len(ids) and not (ids.min() >= 0 and ids.max() < index.num_classes):
        raise ValueError(f"class ids go from 0 to {index.num_classes - 1}")


def _query(index: RffIndex, rows_PD: Tensor) -> tuple[Tensor, Tensor]:
    if len(rows_PD) < 1:
        raise ValueError("at least one query row is needed")
    rows_PD = rows_PD.detach().float()
    query_2F = features(index.frequencies_FD, rows_PD).double().mean(dim=0)
    return query_2F, F.normalize(rows_PD.double(), dim=1)


def _sum_up_(index: RffIndex, block_K: np.ndarray) -> None:
    node = block_K + (1 << index.depth)
    for block, leaf in zip(block_K.tolist(), node.tolist(), strict=True):
        # Always one whole block: how a matrix product rounds can depend on its shape, and a tree
        # that was updated must not differ from a new one.
        rows_UD = index.rows_ND[block * BLOCK : (block + 1) * BLOCK]
        rows_BD = F.pad(rows_UD, (0, 0, 0, BLOCK - len(rows_UD)))
        phi_B2F = features(index.frequencies_FD, rows_BD)
        index.tree_V2F[leaf] = phi_B2F[: len(rows_UD)].sum(dim=0)
    for _ in range(index.depth):
        node = np.unique(node // 2)
        # A sum, not the old value plus a difference, which would leave rounding errors behind.
        index.tree_V2F[node] = index.tree_V2F[2 * node] + index.tree_V2F[2 * node + 1]


def _shares(score: np.ndarray, count: np.ndarray) -> np.ndarray:
    # Parts without classes have score 0 and count 0, and so no share in either case.
    score = score.clip(min=0.0)
    score = np.where(score.sum(axis=1, keepdims=True) > 0, score, count)
    return np.asarray(score / score.sum(axis=1, keepdims=True))


def _left_probability(
    index: RffIndex, query_2F: Tensor, node: np.ndarray, level: int
) -> np.ndarray:
    child = np.stack([2 * node, 2 * node + 1], axis=1)
    span = BLOCK << (index.depth - level - 1)
    count = (index.num_classes - (child - (2 << level)) * span).clip(0, span)
    return _shares((index.tree_V2F[child].double() @ query_2F).numpy(), count)[:, 0]


def _within_blocks(index: RffIndex, unit_PD: Tensor, block_K: np.ndarray) -> np.ndarray:
    ids_KB = block_K[:, None] * BLOCK + np.arange(BLOCK)
    rows_KBD = index.rows_ND[ids_KB.clip(max=index.num_classes - 1)].double()
    cos_KBP = F.normalize(rows_KBD, dim=2) @ unit_PD.T
    score_KB = (index.bandwidth * (cos_KBP - 1)).exp().mean(dim=2).numpy()
    exists_KB = ids_KB < index.num_classes
    return _shares(score_KB * exists_KB, exists_KB)
