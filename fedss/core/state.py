"""What the server keeps between rounds."""

from dataclasses import dataclass

from torch import Tensor

from fedss.core.class_rows import ClassRows


@dataclass(frozen=True)
class ServerState:
    """All that the server keeps between rounds. ``class_rows`` is written in place.

    ``clip`` is the largest norm of an update in the next round, where there is one.
    """

    backbone_P: Tensor
    backbone_slots: dict[str, Tensor]
    class_rows: ClassRows
    round: int
    clip: float | None = None
