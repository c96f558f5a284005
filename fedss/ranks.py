"""Ranks: processes that train one model together, started by torchrun on one host or several.

Every rank runs the same program on the same server state, class rows and all, so each needs the
memory of a whole server. A round is shared out: each rank trains a part of the cohort, the sums
over clients are added up over the ranks, and every rank takes the same server step. Only the first
rank writes and speaks.

Sums are added up where they lie: by gloo on the CPU, by nccl on a GPU. All of fedss's state lies
on the CPU today, so it is gloo that adds up.
"""

import copy
import heapq
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fedss.errors import ConfigError, FedssError, LostRankError

T = TypeVar("T")

# The longest that ranks wait for one of them: pictures are decoded for the first time meanwhile,
# or the first rank evaluates. It also bounds how long a host without power is waited for.
_PATIENCE = timedelta(hours=1)


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together.

    ``rank`` of ``size`` in all, ``local_rank`` of ``local_size`` on this host.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and speaks."""
        return self.rank == 0

    @property
    def cores(self) -> int:
        """How many threads this rank may keep busy: as many as torch would use; where ranks share
        a host, its share of the cores, since torchrun then tells torch to use one thread."""
        if self.size == 1:
            return torch.get_num_threads()
        usable = getattr(os, "sched_getaffinity", None)
        cores = len(usable(0)) if usable else os.cpu_count() or 1
        return max(1, cores // self.local_size)

    def gather(self, value: T) -> list[T]:
        """What each rank gives, by rank, at all of them; pickled.

        Raises:
            FedssError: a rank has left :func:`join` by an error; it is raised at all others too.
            LostRankError: a rank is gone.
        """
        return [value] if self.size == 1 else self._meet(value)

    def add_up(self, sums: Tensor) -> Tensor:
        """Sum over the ranks, in place: the same bits at every one. Raises as :meth:`gather`."""
        if self.size > 1:
            self._meet(None)
            with self._unless_lost():
                dist.all_reduce(sums)
        return sums

    def _meet(self, value: Any, error: FedssError | None = None) -> list[Any]:
        """Every meeting of the ranks starts here, so that an error is heard wherever others are."""
        found: list[Any] = [None] * self.size
        with self._unless_lost():
            dist.all_gather_object(found, (value, error))
        for _, raised in found:
            if raised is not None:
                dist.destroy_process_group()
                raise raised
        return [value for value, _ in found]

    @contextmanager
    def _unless_lost(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            dist.destroy_process_group()
            raise _lost(self, f"another rank ended ({str(error).splitlines()[0]})") from error


ALONE = Ranks()


def this_rank() -> Ranks:
    """What torchrun's environment says of this process; :data:`ALONE` without it."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    rank, size, local_rank, local_size = (
        int(os.environ.get(name, default)) for name, default in zip(names, "0101", strict=True)
    )
    return ALONE if size == 1 else Ranks(rank, size, local_rank, local_size)


@contextmanager
def join() -> Iterator[Ranks]:
    """Meet the other ranks, for a ``with`` block that ends at all of them or at none.

    An error that ends the block at one rank ends it at all: there it is raised itself, elsewhere
    a copy that names the rank. A rank that is lost, and SIGTERM, by which torchrun ends the others
    when one is, become a :class:`LostRankError`. Inside another such block, nothing happens.

    Raises:
        ConfigError: a part of torchrun's environment is missing, or of the ranks.
    """
    ranks = this_rank()
    if ranks.size == 1 or dist.is_initialized():
        yield ranks
        return
    try:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=_PATIENCE)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"WORLD_SIZE is {ranks.size}, but these ranks do not meet ({error}): start the command "
            "with torchrun, all ranks at once, or unset WORLD_SIZE"
        ) from error
    # A program may have a handler of its own, and only the main thread can set one.
    main = threading.current_thread() is threading.main_thread()
    ours = main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, _told_to_end)
    try:
        yield ranks
        ranks.gather(None)
    except BaseException as error:
        if ours:
            # Other ranks may end first, and torchrun must not cut short what this one has to say.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if isinstance(error, Exception | SystemExit) and dist.is_initialized():
            with suppress(FedssError):
                ranks._meet(None, _as_told(error, ranks.rank))
        raise
    else:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _as_told(error: BaseException, rank: int) -> FedssError:
    """The error as other ranks raise it."""
    if not isinstance(error, FedssError):
        return FedssError(f"rank {rank} failed with {type(error).__name__}: {error}")
    told = copy.copy(error)
    told.args = (f"rank {rank}: {error}",)
    return told


def _told_to_end(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_IGN)
    raise _lost(this_rank(), "told to end (SIGTERM), as torchrun does when another rank ended")


def _lost(ranks: Ranks, cause: str) -> LostRankError:
    return LostRankError(
        f"rank {ranks.rank} of {ranks.size}: {cause}; start the same command again, with any "
        "number of ranks: it goes on from the last checkpoint, if there is one"
    )


def share_out(weights: Sequence[int], size: int) -> list[list[int]]:
    """Positions for each of ``size`` ranks, sorted, with sums of weights as equal as is easy.

    The heaviest goes first, always to the rank with the least so far (Graham 1969: at most
    ``4/3 - 1/(3 size)`` times the smallest possible largest sum). Nothing is drawn: every rank
    comes to the same shares. O(K log K).
    """
    shares: list[list[int]] = [[] for _ in range(size)]
    loads = [(0, rank) for rank in range(size)]
    for position in sorted(range(len(weights)), key=lambda i: (-weights[i], i)):
        load, rank = loads[0]
        heapq.heapreplace(loads, (load + weights[position], rank))
        shares[rank].append(position)
    return [sorted(share) for share in shares]
