"""Errors that a user can mend; the command line prints each and exits with 2."""

from collections.abc import Sequence
from typing import Any


class FedssError(Exception):
    """A mistake a user can mend: says what was expected, what came, where, and what to do."""


class ConfigError(FedssError, ValueError):
    """A setting that cannot be: unknown name, wrong range, two settings that exclude each other."""


class DataError(FedssError, ValueError):
    """Images or a manifest that cannot be read or do not fit together."""


class RunFolderError(FedssError, RuntimeError):
    """A run folder that belongs to another configuration, is damaged, or cannot be written."""


class DivergedError(FedssError, ArithmeticError):
    """A loss, an update or the server's weights became NaN or infinite.

    ``client`` is the client whose update it was, None for the server's own step.
    """

    def __init__(self, message: str, client: int | None = None) -> None:
        super().__init__(message)
        self.client = client


class RankError(FedssError):
    """Another process of the same run has failed, and its message is this one's."""


class LostRankError(RankError):
    """Another process of the same run has ended without a message, or this one got SIGTERM."""


class QuorumError(FedssError):
    """Too few clients of a round gave an update that could be used.

    ``failures`` says of each of the others why (:class:`fedss.core.algorithm.Failure`).
    """

    def __init__(self, message: str, failures: Sequence[Any] = ()) -> None:
        super().__init__(message)
        self.failures = failures
