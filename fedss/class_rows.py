"""The class matrix W at the server, read and written by rows.

Shape suffixes: N all classes, D embedding size, S or U some classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fedss.moments import RowHistory


@dataclass(frozen=True)
class ClassRows:
    """W, and what the server optimizer keeps for each row. Written in place, row by row.

    Attributes:
        weight_ND: float32, one class row per class.
        slots: the optimizer's own values per row, e.g. ``{"momentum": [N, D]}``.
        updated_N: int64, number of rounds that were complete when the row was last written.
        history: steps that rounds took on every row, if the method takes such steps.
    """

    weight_ND: Tensor
    slots: Mapping[str, Tensor]
    updated_N: Tensor
    history: RowHistory | None = None

    @property
    def num_classes(self) -> int:
        """Number of classes n."""
        return len(self.weight_ND)


def create_class_rows(
    num_classes: int, embedding_size: int, slots: tuple[str, ...], rng: np.random.Generator
) -> ClassRows:
    """Rows drawn uniformly from the unit sphere; every slot starts at zero.

    Args:
        num_classes: n.
        embedding_size: d.
        slots: names of the values that the server optimizer keeps for each row.
        rng: generator of this draw.
    """
    shape = (num_classes, embedding_size)
    return ClassRows(
        F.normalize(torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)), dim=1),
        {name: torch.zeros(shape) for name in slots},
        torch.zeros(num_classes, dtype=torch.int64),
    )
