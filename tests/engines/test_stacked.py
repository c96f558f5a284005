"""Clients that share calls of the network, low precision, and devices: against the plain loop."""

import copy
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedss.core.algorithm import broadcast, select
from fedss.core.client import (
    ClientUpdate,
    RoundPlan,
    Submodel,
    draw_classes,
    limit_own_classes,
    prepare,
    train_client,
)
from fedss.core.client_stacked import train_clients
from fedss.data import Images, index_clients
from fedss.engines.local import Replica, Work, local_engine
from fedss.errors import ConfigError
from fedss.losses.methods import METHODS
from fedss.losses.softmax import Scoring
from fedss.models import Embedder, build_embedder, flatten_
from fedss.wire.messages import WireFormat
from tests import reference
from tests.core.test_algorithm import DATA, MOMENTUM, N, plan, start
from tests.installed import by_timm

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def make_images(channels: int, size: int) -> Images:
    """Random images in place of the tiny ones; the same labels and clients."""
    shape = (len(DATA.train), channels, size, size)
    pixels = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    return replace(DATA.train, pixels=pixels)


class TwoNames(nn.Module):
    """One parameter under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = self.shift = nn.Parameter(torch.ones(20))

    def forward(self, x_BF: torch.Tensor) -> torch.Tensor:
        return x_BF * self.scale + self.shift


def own_network() -> nn.Module:
    """A frozen layer, a frozen batch norm, and weights that are shared in every way."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        twice, other = nn.Linear(20, 20), nn.Linear(20, 20)
        other.weight = twice.weight
        first = nn.Conv2d(1, 5, 3, stride=2).requires_grad_(False)
        layers = [first, nn.BatchNorm2d(5), nn.GELU(), nn.Flatten(), nn.Linear(45, 20)]
        return nn.Sequential(*layers, twice, nn.Tanh(), twice, nn.Tanh(), other, TwoNames())


def network(name: str) -> tuple[Embedder, Images]:
    """An embedder of 6 numbers, and images for it."""
    backbone: str | nn.Module
    if name == "tiny":
        backbone, images = reference.tiny_backbone(), DATA.train
    elif name == "own":
        backbone, images = own_network(), DATA.train
    else:
        backbone, images = name, make_images(3, 64) if "timm" in name else make_images(1, 20)
    _, channels, size, _ = images.pixels.shape
    pretrained = name == "own"  # which freezes its batch norm
    return (
        build_embedder(
            backbone,
            channels=channels,
            image_size=size,
            embedding_size=6,
            seed=0,
            pretrained=pretrained,
        ),
        images,
    )


def train(
    name: str, told: RoundPlan, cohort: np.ndarray | None = None, **how: object
) -> list[ClientUpdate]:
    """Updates of the local engine, by client."""
    embedder, images = network(name)
    layout = tuple(p.shape for p in embedder.parameters() if p.requires_grad)
    wire, clients = WireFormat(layout, 6, N), index_clients(images)
    theta_P = flatten_(copy.deepcopy(embedder)).theta_P
    state = replace(start(MOMENTUM, told), backbone_P=theta_P)
    cohort = np.arange(6) if cohort is None else cohort
    with local_engine(embedder, clients, MOMENTUM, wire, 2, **how) as engine:
        return sorted(engine.train(state, cohort, told), key=lambda update: update.client)


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Relative to the length of ``other``."""
    return float(((one - other).norm() / other.norm().clamp_min(1e-12)).detach())


def assert_near(
    updates: list[ClientUpdate], expected: list[ClientUpdate], tolerance: float
) -> None:
    assert [u.client for u in updates] == [u.client for u in expected]
    for one, other in zip(updates, expected, strict=True):
        assert one.backbone_delta_P.device.type == one.rows_delta_SD.device.type == "cpu"
        assert torch.equal(one.ids_S, other.ids_S)
        assert one.num_examples == other.num_examples
        assert one.loss == pytest.approx(other.loss, rel=tolerance)
        assert distance(one.backbone_delta_P, other.backbone_delta_P) < tolerance
        assert distance(one.rows_delta_SD, other.rows_delta_SD) < tolerance
        assert one.traffic == other.traffic


@pytest.mark.parametrize("local", [{"epochs": 2}, {"steps": 5, "batch_size": 4}], ids=str)
@pytest.mark.parametrize(
    "method", [method for method in METHODS if method not in ("fedss-published", "central")]
)
def test_a_stack_is_the_plain_loop_for_every_method(method, local):
    told = plan(method, **local)
    plain = train("tiny", told)
    assert len({update.num_examples for update in plain}) > 2
    for stack in (2, 4, 9):
        assert_near(train("tiny", told, stack=stack), plain, 1e-5)


@pytest.mark.parametrize("name", by_timm("conv4-8", "timm:mobilenetv3_small_050", "own"))
def test_a_stack_is_the_plain_loop_for_networks(name):
    # Small steps: a network that steps far makes much of a little rounding.
    told = plan("fedss", lr=0.01, row_lr=0.1)
    plain = train(name, told)
    assert_near(train(name, told, stack=4), plain, 1e-2 if "timm" in name else 1e-5)


@pytest.mark.parametrize("kind", ["cosface", "arcface"])
def test_a_stack_is_the_plain_loop_with_margins(kind):
    told = replace(plan(), scoring=Scoring(8.0, kind, 0.2, correction=0.7))
    assert_near(train("tiny", told, stack=3), train("tiny", told), 1e-5)


def ragged(sizes: list[int]) -> Images:
    """Images of clients of these sizes."""
    rng = np.random.default_rng(len(sizes))
    count = sum(sizes)
    return replace(
        DATA.train,
        pixels=rng.integers(0, 256, (count, 1, 8, 8), dtype=np.uint8),
        labels=rng.integers(0, N, count),
        clients=np.repeat(np.arange(len(sizes)), sizes),
        client_names=[str(k) for k in range(len(sizes))],
        names=[str(i) for i in range(count)],
    )


def replica(images: Images, device: str = "cpu") -> Replica:
    embedder, _ = network("tiny")
    embedder.to(device)
    flat = flatten_(embedder)
    return Replica(embedder, flat.theta_P, flat.grad_P, images.pixels)


def work(images: Images, told: RoundPlan) -> Iterator[Work]:
    """What each client is sent, as ``train_client`` and ``prepare`` take it."""
    clients, state = index_clients(images), start(MOMENTUM, told)
    state = replace(state, backbone_P=replica(images).theta_P.clone())
    for client in range(clients.num_clients):
        example_N = clients.examples(client)
        label_N = images.labels[example_N]
        sample = draw_classes(told, client, limit_own_classes(told, client, label_N))
        rows_SD = select(MOMENTUM, state, sample.ids_S)
        submodel = Submodel(broadcast(state, told), sample.ids_S, rows_SD)
        yield client, submodel, sample, example_N, label_N


@settings(max_examples=15)
@given(
    st.lists(st.integers(1, 11), min_size=1, max_size=5),
    st.integers(1, 5),
    st.integers(1, 3),
    st.one_of(st.none(), st.integers(1, 7)),
)
def test_clients_of_any_sizes_train_in_lockstep(sizes, batch, epochs, steps):
    images, cpu = ragged(sizes), torch.device("cpu")
    told = plan(batch_size=batch, epochs=epochs, steps=steps)
    model = replica(images)
    expected = [train_client(told, c, model, *rest) for c, *rest in work(images, told)]
    learners = [prepare(told, *of_one, cpu) for of_one in work(images, told)]
    updates = sorted(train_clients(told, model, learners), key=lambda update: update.client)
    # Rounding grows with the steps, of which there are up to 33.
    assert_near(updates, expected, 1e-3)


def test_who_has_no_batch_left_is_not_computed():
    images, told = ragged([1, 5, 8]), plan(batch_size=2)
    model, seen = replica(images), []

    class Spy:
        def images(self, example_KB: np.ndarray) -> torch.Tensor:
            seen.append(example_KB.shape)
            # What fills up a batch is the client's own.
            assert all(len(np.unique(images.clients[example_B])) == 1 for example_B in example_KB)
            return model.images(example_KB)

        def embed_stacked(self, theta_KP: torch.Tensor, pixels_KBCHW: torch.Tensor) -> torch.Tensor:
            return model.embed_stacked(theta_KP, pixels_KBCHW)

    learners = [prepare(told, *of_one, torch.device("cpu")) for of_one in work(images, told)]
    train_clients(told, Spy(), learners)
    assert seen == [(3, 2), (2, 2), (2, 2), (1, 2)]


class Standardize(nn.Module):
    """Not a number, and no gradient, for an image of one colour."""

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        x_BF = x_BCHW.flatten(1)
        return (x_BF - x_BF.mean(1, keepdim=True)) / x_BF.std(1, keepdim=True)


def test_what_fills_up_a_batch_leaves_no_trace():
    backbone = nn.Sequential(Standardize(), nn.Linear(64, 6))
    embedder = build_embedder(backbone, channels=1, image_size=8, embedding_size=6, seed=0)
    images = ragged([3, 7])
    flat = flatten_(embedder)
    model, told = Replica(embedder, flat.theta_P, flat.grad_P, images.pixels), plan(batch_size=4)
    sent: list[Work] = [
        (c, replace(s, broadcast=replace(s.broadcast, backbone_P=flat.theta_P.clone())), *rest)
        for c, s, *rest in work(images, told)
    ]
    learners = [prepare(told, *of_one, torch.device("cpu")) for of_one in sent]
    stacked = sorted(train_clients(told, model, learners), key=lambda update: update.client)
    assert_near(stacked, [train_client(told, c, model, *rest) for c, *rest in sent], 1e-5)


class ByValue(nn.Module):
    """Looks at a number, which vmap cannot."""

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return x_BCHW.flatten(1) if x_BCHW.sum() < 1e9 else x_BCHW.flatten(1) * 2


def test_a_network_that_cannot_be_stacked_is_refused():
    backbone = nn.Sequential(ByValue(), nn.Linear(64, 6))
    embedder = build_embedder(backbone, channels=1, image_size=8, embedding_size=6, seed=0)
    layout = tuple(p.shape for p in embedder.parameters())
    wire, clients = WireFormat(layout, 6, N), index_clients(DATA.train)
    with (
        pytest.raises(ConfigError, match="leave --stack out"),
        local_engine(embedder, clients, MOMENTUM, wire, 1, stack=2),
    ):
        pass


class Note(nn.Module):
    """Notes the dtypes that a linear layer computes in."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.seen = nn.Linear(64, 6), set()

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        y_BF = self.linear(x_BCHW.flatten(1))
        self.seen.add(y_BF.dtype)
        return y_BF


def test_in_bfloat16_the_network_runs_low_and_all_else_in_float32():
    note = Note()
    embedder = build_embedder(note, channels=1, image_size=8, embedding_size=6, seed=0)
    embedder.backbone.seen.clear()
    x = torch.from_numpy(DATA.train.pixels)
    exact = embedder(x)
    assert embedder.backbone.seen == {torch.float32}
    embedder.precision = "bfloat16"
    h = embedder(x)
    assert embedder.backbone.seen == {torch.float32, torch.bfloat16}
    assert h.dtype == torch.float32
    assert (h.norm(dim=1) - 1).abs().max() < 1e-6
    assert 0 < distance(h, exact) < 0.02
    h.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in embedder.parameters())


@pytest.mark.parametrize("stack", [1, 3])
@pytest.mark.parametrize("name", ["tiny", "conv4-8", "own"])
def test_bfloat16_trains_nearly_as_float32_does(name, stack):
    told = plan("fedss", lr=0.01, row_lr=0.1)
    exact = train(name, told)
    low = train(name, told, precision="bfloat16", stack=stack)
    for one, other in zip(low, exact, strict=True):
        assert one.backbone_delta_P.dtype == one.rows_delta_SD.dtype == torch.float32
        assert 1e-5 < distance(one.rows_delta_SD, other.rows_delta_SD) < 0.3
        assert 1e-5 < distance(one.backbone_delta_P, other.backbone_delta_P) < 0.3


def test_the_engine_embeds_in_the_precision_in_which_it_trains():
    embedder, images = network("tiny")
    wire = WireFormat(tuple(p.shape for p in embedder.parameters()), 6, N)
    theta_P = flatten_(copy.deepcopy(embedder)).theta_P
    found = {}
    for precision in ("float32", "bfloat16"):
        with local_engine(
            embedder, index_clients(images), MOMENTUM, wire, 1, precision=precision
        ) as engine:
            found[precision] = engine.embed(theta_P, images.pixels)
    assert embedder.precision == "float32"
    assert 0 < distance(found["bfloat16"], found["float32"]) < 0.02


class OneDevice(TorchDispatchMode):
    """Refuses operations between devices, but for copies and scalars; counts those elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.there = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.ndim]
        devices = {t.device.type for t in tensors}
        if "copy" not in func.name():
            assert len(devices) < 2, f"{func.name()} between {devices}"
        self.there += "meta" in devices
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["fedss", "moments", "neg-only", "fedaws"])
def test_a_client_trains_on_the_device_of_its_model(method, monkeypatch):
    """On torch's ``meta`` device, which every machine has; it holds shapes without numbers."""
    images, told = DATA.train, plan(method)
    model, meta = replica(images, "meta"), torch.device("meta")
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: torch.zeros(tensor.shape))
    sent = list(work(images, told))
    with OneDevice() as plain:
        alone = [train_client(told, c, model, *rest) for c, *rest in sent]
    with OneDevice() as stacked:
        learners = [prepare(told, *of_one, meta) for of_one in sent]
        assert all(learner.rows_SD.device == meta for learner in learners)
        together = train_clients(told, model, learners)
    assert 100 < stacked.there < plain.there
    for update in alone + together:
        assert update.backbone_delta_P.shape == sent[0][1].broadcast.backbone_P.shape
        assert update.backbone_delta_P.device == update.rows_delta_SD.device == torch.device("cpu")


@CUDA
@pytest.mark.parametrize("stack", [1, 4])
@pytest.mark.parametrize(
    ("name", "method"), [("tiny", "fedss"), ("tiny", "moments"), ("conv4-8", "fedss")]
)
def test_a_gpu_gives_what_the_cpu_gives(name, method, stack, monkeypatch):
    # By default convolutions round to 10 bits of mantissa on newer GPUs.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    told = plan(method, lr=0.01, row_lr=0.1)
    there = train(name, told, device=torch.device("cuda", 0), stack=stack)
    assert_near(there, train(name, told), 1e-4)


@CUDA
@pytest.mark.parametrize("stack", [1, 4])
def test_a_gpu_trains_in_bfloat16(stack):
    told = plan("fedss", lr=0.01, row_lr=0.1)
    where = torch.device("cuda", 0)
    low = train("conv4-8", told, device=where, stack=stack, precision="bfloat16")
    for one, other in zip(low, train("conv4-8", told), strict=True):
        assert 1e-5 < distance(one.backbone_delta_P, other.backbone_delta_P) < 0.3
