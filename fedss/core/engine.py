"""What trains the clients of a cohort, as :func:`fedss.core.algorithm.run_round` sees it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from fedss.core.client import ClientUpdate, RoundPlan
from fedss.core.features import FeatureSums
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


class FeatureEngine(Protocol):
    """What an engine does before the first round, where features are whitened
    (:class:`fedss.models.Whitening`)."""

    def num_clients(self, round: int) -> int:
        """As :meth:`Engine.num_clients`."""

    def feature_sums(
        self, backbone_P: Tensor, clients: Sequence[int], by_class: bool
    ) -> Sequence[FeatureSums]:
        """What these clients tell of their features, in their order and at all ranks; who does not
        answer is left out.
        """

    def whiten(self, mean_F: Tensor, axes_FK: Tensor) -> None:
        """Whiten features with these statistics from now on, wherever clients are."""
