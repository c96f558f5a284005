"""The engine of this machine: clients train in threads, each with one torch thread.

Threads share the pictures and the server's state; each has one model of its own, loaded anew for
every client. Every client's update depends on its own inputs alone, so the number of workers does
not change a bit of the result.
"""

import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue

import numpy as np
import torch
from torch import Tensor

from fedss.algorithm import (
    ClientUpdate,
    RoundPlan,
    ServerState,
    choose_classes,
    select,
    train_client,
)
from fedss.data import ClientIndex
from fedss.models import Embedder, embed_pixels, flatten_
from fedss.optimizers import ServerOptimizer


@dataclass(frozen=True)
class Replica:
    """One worker's model and the pictures it reads; a :class:`fedss.algorithm.Trainable`."""

    embedder: Embedder
    theta_P: Tensor
    grad_P: Tensor
    pixels: np.ndarray

    def embed(self, example_B: np.ndarray) -> Tensor:
        """Unit-norm embeddings [B, D] of training pictures, by their numbers."""
        h_BD: Tensor = self.embedder(torch.from_numpy(self.pixels[example_B]))
        return h_BD


@dataclass(frozen=True)
class LocalEngine:
    """A :class:`fedss.algorithm.Engine` on this machine; made by :func:`local_engine`."""

    clients: ClientIndex
    optimizer: ServerOptimizer
    workers: int
    pool: ThreadPoolExecutor
    replicas: "SimpleQueue[Replica]"

    def train(
        self, state: ServerState, cohort: np.ndarray, plan: RoundPlan
    ) -> Iterator[ClientUpdate]:
        """Train each client of the cohort; updates come in the cohort's order."""

        def train_one(client: int) -> ClientUpdate:
            labels_N = self.clients.images.labels
            example_N = self.clients.examples(client)
            sample, example_N = choose_classes(plan, client, example_N, labels_N[example_N])
            submodel = select(self.optimizer, state, sample.ids_S)
            with self.replica() as model:
                return train_client(
                    plan, client, model, submodel, sample, example_N, labels_N[example_N]
                )

        return self.pool.map(train_one, cohort.tolist())

    def embed(self, backbone_P: Tensor, pixels: np.ndarray, block: int = 512) -> Tensor:
        """Embeddings [N, D] of any pictures under the given backbone."""

        def embed_block(start: int) -> Tensor:
            with self.replica() as model:
                model.theta_P.copy_(backbone_P)
                return embed_pixels(model.embedder, pixels[start : start + block])

        return torch.cat(list(self.pool.map(embed_block, range(0, len(pixels), block))))

    @contextmanager
    def replica(self) -> Iterator[Replica]:
        """A model that no other worker uses meanwhile."""
        model = self.replicas.get()
        try:
            yield model
        finally:
            self.replicas.put(model)


@contextmanager
def local_engine(
    embedder: Embedder, clients: ClientIndex, optimizer: ServerOptimizer, workers: int | None
) -> Iterator[LocalEngine]:
    """A local engine for the length of a ``with`` block.

    Args:
        embedder: the model; copied for each worker, not changed.
        clients: the training pictures by client.
        optimizer: the server optimizer, which knows how rows are read.
        workers: number of threads; None: as many as torch would use.
    """
    workers = workers or torch.get_num_threads()
    replicas: SimpleQueue[Replica] = SimpleQueue()
    for _ in range(workers):
        model = copy.deepcopy(embedder).train()
        flat = flatten_(model)
        replicas.put(Replica(model, flat.theta_P, flat.grad_P, clients.images.pixels))
    with (
        intra_op_threads(1),
        ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool,
    ):
        yield LocalEngine(clients, optimizer, workers, pool, replicas)


@contextmanager
def intra_op_threads(count: int) -> Iterator[None]:
    """Let torch use ``count`` threads inside an operation, in this thread, for a ``with`` block.

    More than one only pays where nothing else runs: each operation waits for its slowest thread,
    which may have to wait for a core that a worker or another process holds.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
