"""Embeddings and labels of queries and gallery, checked.

Shape suffixes: Q queries, G gallery items, D embedding size, N rows of either side.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_GRID = 2.0**24
_FAR, _BACK = 400, 600  # exponents of 2: float64 goes from -1074 to 1024, and squares need half


@dataclass(frozen=True)
class Sides:
    """Queries and gallery: unit rows (see `unit_rows`), and int64 labels on the same device.

    `alone`: there is no gallery; the queries are searched among themselves.
    """

    query_QD: Tensor
    labels_Q: Tensor
    gallery_GD: Tensor
    labels_G: Tensor
    alone: bool


def labelled_sides(
    query_QD: Tensor,
    query_labels_Q: Tensor,
    gallery_GD: Tensor | None,
    gallery_labels_G: Tensor | None,
) -> Sides:
    """Both sides with labels, checked and normalized."""
    if (gallery_GD is None) != (gallery_labels_G is None):
        raise ValueError("give gallery embeddings and gallery labels together, or neither")
    unit_QD, unit_GD = both_sides(query_QD, gallery_GD)
    labels_Q = labels_G = _checked_labels(query_labels_Q, unit_QD, "query")
    if gallery_labels_G is not None:
        labels_G = _checked_labels(gallery_labels_G, unit_GD, "gallery")
    return Sides(unit_QD, labels_Q, unit_GD, labels_G, alone=gallery_GD is None)


def both_sides(query_QD: Tensor, gallery_GD: Tensor | None) -> tuple[Tensor, Tensor]:
    """Queries and gallery checked and normalized; one tensor twice if there is no gallery."""
    unit_QD = unit_rows(query_QD, "query")
    if gallery_GD is None:
        if len(unit_QD) < 2:
            raise ValueError("one query without a gallery has nothing to be compared with")
        return unit_QD, unit_QD
    unit_GD = unit_rows(gallery_GD, "gallery")
    if unit_QD.shape[1] != unit_GD.shape[1]:
        raise ValueError(
            f"queries have {unit_QD.shape[1]} dimensions and gallery items {unit_GD.shape[1]}: "
            "embed both with the same model"
        )
    return unit_QD, unit_GD


def unit_rows(rows_ND: Tensor, side: str) -> Tensor:
    """Rows of length 1 in whole multiples of 2^-24, float32 without loss; zero rows stay zero."""
    if rows_ND.ndim != 2 or rows_ND.numel() == 0:
        raise ValueError(
            f"{side} embeddings must be [rows, dimensions] with at least one of each, "
            f"not {list(rows_ND.shape)}"
        )
    if not rows_ND.is_floating_point():
        raise ValueError(f"{side} embeddings must be floating point, not {rows_ND.dtype}")
    rows_ND = rows_ND.detach()
    if rows_ND.device.type == "mps":
        rows_ND = rows_ND.cpu()
    rows_ND = rows_ND.to(torch.float64, copy=True)
    # Squares of numbers far from 1 leave float64. A power of two rounds nothing.
    most_N1 = torch.linalg.vector_norm(rows_ND, ord=torch.inf, dim=1, keepdim=True)
    small_N1, large_N1 = (most_N1 > 0) & (most_N1 < 2.0**-_FAR), most_N1 > 2.0**_FAR
    if bool((small_N1 | large_N1).any()):
        near_N1 = torch.ones_like(most_N1).masked_fill_(small_N1, 2.0**_BACK)
        rows_ND.mul_(near_N1.masked_fill_(large_N1, 2.0**-_BACK))
    norms_N1 = torch.linalg.vector_norm(rows_ND, dim=1, keepdim=True)
    if not bool(norms_N1.isfinite().all()):
        first = int((~norms_N1.squeeze(1).isfinite()).nonzero()[0])
        raise ValueError(f"{side} embedding {first} holds NaN or infinite values: did it diverge?")
    norms_N1[norms_N1 == 0] = 1.0
    return rows_ND.div_(norms_N1).mul_(_GRID).round_().div_(_GRID).float()


def _checked_labels(labels_N: Tensor, rows_ND: Tensor, side: str) -> Tensor:
    """Labels as int64 where their rows are."""
    if labels_N.shape != rows_ND.shape[:1]:
        raise ValueError(
            f"{side} labels must be one per row, [{len(rows_ND)}], not {list(labels_N.shape)}"
        )
    if labels_N.is_floating_point() or labels_N.is_complex() or labels_N.dtype == torch.bool:
        raise ValueError(f"{side} labels must be integers, not {labels_N.dtype}")
    return labels_N.to(rows_ND.device, torch.int64)
