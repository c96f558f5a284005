"""What the server keeps between rounds."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fedss.core.class_rows import ClassRows


@dataclass(frozen=True)
class ServerState:
    """All that the server keeps between rounds.

    ``class_rows`` is written in place, and so is ``sampler_index``, what the sampler keeps of them.
    """

    backbone_P: Tensor
    backbone_slots: dict[str, Tensor]
    class_rows: ClassRows
    round: int
    sampler_index: Any = None
