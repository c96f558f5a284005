"""Moments: the softmax without negatives.

The server sends every client the mean and covariance of all class rows. The client takes the rows
that it holds out of them and trains on :func:`fedss.losses.softmax.moments_softmax`; it returns the
changes of its own rows and nothing else. The server keeps ``sum_j w_j`` and ``sum_j w_j w_j'`` up
to date from the rows that a round touches, so neither time nor bytes of a round grow with n.
(Ours; ``docs/methods.md`` has what came before.)

Shape suffixes: S held classes, U touched classes, D embedding size, E = D + 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedss.losses.softmax import AbsentClasses


@dataclass(frozen=True)
class Moments:
    """Mean float32 [D] and covariance float32 [D, D] of all n class rows."""

    mean_D: Tensor
    covariance_DD: Tensor


def absent_classes(moments: Moments, num_classes: int, rows_SD: Tensor) -> AbsentClasses | None:
    """The moments of the classes that a client does not hold; None if it holds all.

    ``mu' = (n mu - sum_S w) / (n - |S|)`` and likewise for second moments, with the rows held as
    received: exact. Cost O(S D^2).
    """
    count = num_classes - len(rows_SD)
    if count == 0:
        return None
    mean_D, rows_SD = moments.mean_D.double(), rows_SD.double()
    second_DD = moments.covariance_DD.double() + torch.outer(mean_D, mean_D)
    mean_D = (num_classes * mean_D - rows_SD.sum(dim=0)) / count
    second_DD = (num_classes * second_DD - rows_SD.T @ rows_SD) / count
    covariance_DD = second_DD - torch.outer(mean_D, mean_D)
    return AbsentClasses(count, mean_D.float(), covariance_DD.float())


def row_sums(rows_SD: Tensor) -> Tensor:
    """``sum_j (w_j, 1) (w_j, 1)'``: number, sum and second moments of rows, float64 [E, E]."""
    rows_SE = torch.cat([rows_SD.double(), torch.ones(len(rows_SD), 1)], dim=1)
    return rows_SE.T @ rows_SE


def moments_of(sums_EE: Tensor) -> Moments:
    """Mean and covariance of the rows that were summed up by :func:`row_sums`. O(D^2)."""
    mean_D = sums_EE[:-1, -1] / sums_EE[-1, -1]
    second_DD = sums_EE[:-1, :-1] / sums_EE[-1, -1]
    return Moments(mean_D.float(), (second_DD - torch.outer(mean_D, mean_D)).float())


def payload(sums_EE: Tensor) -> dict[str, Tensor]:
    """What all clients of the method get beside the backbone, made of :func:`row_sums`."""
    moments = moments_of(sums_EE)
    return {"mean": moments.mean_D, "covariance": moments.covariance_DD}


def absent_from(
    payload: Mapping[str, Tensor], num_classes: int, rows_SD: Tensor
) -> AbsentClasses | None:
    """:func:`absent_classes`, of a :func:`payload`."""
    moments = Moments(payload["mean"], payload["covariance"])
    return absent_classes(moments, num_classes, rows_SD)


def balance(rows_UD: Tensor, absent: float, num_classes: int) -> Tensor:
    """Row steps less what they have in common, and shorter where many move.

    With logits ``s w'h`` the gradients of a full softmax with respect to all rows,
    ``s sum_b (p_bi - y_bi) h_b`` for row i, sum up to zero, since p_b and y_b both sum up to 1;
    with cosines nearly. Rows move against each other. Where absent rows stay, their part is
    missing, and rows are all drawn to the mean embedding. So touched rows give it back, when moved:

        ``step_i = (mean_i - absent / (U + 1) sum_j mean_j) / (1 + absent U / n)``

    Three heuristics: ``absent``, so that nothing changes where all rows are held; 1 added to U, so
    that a row that comes alone still moves; and steps that are shorter the larger a part of W a
    round moves, since each row then moves more often.
    (Ours; ``benchmarks/regimes.py`` measures it.) ``rows_UD`` are the mean changes of the touched
    rows, ``absent`` is the share of all rows that a client does not hold.
    """
    drift_D = absent * rows_UD.sum(dim=0) / (len(rows_UD) + 1)
    return (rows_UD - drift_D) / (1 + absent * len(rows_UD) / num_classes)
