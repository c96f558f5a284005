"""Average query expansion: a query is moved towards what it finds first.

Shape suffixes: Q queries, G gallery items, K neighbours, D embedding size.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from fedss.evaluation.retrieval import nearest

SAME = 1 - 1e-5
"""Least cosine of two embeddings of one image, with room for rounding."""


def expand_queries(query_QD: Tensor, gallery_GD: Tensor, count: int) -> Tensor:
    """``q' = q + sum_k cos(q, x_k) x_k`` over the first ``count`` images found, scaled to length 1:
    float32 [Q, D] (Chum et al. 2007, ICCV, "Total recall"; weights as by Radenovic et al. 2019,
    arXiv 1711.02512, with an exponent of 1).

    A query that is in the gallery does not count as found, nor do those of a negative cosine.

    >>> gallery = torch.tensor([[0.6, 0.8], [0.0, 1.0], [-1.0, 0.0]])
    >>> expand_queries(torch.tensor([[1.0, 0.0]]), gallery, 1)
    tensor([[0.9430, 0.3328]])
    """
    query_QD = F.normalize(query_QD.float(), dim=1)
    score_QK, place_QK = nearest(query_QD, gallery_GD, min(count + 1, len(gallery_GD)))
    score_QK = torch.where(score_QK < SAME, score_QK, 0.0).clamp_min(0).float()
    # One more than wanted was looked for, in case one was the query itself.
    wanted_QK = (score_QK > 0) & ((score_QK > 0).cumsum(1) <= count)
    found_QKD = F.normalize(gallery_GD[place_QK].float(), dim=2)
    moved_QD = ((score_QK * wanted_QK)[:, :, None] * found_QKD).sum(1)
    return F.normalize(query_QD + moved_QD, dim=1)
