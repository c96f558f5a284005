"""What the server keeps between rounds."""

from dataclasses import dataclass

from torch import Tensor

from fedss.core.class_rows import ClassRows


@dataclass(frozen=True)
class ServerState:
    """All that the server keeps between rounds. ``class_rows`` is written in place.

    ``norms`` are the usual ones of the last rounds (:func:`fedss.core.defence.refuse_large`).
    """

    backbone_P: Tensor
    backbone_slots: dict[str, Tensor]
    class_rows: ClassRows
    round: int
    norms: tuple[tuple[float, float], ...] = ()
