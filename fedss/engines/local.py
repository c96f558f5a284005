"""The engine of this machine: clients train in threads, each with one torch thread.

Threads share the pictures and the server's state; each has one model of its own, loaded anew for
every client. Every client's update depends on its own inputs alone, so the number of workers does
not change a bit of the result.
"""

import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from queue import SimpleQueue

import numpy as np
import torch
from torch import Tensor

from fedss.algorithm import (
    ClientUpdate,
    RoundPlan,
    ServerState,
    Submodel,
    broadcast,
    choose_classes,
    own_classes,
    select,
    train_client,
)
from fedss.class_rows import rows_of, union
from fedss.data import ClientIndex
from fedss.models import Embedder, embed_pixels, flatten_, pool_before_relu_
from fedss.optimizers import ServerOptimizer
from fedss.seeds import generator
from fedss.softmax import ClassSample
from fedss.wire import (
    WireFormat,
    decode_answer,
    decode_broadcast,
    decode_update,
    encode_answer,
    encode_broadcast,
    encode_request,
    encode_update,
    traffic,
)


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
    wire: WireFormat
    workers: int
    pool: ThreadPoolExecutor
    replicas: "SimpleQueue[Replica]"

    def train(
        self, state: ServerState, cohort: np.ndarray, plan: RoundPlan
    ) -> Iterator[ClientUpdate]:
        """Train each client of the cohort; updates come in the cohort's order.

        What is sent is encoded and decoded as it would be on a network, so that a client works
        with the numbers that it would get there; only the step to bytes is left out.
        """
        labels_N = self.clients.images.labels
        own_K = [own_classes(plan, k, labels_N[self.clients.examples(k)]) for k in cohort.tolist()]
        samples = choose_classes(plan, state, cohort, own_K)
        to_all = encode_broadcast(self.wire, broadcast(state, plan))
        received = decode_broadcast(self.wire, to_all)
        ids_U = union([sample.ids_S for sample in samples])
        rows_UD = select(self.optimizer, state, ids_U)

        def train_one(client: int, own_P: np.ndarray, sample: ClassSample) -> ClientUpdate:
            example_N = self.clients.examples(client)
            dealt = sample if plan.sampler.drawn_by == "server" else None
            request = encode_request(
                self.wire, sample.ids_S if dealt is None else torch.from_numpy(own_P)
            )
            rows_SD = rows_of(rows_UD, ids_U, sample.ids_S)
            answer = encode_answer(self.wire, sample.ids_S, rows_SD, dealt)
            submodel = Submodel(received, sample.ids_S, decode_answer(self.wire, answer))
            with self.replica() as model:
                update = train_client(
                    plan, client, model, submodel, sample, example_N, labels_N[example_N]
                )
            reply = encode_update(
                self.wire, update, generator(plan.seed, "wire", plan.round, client)
            )
            counted = traffic({**to_all, **answer}, request, reply)
            return replace(decode_update(self.wire, reply, client), traffic=counted)

        return self.pool.map(train_one, cohort.tolist(), own_K, samples)

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
    embedder: Embedder,
    clients: ClientIndex,
    optimizer: ServerOptimizer,
    wire: WireFormat,
    workers: int | None,
) -> Iterator[LocalEngine]:
    """A local engine for the length of a ``with`` block.

    Args:
        embedder: the model; copied for each worker, not changed.
        clients: the training pictures by client.
        optimizer: the server optimizer, which knows how rows are read.
        wire: how messages are encoded.
        workers: number of threads; None: as many as torch would use.
    """
    workers = workers or torch.get_num_threads()
    replicas: SimpleQueue[Replica] = SimpleQueue()
    embedder = copy.deepcopy(embedder).train()
    pool_before_relu_(embedder, torch.from_numpy(np.array(clients.images.pixels[:2])))
    for _ in range(workers):
        model = copy.deepcopy(embedder)
        flat = flatten_(model)
        replicas.put(Replica(model, flat.theta_P, flat.grad_P, clients.images.pixels))
    with (
        intra_op_threads(1),
        ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool,
    ):
        yield LocalEngine(clients, optimizer, wire, workers, pool, replicas)


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
