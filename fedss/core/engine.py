"""What trains the clients of a cohort, as :func:`fedss.core.algorithm.run_round` sees it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fedss.core.client import ClientUpdate, RoundPlan
from fedss.core.state import ServerState
from fedss.distributed import Ranks


@dataclass(frozen=True)
class Failure:
    """A client of a cohort without an update that could be used.

    ``reason`` is a word to count by; ``detail`` says what came.
    """

    client: int
    reason: str
    detail: str = ""


class Engine(Protocol):
    """Where clients train. :mod:`fedss.training` drives it, round after round."""

    @property
    def ranks(self) -> Ranks:
        """The processes that a cohort is shared out among."""

    def num_clients(self, round: int) -> int:
        """Number of clients that the cohort of a round (0-based) is drawn from."""

    def train(
        self, state: ServerState, cohort: np.ndarray, plan: RoundPlan
    ) -> Iterator[ClientUpdate | Failure]:
        """Lines 2 to 4 for each client of the cohort that is this rank's, in any order."""
