"""The engine of this machine: clients train in threads, each with one torch thread.

Threads share the images and the server's state; each has one model of its own, loaded anew for
every client. Every client's update depends on its own inputs alone, so the number of workers does
not change a bit of the result. Where several ranks train, each has such an engine for its share of
every cohort.

Models may lie on a GPU. Images, the server's state and all messages stay on the CPU.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedss.choices import ForwardPrecision
from fedss.core.client import (
    ClassRequest,
    ClientUpdate,
    LocalTraining,
    RoundPlan,
    Submodel,
    client_generator,
    prepare,
    request_classes,
    to_device,
    train_client,
)
from fedss.core.client_stacked import check_stackable, embed_stacked, train_clients
from fedss.core.features import FeatureSums, feature_sums
from fedss.core.optimizers import ServerOptimizer
from fedss.core.state import ServerState
from fedss.data import ClientIndex
from fedss.distributed import ALONE, Ranks, share_out
from fedss.engines.activations import BLOCK, cached_activations, pays
from fedss.losses.softmax import ClassSample
from fedss.models import (
    Embedder,
    Whitening,
    embed_pixels,
    find_border,
    flatten_,
    pool_before_relu_,
)
from fedss.wire.downlink import answer_requests, receive
from fedss.wire.messages import (
    Message,
    WireFormat,
    decode_broadcast,
    decode_update,
    encode_request,
    encode_update,
    traffic,
)

_CPU = torch.device("cpu")

Work = tuple[int, Submodel, ClassSample, np.ndarray, np.ndarray]
"""A client to train: its number, what it got, its class sample, its images and their labels."""


@dataclass(frozen=True)
class Replica:
    """One worker's model and the images it reads; a :class:`fedss.core.client.Trainable`."""

    embedder: Embedder
    theta_P: Tensor
    grad_P: Tensor
    pixels: np.ndarray

    def images(self, example: np.ndarray) -> Tensor:
        """Training images by their numbers, uint8 [..., C, H, W], or their activations at the
        border of what trains, float16 [..., X]; on the CPU.
        """
        return torch.from_numpy(self.pixels[example])

    def embed(self, pixels_BCHW: Tensor) -> Tensor:
        """Unit-norm embeddings [B, D] of images."""
        h_BD: Tensor = self.embedder(self._on_device(pixels_BCHW))
        return h_BD

    def embed_stacked(self, theta_KP: Tensor, pixels_KBCHW: Tensor) -> Tensor:
        """Unit-norm embeddings [K, B, D] of images, those of row k under weights k."""
        return embed_stacked(self.embedder, theta_KP, self._on_device(pixels_KBCHW))

    def _on_device(self, pixels: Tensor) -> Tensor:
        if self.theta_P.is_cuda:
            # Out of pinned memory they travel while the GPU still works on what came before.
            pixels = pixels.pin_memory()
        return pixels.to(self.theta_P.device, non_blocking=True)


@dataclass(frozen=True)
class Workers:
    """Threads that train and embed, each with a model of its own; made by :func:`start_workers`."""

    count: int
    pool: ThreadPoolExecutor
    replicas: "SimpleQueue[Replica]"
    device: torch.device
    stack: int
    known: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    def train(self, plan: RoundPlan, work: Sequence[Work]) -> list[ClientUpdate]:
        """Clients that share each call of the network, up to ``stack`` of them, or one."""
        with self.replica() as model:
            if self.stack == 1:
                return [train_client(plan, of_one[0], model, *of_one[1:]) for of_one in work]
            learners = [prepare(plan, *of_one, self.device) for of_one in work]
            return train_clients(plan, model, learners)

    def embed(
        self, backbone_P: Tensor, pixels: np.ndarray, ranks: Ranks = ALONE, block: int = 512
    ) -> Tensor:
        """Embeddings [N, D] of any images under the given backbone; ranks share the work."""
        with self.replica() as model:
            h_ND = torch.zeros(len(pixels), model.embedder.spec.embedding_size)
        inputs = self.inputs(pixels, ranks)

        def embed_block(start: int) -> None:
            with self.replica() as model:
                model.theta_P.copy_(backbone_P)
                h_BD = embed_pixels(model.embedder, inputs[start : start + block])
                h_ND[start : start + block] = h_BD

        first, step = ranks.rank * block, ranks.size * block
        list(self.pool.map(embed_block, range(first, len(pixels), step)))
        return ranks.add_up(h_ND)

    def features(
        self, backbone_P: Tensor, pixels: np.ndarray, which: np.ndarray | None = None
    ) -> Tensor:
        """What the backbone gives for images, or for those with these numbers, before whitening:
        float32 [N, F] on the CPU.
        """
        inputs = self.inputs(pixels)
        which = np.arange(len(pixels)) if which is None else which

        def of_block(start: int) -> Tensor:
            return self.features_of(backbone_P, inputs[which[start : start + BLOCK]])

        return torch.cat(list(self.pool.map(of_block, range(0, len(which), BLOCK))))

    def features_of(self, backbone_P: Tensor, inputs: np.ndarray) -> Tensor:
        """:meth:`features`, by one worker, of what :meth:`inputs` gives for images."""
        with self.replica() as model, torch.no_grad():
            model.theta_P.copy_(backbone_P)
            parts = torch.split(torch.from_numpy(np.array(inputs)), BLOCK)
            return torch.cat([model.embedder.features(x.to(self.device)).cpu() for x in parts])

    def whiten(self, mean_F: Tensor, axes_FK: Tensor) -> None:
        """Whiten features with these statistics, in every model."""
        for _ in range(self.count):
            with self.replica() as model:
                assert isinstance(model.embedder.whitening, Whitening)
                model.embedder.whitening.set_(mean_F, axes_FK)

    def inputs(self, pixels: np.ndarray, ranks: Ranks = ALONE) -> np.ndarray:
        """What the network reads of these images: activations where its frozen part is computed
        once (:mod:`fedss.engines.activations`), else the pixels. They are looked up, or made, the
        first time; on each host by one rank, for all others.
        """
        with self.replica() as model:
            if not pays(model.embedder):
                return pixels
            embedder = model.embedder
        if id(pixels) not in self.known:
            found = None
            for turn in (ranks.local_rank == 0, ranks.local_rank > 0):
                if turn:
                    found = cached_activations(embedder, pixels, self._activations)
                ranks.gather(None)
            # The pixels are kept, too: another array might get the id of one that is gone.
            self.known[id(pixels)] = pixels, pixels if found is None else found
        return self.known[id(pixels)][1]

    def _activations(self, pixels: np.ndarray) -> Iterator[np.ndarray]:
        def of_block(start: int) -> np.ndarray:
            # A copy: torch warns of read-only memory.
            block = torch.from_numpy(np.array(pixels[start : start + BLOCK], order="C"))
            with self.replica() as model, torch.no_grad():
                activations: np.ndarray = (
                    model.embedder.activations(block.to(self.device)).cpu().numpy()
                )
                return activations

        return self.pool.map(of_block, range(0, len(pixels), BLOCK))

    @contextmanager
    def replica(self) -> Iterator[Replica]:
        """A model that no other worker uses meanwhile."""
        model = self.replicas.get()
        try:
            yield model
        finally:
            self.replicas.put(model)


@dataclass(frozen=True)
class LocalEngine:
    """A :class:`fedss.core.engine.Engine` on this machine; made by :func:`local_engine`."""

    clients: ClientIndex
    optimizer: ServerOptimizer
    wire: WireFormat
    workers: Workers
    ranks: Ranks = ALONE

    def train(
        self, state: ServerState, cohort: np.ndarray, plan: RoundPlan
    ) -> Iterator[ClientUpdate]:
        """Train this rank's clients of the cohort; updates come in the cohort's order, or stack by
        stack.

        What is sent is encoded and decoded as it would be on a network, so that a client works
        with the numbers that it would get there; only the step to bytes is left out.
        """
        labels_N = self.clients.images.labels
        requests = {
            k: request_classes(plan, k, labels_N[self.clients.examples(k)]) for k in cohort.tolist()
        }
        own_clients = self._share(requests, plan.local)
        if not own_clients:
            return iter(())
        ids = {k: request.ids_S for k, request in requests.items()}
        down = answer_requests(self.wire, self.optimizer, state, plan, ids, own_clients)
        received = to_device(decode_broadcast(self.wire, down.to_all), self.workers.device)

        def train_some(clients: Sequence[int]) -> list[ClientUpdate]:
            answers = {k: down.answer(k) for k in clients}
            work = []
            for k, answer in answers.items():
                example_N = self.clients.examples(k)
                whole = {**down.to_all, **answer}
                submodel, sample = receive(self.wire, requests[k], received, whole)
                work.append((k, submodel, sample, example_N, labels_N[example_N]))
            return [send(update, answers) for update in self.workers.train(plan, work)]

        def send(update: ClientUpdate, answers: Mapping[int, Message]) -> ClientUpdate:
            k = update.client
            message = encode_update(self.wire, update, client_generator(plan, "wire", k))
            request = encode_request(self.wire, ids[k])
            counted = traffic({**down.to_all, **answers[k]}, request, message)
            return replace(decode_update(self.wire, message, k), traffic=counted)

        stack = self.workers.stack
        if stack > 1:
            # Those of like size train side by side.
            own_clients.sort(key=lambda k: -len(self.clients.examples(k)))
        stacks = (own_clients[i : i + stack] for i in range(0, len(own_clients), stack))
        return chain.from_iterable(self.workers.pool.map(train_some, stacks))

    def num_clients(self, round: int) -> int:
        """Number of clients."""
        return self.clients.num_clients

    def feature_sums(
        self, backbone_P: Tensor, clients: Sequence[int], by_class: bool
    ) -> list[FeatureSums]:
        """What clients tell of their features before the first round, in their order."""
        images, ranks = self.clients.images, self.ranks
        # Activations of training images that are not changed; they are known by now.
        inputs = self.workers.inputs(images.pixels, ranks)

        def of_client(k: int) -> FeatureSums:
            example_N = self.clients.examples(k)
            features_NF = self.workers.features_of(backbone_P, inputs[example_N])
            return feature_sums(features_NF, torch.from_numpy(images.labels[example_N]), by_class)

        mine = list(self.workers.pool.map(of_client, clients[ranks.rank :: ranks.size]))
        of_ranks = ranks.gather(mine)
        return [of_ranks[i % ranks.size][i // ranks.size] for i in range(len(clients))]

    def whiten(self, mean_F: Tensor, axes_FK: Tensor) -> None:
        """Whiten features with these statistics from now on."""
        self.workers.whiten(mean_F, axes_FK)

    def _share(self, requests: Mapping[int, ClassRequest], local: LocalTraining) -> list[int]:
        """This rank's clients of the cohort, by the images they will train on.

        Every rank knows every client's images of own classes, so all come to the same shares.
        """
        cohort = [*requests]
        if self.ranks.size == 1:
            return cohort
        labels_N, work_K = self.clients.images.labels, []
        for k, request in requests.items():
            used = int(np.isin(labels_N[self.clients.examples(k)], request.own_P).sum())
            # Where each client takes so many steps, they cost the same whatever it holds.
            work_K.append(local.steps * min(used, local.batch_size) if local.steps else used)
        return [cohort[i] for i in share_out(work_K, self.ranks.size)[self.ranks.rank]]

    def embed(self, backbone_P: Tensor, pixels: np.ndarray) -> Tensor:
        """Embeddings [N, D] of any images under the given backbone; ranks share the work."""
        return self.workers.embed(backbone_P, pixels, self.ranks)


@contextmanager
def start_workers(
    embedder: Embedder,
    pixels: np.ndarray,
    count: int,
    *,
    device: torch.device = _CPU,
    precision: ForwardPrecision = "float32",
    stack: int = 1,
    frozen_once: bool = False,
    augmented: bool = False,
    ranks: Ranks = ALONE,
) -> Iterator[Workers]:
    """``count`` workers for the length of a ``with`` block, in which an operation has one thread.

    The model is copied for each, not changed; ``pixels`` are the training images. ``stack`` clients
    share each call of the network. With ``frozen_once`` the frozen part of a backbone is computed
    once for each image; not for training images that are changed each time (``augmented``).

    Raises:
        ConfigError: a network that cannot be stacked.
    """
    replicas: SimpleQueue[Replica] = SimpleQueue()
    embedder = copy.deepcopy(embedder).train()
    few_BCHW = torch.from_numpy(np.array(pixels[:2]))
    pool_before_relu_(embedder, few_BCHW)
    embedder.precision = precision
    if stack > 1:
        # vmap has no such layout: it makes one grouped convolution of many.
        embedder.channels_last = False
    for _ in range(count):
        model = copy.deepcopy(embedder).to(device)
        flat = flatten_(model)
        if frozen_once and not all(p.requires_grad for p in model.backbone.parameters()):
            model.border = find_border(model.backbone, few_BCHW.to(device) / 255)
        replicas.put(Replica(model, flat.theta_P, flat.grad_P, pixels))
    if stack > 1:
        check_stackable(model, flat.theta_P, few_BCHW.to(device))

    def start() -> None:
        torch.set_num_threads(1)
        if device.type == "cuda":
            torch.cuda.set_device(device)

    pool = ThreadPoolExecutor(count, initializer=start)
    with intra_op_threads(1):
        try:
            workers = Workers(count, pool, replicas, device, stack)
            if not augmented and (inputs := workers.inputs(pixels, ranks)) is not pixels:
                for _ in range(count):
                    replicas.put(replace(replicas.get(), pixels=inputs))
            yield workers
        finally:
            # After an error, what it says must not wait for clients that still train.
            pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def local_engine(
    embedder: Embedder,
    clients: ClientIndex,
    optimizer: ServerOptimizer,
    wire: WireFormat,
    workers: int | None,
    ranks: Ranks = ALONE,
    *,
    device: torch.device = _CPU,
    precision: ForwardPrecision = "float32",
    stack: int = 1,
    frozen_once: bool = False,
    augmented: bool = False,
) -> Iterator[LocalEngine]:
    """A local engine for the length of a ``with`` block; the rest as for :func:`start_workers`.

    ``workers=None``: as many threads as this rank may keep busy, and one for a GPU.
    """
    count = workers or (ranks.cores if device.type == "cpu" else 1)
    how: dict[str, Any] = {"device": device, "precision": precision, "stack": stack}
    how |= {"frozen_once": frozen_once, "augmented": augmented, "ranks": ranks}
    with start_workers(embedder, clients.images.pixels, count, **how) as started:
        yield LocalEngine(clients, optimizer, wire, started, ranks)


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
