"""Which classes are taken for each other: queries of one whose nearest image is of the other."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fedss.evaluation.retrieval import nearest


@dataclass(frozen=True)
class Confusion:
    """Two classes, and how often the one is taken for the other.

    Of the first of ``classes``, two labels, the larger share of queries goes to the other. Of the
    ``queries`` of each, so many are ``confused``: their nearest image is of the other class. The
    ``query`` of either whose wrong nearest image is nearest of all, that image, ``neighbour``, a
    position in the gallery, and their cosine, ``score``, are an example.
    """

    classes: tuple[int, int]
    confused: tuple[int, int]
    queries: tuple[int, int]
    query: int
    neighbour: int
    score: float


def hardest_confusions(
    query_QD: Tensor,
    query_labels_Q: Tensor,
    gallery_GD: Tensor | None = None,
    gallery_labels_G: Tensor | None = None,
    most: int = 10,
) -> list[Confusion]:
    """The pairs of classes that are most often confused, the hardest first.

    A pair's order is by the lower end of Wilson's 95 % interval (Wilson 1927) of the share of both
    classes' queries that are confused: 1 of 4 says less than 9 of 40. Only queries with something
    to find count; arguments and errors as in
    :func:`fedss.evaluation.retrieval.evaluate_retrieval`.
    """
    score_Q1, nearest_Q1 = nearest(query_QD, gallery_GD, k=1)
    score_Q, nearest_Q = (first_Q1[:, 0].cpu().numpy() for first_Q1 in (score_Q1, nearest_Q1))
    own_Q = query_labels_Q.cpu().numpy()
    labels_G = own_Q if gallery_labels_G is None else gallery_labels_G.cpu().numpy()
    labels_C, counts_C = np.unique(labels_G, return_counts=True)
    findable = labels_C[counts_C > 1] if gallery_labels_G is None else labels_C
    used_Q = np.isin(own_Q, findable)
    predicted_Q = labels_G[nearest_Q]
    queries = Counter(own_Q[used_Q].tolist())
    wrong = np.flatnonzero(used_Q & (predicted_Q != own_Q))
    ways = Counter(zip(own_Q[wrong].tolist(), predicted_Q[wrong].tolist(), strict=True))
    example: dict[tuple[int, int], int] = {}
    for q in wrong[np.argsort(-score_Q[wrong], kind="stable")].tolist():
        a, b = int(own_Q[q]), int(predicted_Q[q])
        example.setdefault((min(a, b), max(a, b)), q)
    made = []
    for (a, b), q in example.items():
        share_a, share_b = ways[a, b] / max(queries[a], 1), ways[b, a] / max(queries[b], 1)
        first, second = (a, b) if share_a >= share_b else (b, a)
        made.append(
            Confusion(
                (first, second),
                (ways[first, second], ways[second, first]),
                (queries[first], queries[second]),
                q,
                int(nearest_Q[q]),
                float(score_Q[q]),
            )
        )
    return sorted(made, key=lambda c: (-_lower(c.confused, c.queries), c.classes))[:most]


def _lower(confused: Sequence[int], queries: Sequence[int]) -> float:
    """The lower end of Wilson's 95 % interval of confused / queries."""
    n, z = sum(queries), 1.959964
    share = sum(confused) / n
    middle = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n)
