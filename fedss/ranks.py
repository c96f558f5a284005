"""Ranks: processes that train one model together, started by torchrun on one host or several.

Every rank runs the same program on the same server state, class rows and all, so each needs the
memory of a whole server. A round is shared out: each rank trains a part of the cohort, the sums
over clients are added up over the ranks, and every rank takes the same server step. Only the first
rank writes and speaks. (Tensors meet on the CPU, by gloo.)
"""

import heapq
import itertools
import os
import pickle
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from fedss.errors import ConfigError, FedssError

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

# Seconds between two signs of life; and how many a rank must miss to count as gone once something
# is amiss, and to end the run by its silence alone.
_BEAT, _GONE, _SILENT = 0.5, 8, 120
# Seconds until all ranks must have started.
_PATIENCE = 600
_ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together.

    ``rank`` of ``size`` in all, ``local_rank`` of ``local_size`` on this host. ``names`` says
    where each rank runs, ``missed`` how many signs of life of each have not come.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    names: Sequence[str] = ()
    missed: Sequence[int] = ()

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

    @contextmanager
    def together(self) -> Iterator[list[Any]]:
        """A block that ends at all ranks or at none. Nothing in it may wait for other ranks.

        Gives a list: what this rank puts in comes back with what the others put in, by rank, the
        same at all of them. It is pickled.

        Raises:
            FedssError: at every rank, if the block raised anything at one of them: there the error
                itself, elsewhere a copy that names the rank. Of several the first rank's counts.
        """
        told: list[Any] = []
        mine: Exception | None = None
        try:
            yield told
        except Exception as error:
            if self.size == 1:
                raise
            mine = error
        if self.size == 1:
            return
        found: list[Any] = [None] * self.size
        message = (told, mine and _copy(mine, f"rank {self.rank} ({self.names[self.rank]})"))
        self._meet(lambda: dist.all_gather_object(found, message))
        for rank, (_, raised) in enumerate(found):
            if raised is not None:
                raise mine if mine is not None and rank == self.rank else raised
        told[:] = [value for values, _ in found for value in values]

    def add_up(self, sums: Tensor) -> Tensor:
        """Sum over the ranks, in place: the same bits at every one (torch promises it)."""
        if self.size > 1:
            self._meet(lambda: dist.all_reduce(sums))
        return sums

    def _meet(self, collective: Callable[[], object]) -> None:
        if _ending.locked():
            _end(self, "")
        try:
            collective()
        except RuntimeError as error:
            _end(self, f"the ranks lost each other ({str(error).splitlines()[0]})")


ALONE = Ranks()


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


def speaks() -> bool:
    """Whether this process has torchrun's environment for the first rank, or none."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


_joined: list[Ranks] = []
_meetings = itertools.count()


@lru_cache(maxsize=1)
def _rendezvous() -> "tuple[Store, int, int]":
    """Where ranks find each other, this rank, and their number: once in the life of a process."""
    from torch.distributed.rendezvous import rendezvous

    store, rank, size = next(rendezvous("env://"))
    return store, rank, size


def _sign(rank: int) -> str:
    return f"signs of life/{rank}"


@contextmanager
def join() -> Iterator[Ranks]:
    """Meet the other ranks that torchrun's environment speaks of; :data:`ALONE` without it.

    Inside, the loss of any rank ends the process with status 1, and one rank says which was lost
    and how to go on. That is no exception, since the main thread may sit in an operation that
    nothing interrupts. Ranks of a host that is still up are missed at once, others after a minute.

    Raises:
        ConfigError: only a part of the environment is there, or of the ranks.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    if _joined or size == 1:
        yield _joined[0] if _joined else ALONE
        return
    missing = [name for name in _ENVIRONMENT if name not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {size}, but {', '.join(missing)} is not set: start the command with "
            "torchrun, or unset WORLD_SIZE"
        )
    # Here, since not every build of torch has them.
    from torch.distributed.distributed_c10d import PrefixStore

    meeting, rank, size = _rendezvous()
    store = PrefixStore(f"fedss/{next(_meetings)}", meeting)
    store.set(_sign(rank), "0")
    try:
        store.wait([_sign(other) for other in range(size)], timedelta(seconds=_PATIENCE))
    except RuntimeError as error:
        raise ConfigError(
            f"not all of {size} ranks have come to {os.environ['MASTER_ADDR']} within "
            f"{_PATIENCE // 60} minutes: start as many as WORLD_SIZE says, all at once"
        ) from error
    # Who is gone is found out by listening; who is there may take any time.
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=size, timeout=timedelta(days=365)
    )
    names: list[Any] = [None] * size
    dist.all_gather_object(names, f"process {os.getpid()} at {socket.gethostname()}")
    missed, over = [0] * size, threading.Event()
    ranks = Ranks(
        rank,
        size,
        int(os.environ.get("LOCAL_RANK", 0)),
        int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
        names,
        missed,
    )
    listener = threading.Thread(target=_listen, args=(ranks, missed, store, over), daemon=True)
    listener.start()
    _joined.append(ranks)
    complete = True
    try:
        with _sigterm(lambda: _end(ranks, "told to end (SIGTERM)")):
            yield ranks
    except BaseException as error:
        complete = isinstance(error, SystemExit)
        raise
    finally:
        if complete:
            # So that nobody leaves while another still has something to say.
            with suppress(RuntimeError):
                dist.monitored_barrier(timeout=timedelta(seconds=_SILENT * _BEAT))
        over.set()
        listener.join()
        _joined.clear()
        dist.destroy_process_group()


def _copy(error: Exception, name: str) -> FedssError:
    """The error as other ranks raise it."""
    message = f"{name}: {error}"
    if isinstance(error, FedssError):
        with suppress(Exception):
            copied: FedssError = pickle.loads(pickle.dumps(error))
            copied.args = (message,)
            return copied
        return FedssError(message)
    return FedssError(f"{name} failed with {type(error).__name__}: {error}")


def _listen(ranks: Ranks, missed: list[int], store: "Store", over: threading.Event) -> None:
    """Give signs of life and listen for those of the others, until ``over``.

    Silence is counted in this rank's own beats: where all were halted and go on, nobody is lost.
    """
    keys = [_sign(rank) for rank in range(ranks.size)]
    last: list[Any] = [None] * ranks.size

    def beat(number: int) -> list[Any]:
        store.set(keys[ranks.rank], str(number))
        return list(store.multi_get(keys))

    # In a thread, since nothing else ends the wait for a store whose host has lost its power.
    with ThreadPoolExecutor(1) as pool:
        for number in itertools.count(1):
            try:
                found = pool.submit(beat, number).result(_SILENT * _BEAT)
            except (RuntimeError, TimeoutError):
                # At the end of a run it is no loss.
                if not over.wait(_GONE * _BEAT):
                    missed[:] = [_SILENT] * ranks.size
                    _end(ranks, "")
                return
            for rank in range(ranks.size):
                missed[rank] = missed[rank] + 1 if found[rank] == last[rank] else 0
            last = found
            if max(missed) > _SILENT:
                _end(ranks, "")
            if over.wait(_BEAT):
                return


@contextmanager
def _sigterm(action: Callable[[], None]) -> Iterator[None]:
    """Act on SIGTERM, by which torchrun ends the others when a rank is gone, unless the program
    has a handler of its own or this is not its main thread."""
    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    )
    if ours:
        # In a thread: it has to wait, and the main thread may be anywhere.
        signal.signal(
            signal.SIGTERM, lambda *_: threading.Thread(target=action, daemon=True).start()
        )
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


_ending = threading.Lock()


def _end(ranks: Ranks, cause: str) -> None:
    """End this process; the first of those left says why."""
    if not _ending.acquire(blocking=False):
        time.sleep(_SILENT * _BEAT)  # another thread is at it
    time.sleep((_GONE + 2) * _BEAT)
    lost = [rank for rank, missed in enumerate(ranks.missed) if missed >= _GONE]
    left = [rank for rank in range(ranks.size) if rank not in lost]
    if ranks.rank == (left or [ranks.rank])[0]:
        if not left:
            cause = "torchrun (or rank 0, if it was started in another way) is gone"
        elif lost:
            gone = ", ".join(f"rank {rank} ({ranks.names[rank]})" for rank in lost)
            cause = f"{gone} of {ranks.size} ended, was killed or cannot be reached"
        print(
            f"fedss: {cause}; start the same command again, with any number of ranks: it goes on "
            "from the last checkpoint, if there is one",
            file=sys.__stderr__,
            flush=True,
        )
    os._exit(1)
