"""What the server keeps between rounds."""

from dataclasses import dataclass

from torch import Tensor

from fedss.core.class_rows import ClassRows

Norms = tuple[tuple[float, float], tuple[float, float]]
"""Median and spread of the norms of a round's updates, in backbone and in class rows; a median of 0
where it is not known."""


@dataclass(frozen=True)
class ServerState:
    """All that the server keeps between rounds. ``class_rows`` is written in place.

    ``norms`` are the usual ones of the last rounds (:func:`fedss.core.defence.refuse_large`).
    ``clip`` is the largest norm of an update in the next round, where there is one.
    """

    backbone_P: Tensor
    backbone_slots: dict[str, Tensor]
    class_rows: ClassRows
    round: int
    norms: tuple[Norms, ...] = ()
    clip: float | None = None
