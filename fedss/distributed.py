"""Ranks: processes that train one model together, started by torchrun on one host or several.

Every rank runs the same program on the same server state. Each trains a part of a round's cohort,
the sums over clients are reduced over the ranks, and every rank takes the same server step. Only
the first rank writes and logs. Sums on the CPU are reduced by gloo, those on a GPU by nccl.
"""

import atexit
import heapq
import logging
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from fedss.errors import ConfigError, FedssError, LostRankError, RankError
from fedss.text import printable

# Every command asks which rank it is, also those that end before torch is needed.
if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
_LOG = logging.getLogger("fedss.distributed")

# A rank may decode images or evaluate while the others wait.
_TIMEOUT = timedelta(hours=1)


@dataclass(frozen=True)
class Ranks:
    """This process: ``rank`` of ``size`` in all, ``local_rank`` of ``local_size`` on its host."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and logs."""
        return self.rank == 0

    @property
    def cores(self) -> int:
        """Threads that this rank may use: its share of the host's cores, as torchrun sets torch's
        own number to one."""
        if self.size == 1:
            import torch

            return torch.get_num_threads()
        usable = getattr(os, "sched_getaffinity", None)
        cores = len(usable(0)) if usable else os.cpu_count() or 1
        return max(1, cores // self.local_size)

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, by rank, at each of them; pickled on the way.

        Raises:
            RankError: another rank has left :func:`join` by an error, or is gone.
        """
        return [value] if self.size == 1 else self._meet(value)

    def add_up(self, sums: "Tensor") -> "Tensor":
        """Sum over the ranks, in place: the same bits at every one. Raises as :meth:`gather`."""
        if self.size > 1:
            import torch.distributed as dist

            self._meet(None)
            with _unless_lost():
                dist.all_reduce(sums)
        return sums

    def _meet(self, value: Any, failed: str | None = None) -> list[Any]:
        import torch.distributed as dist

        # All collective calls start with this, so that every rank hears of a failure.
        messages: list[Any] = [None] * self.size
        with _unless_lost():
            dist.all_gather_object(messages, (value, failed))
        for rank, (_, message) in enumerate(messages):
            if message is not None:
                raise RankError(f"rank {rank}: {printable(message)}")
        return [value for value, _ in messages]


ALONE = Ranks()


def this_rank() -> Ranks:
    """This process by torchrun's environment; :data:`ALONE` without it.

    Raises:
        ConfigError: the environment cannot be.
    """
    names = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    values = {name: os.environ.get(name, default) for name, default in names.items()}
    if values["WORLD_SIZE"] == "1":
        return ALONE
    if all(value.isdecimal() for value in values.values()):
        ranks = Ranks(*map(int, values.values()))
        if ranks.rank < ranks.size and ranks.local_rank < ranks.local_size <= ranks.size:
            return ranks
    raise ConfigError(
        f"expected RANK below WORLD_SIZE and LOCAL_RANK below LOCAL_WORLD_SIZE, got {values}: "
        "start the command with torchrun, which sets them, or unset them all"
    )


_joined: list[Ranks] = []


@contextmanager
def join() -> Iterator[Ranks]:
    """Train together with the other ranks, for a ``with`` block that ends well at all or at none.

    An error that ends the block at one rank ends it at all, elsewhere as a :class:`RankError`. A
    rank that is gone, and SIGTERM, by which torchrun then ends the others, become a
    :class:`LostRankError`. Inside another such block, nothing happens.

    Raises:
        ConfigError: torchrun's environment is incomplete, or ranks are missing.
    """
    ranks = this_rank()
    if ranks.size == 1 or _joined:
        yield ranks
        return
    import torch.distributed as dist

    if not dist.is_initialized():
        _find_each_other(ranks)
    _joined.append(ranks)
    try:
        yield ranks
        ranks.gather(None)
    except (Exception, SystemExit) as error:
        if not isinstance(error, RankError):
            kind = "" if isinstance(error, FedssError) else f"{type(error).__name__}: "
            with suppress(RankError):
                ranks._meet(None, f"{kind}{error}")
        raise
    finally:
        _joined.clear()


def _find_each_other(ranks: Ranks) -> None:
    import torch
    import torch.distributed as dist

    if ranks.first:
        place = ":".join(os.environ.get(f"MASTER_{name}", "?") for name in ("ADDR", "PORT"))
        _LOG.info("%d ranks meet at %s", ranks.size, place)
    try:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=_TIMEOUT)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"WORLD_SIZE is {ranks.size}, but these ranks do not meet ({error}): start the command "
            "with torchrun, all ranks at once, or unset WORLD_SIZE"
        ) from error
    # Its threads must end before the interpreter does, or one of them may abort the process.
    atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
    # A program may have a handler of its own, and only the main thread can set one.
    main = threading.current_thread() is threading.main_thread()
    if main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _end)


def _end(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_IGN)
    raise _lost("told to end (SIGTERM), as torchrun does when another rank ended")


@contextmanager
def _unless_lost() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        import torch.distributed as dist

        dist.destroy_process_group()  # so that no other waits for this one
        raise _lost("another rank ended or does not answer") from error


def _lost(cause: str) -> LostRankError:
    ranks = this_rank()
    return LostRankError(
        f"rank {ranks.rank} of {ranks.size}: {cause}; start the same command again, with any "
        "number of ranks: it goes on from the last checkpoint, if there is one"
    )


def share_out(weights: Sequence[int], size: int) -> list[list[int]]:
    """Positions for each of ``size`` ranks, sorted, with nearly equal sums of weights.

    The heaviest goes first, always to the rank with the least so far (Graham 1969: at most
    ``4/3 - 1/(3 size)`` times the smallest possible largest sum). O(K log K).
    """
    shares: list[list[int]] = [[] for _ in range(size)]
    loads = [(0, rank) for rank in range(size)]
    for position in sorted(range(len(weights)), key=lambda i: (-weights[i], i)):
        load, rank = loads[0]
        heapq.heapreplace(loads, (load + weights[position], rank))
        shares[rank].append(position)
    return [sorted(share) for share in shares]
