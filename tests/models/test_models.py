"""Backbones, norms, the embedder's laws, flat parameters, files."""

import copy
import hashlib
import importlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedss import optional
from fedss.errors import ConfigError, DataError
from fedss.models import (
    Embedder,
    FrozenBatchNorm,
    build_embedder,
    conv4,
    embed_pixels,
    fingerprint,
    flatten_,
    freeze_batch_norm,
    load_embedder,
    norm_groups,
    pool_before_relu_,
    replace_batch_norm,
    save_embedder,
)
from fedss.models.backbones import conv4_features
from fedss.models.layout import channels_last
from tests.installed import by_timm, needs_timm, timm


def random_pixels(n: int = 6, channels: int = 1, size: int = 28, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, channels, size, size), generator=generator, dtype=torch.uint8)


def small(name: str | nn.Module = "conv4-16", seed: int = 0, **more: Any) -> Embedder:
    return build_embedder(name, channels=1, image_size=28, embedding_size=12, seed=seed, **more)


def own_module(*layers: nn.Module, features: int = 6) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, features, 3), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- conv4


@pytest.mark.parametrize("size", [8, 9, 16, 28, 32, 47, 105])
def test_conv4_any_size(size: int) -> None:
    net = conv4(3, size, width=16)
    out = net(torch.rand(4, 3, size, size))
    side = (size + 1) // 2  # a stride rounds up, a pool down
    for _ in range(3):
        side = side // 2 if side > 4 else side  # small maps are not pooled
    assert out.shape == (4, 16 * side * side) == (4, conv4_features(3, size, 16))
    # A norm over a single value would give the same whatever the image.
    assert (out.std(0) > 1e-3).all()


def test_conv4_as_described() -> None:
    net = conv4(1, 28, width=32)
    norms = [m for m in net.modules() if isinstance(m, nn.GroupNorm)]
    assert [n.num_groups for n in norms] == [32] * 4
    assert sum(isinstance(m, nn.ReLU) for m in net.modules()) == 3
    assert all(m.bias is None for m in net.modules() if isinstance(m, nn.Conv2d))
    tiny = [m.num_groups for m in conv4(1, 8, 32).modules() if isinstance(m, nn.GroupNorm)]
    assert tiny == [32, 32, 32, 32]
    assert (net(torch.rand(8, 1, 28, 28)) < 0).any()


def test_named_widths() -> None:
    for name, width in (("conv4", 64), ("conv4-32", 32), ("conv4-5", 5)):
        net = small(name).backbone
        assert net(torch.rand(2, 1, 28, 28)).shape == (2, width * 3 * 3)


# --- seeds


@pytest.mark.parametrize("name", by_timm("conv4-16", "timm:mobilenetv3_small_050"))
def test_the_seed_alone_sets_the_weights(name: str) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = small(name, seed=7).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert same_bits(first, small(name, seed=7).state_dict())
    assert not same_bits(first, small(name, seed=8).state_dict())


# --- norms


def batch_norms(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def shaken(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(5)
    for norm in batch_norms(module):
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return module


def test_group_norm_keeps_the_affine_weights() -> None:
    shared = nn.BatchNorm2d(48, eps=1e-3)
    module = shaken(own_module(nn.BatchNorm2d(6), nn.Conv2d(6, 48, 1), shared, shared))
    module[1].weight.requires_grad_(False)
    before = copy.deepcopy(module.state_dict())
    new = replace_batch_norm(module, torch.rand(2, 1, 28, 28))
    assert same_bits(module.state_dict(), before)
    assert not batch_norms(new)
    assert new[3] is new[4]
    assert (new[1].num_groups, new[3].num_groups, new[3].eps) == (6, 24, 1e-3)
    for i in (1, 3):
        assert torch.equal(new[i].weight, module[i].weight)
        assert torch.equal(new[i].bias, module[i].bias)
        assert new[i].weight is not module[i].weight
    assert not new[1].weight.requires_grad
    alone = replace_batch_norm(nn.BatchNorm2d(64, affine=False), torch.rand(2, 64, 3, 3))
    assert isinstance(alone, nn.GroupNorm)


class Pooled(nn.Module):
    """Norms over maps of 7 x 7, 2 x 2 and single values, the last of them without a map."""

    def __init__(self) -> None:
        super().__init__()
        self.large, self.small = nn.BatchNorm2d(24), nn.BatchNorm2d(24)
        self.single, self.vector = nn.BatchNorm2d(24), nn.BatchNorm1d(12)
        self.twice = nn.BatchNorm2d(24)
        self.never = nn.BatchNorm2d(24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(
            self.large(x.repeat(1, 24, 1, 1)[..., :7, :7] + torch.arange(24.0).view(-1, 1, 1))
        )
        x = self.small(nn.functional.adaptive_avg_pool2d(x, 2).sin())
        x = self.twice(nn.functional.adaptive_avg_pool2d(x, 1).sin())
        return self.vector(self.single(x).flatten(1)[:, :12])


def test_groups_have_values_to_be_normed_by() -> None:
    """At least 8 of an image, whatever has become of its map; the module stays as it was."""
    module = Pooled()
    module.small.eval()
    new = replace_batch_norm(module, torch.rand(2, 1, 28, 28))
    expected = {"large": 24, "small": 12, "single": 3, "vector": 1, "twice": 3, "never": 24}
    assert {name: part.num_groups for name, part in new.named_children()} == expected
    assert norm_groups(new) == expected
    assert [part.training for part in new.children()] == [
        part.training for part in module.children()
    ]
    # No batch is looked at: images alone give what they give together.
    images = torch.rand(3, 1, 28, 28)
    alone = torch.cat([new(image[None]) for image in images])
    torch.testing.assert_close(new(images), alone)


@needs_timm
@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050"])
def test_timm_has_no_batch_norm_left(name: str) -> None:
    embedder = small(f"timm:{name}")
    assert not batch_norms(embedder)
    assert not any("running" in n for n, _ in embedder.named_buffers())
    h = embedder(random_pixels())
    torch.testing.assert_close(h.norm(dim=1), torch.ones(6))


@needs_timm
def test_activations_inside_a_timm_norm_are_kept() -> None:
    module = timm.create_model("mobilenetv3_small_050", num_classes=0, in_chans=1)
    acts = [type(m.act) for m in module.modules() if hasattr(m, "drop") and hasattr(m, "act")]
    new = replace_batch_norm(module, torch.rand(2, 1, 28, 28))
    kept = [
        type(m[1]) if isinstance(m, nn.Sequential) else nn.Identity
        for m in new.modules()
        if (isinstance(m, nn.Sequential) and len(m) == 2 and isinstance(m[0], nn.GroupNorm))
    ]
    assert kept == [a for a in acts if a is not nn.Identity]
    assert len(kept) > 10


@pytest.mark.parametrize("source", by_timm("own", "timm:mobilenetv3_small_050"))
def test_frozen_batch_norm_is_the_module_in_eval_mode(source: str) -> None:
    if source == "own":
        module: nn.Module = own_module(nn.BatchNorm2d(6), nn.ReLU())
    else:
        module = timm.create_model(source.removeprefix("timm:"), num_classes=0, in_chans=1)
    shaken(module).eval()
    images = torch.rand(4, 1, 28, 28)
    expected = module(images)
    frozen = freeze_batch_norm(module)
    frozen.train()
    before = copy.deepcopy(frozen.state_dict())
    assert torch.equal(frozen(images), expected)
    assert same_bits(frozen.state_dict(), before)
    assert not batch_norms(frozen)
    trainable = {n for n, p in frozen.named_parameters() if p.requires_grad}
    constant = {n for n, _ in frozen.named_buffers()}
    assert not trainable & constant
    norms = [n for n, m in frozen.named_modules() if isinstance(m, FrozenBatchNorm)]
    assert norms
    assert {f"{n}.weight" for n in norms} <= constant
    assert any(p.grad is not None for p in backward(frozen, images).parameters())


def backward(module: nn.Module, images: Tensor) -> nn.Module:
    module(images).square().sum().backward()
    return module


# --- the embedder


@pytest.mark.parametrize("channels", [1, 3])
def test_unit_norm_from_bytes_and_from_floats(channels: int) -> None:
    embedder = build_embedder(
        "conv4-16", channels=channels, image_size=32, embedding_size=9, seed=0
    )
    pixels = random_pixels(5, channels, 32)
    h = embedder(pixels)
    assert (h.shape, h.dtype) == ((5, 9), torch.float32)
    torch.testing.assert_close(h.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(embedder(pixels.double() / 255), h)


def test_mean_and_std_are_constants() -> None:
    embedder = build_embedder("conv4-8", channels=3, image_size=28, embedding_size=4, seed=0)
    assert embedder.mean.tolist() == embedder.std.tolist() == [0.5] * 3
    embedder.mean.copy_(torch.tensor([0, 0.1, 1]))
    embedder.std.copy_(torch.tensor([1, 2, 3]))
    assert {"mean", "std"} <= embedder.state_dict().keys()
    assert not {"mean", "std"} & {n for n, _ in embedder.named_parameters()}
    seen = []
    embedder.backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    embedder(torch.full((1, 3, 28, 28), 255, dtype=torch.uint8))
    torch.testing.assert_close(seen[0][0, :, 0, 0], torch.tensor([1.0, 0.45, 0.0]))


@pytest.mark.parametrize("channels, mean, std", [(3, [0.4, 0.5, 0.9], [1, 2, 3]), (1, [0.6], [2])])
def test_trained_weights_get_the_pixels_they_expect(
    channels: int, mean: list[float], std: list[float]
) -> None:
    module = nn.Sequential(nn.Conv2d(channels, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    settings: Any = {"mean": (0.4, 0.5, 0.9), "std": (1, 2, 3)}
    module.pretrained_cfg = settings
    build = dict(channels=channels, image_size=28, embedding_size=4, seed=0)
    trained = build_embedder(module, pretrained=True, **build)
    torch.testing.assert_close(trained.mean, torch.tensor(mean))
    torch.testing.assert_close(trained.std, torch.tensor(std, dtype=torch.float32))
    assert build_embedder(module, **build).mean.tolist() == [0.5] * channels


def test_projection_only_where_it_is_needed() -> None:
    assert isinstance(small("conv4-12").projection, nn.Linear)
    assert isinstance(small(own_module(features=12)).projection, nn.Identity)
    assert small(own_module(features=6)).projection.weight.shape == (12, 6)
    assert small().projection.bias is None


def test_a_module_of_ones_own_is_not_changed() -> None:
    module = own_module(nn.BatchNorm2d(6), nn.Dropout(0.0))
    module[1].eval()
    before = copy.deepcopy(module.state_dict())
    modes = [m.training for m in module.modules()]
    embedder = small(module)
    flatten_(embedder).theta_P.zero_()
    assert same_bits(module.state_dict(), before)
    assert [m.training for m in module.modules()] == modes
    assert isinstance(module[1], nn.BatchNorm2d)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = own_module()

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.body(x), 0.3, self.training)


class DropPath(nn.Module):
    drop_prob = 0.1


class Counter(nn.Module):
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + self.training
        return x


class RunningMean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.average.lerp_(x.mean(), 0.1)
        return x - self.average


class FromFirstBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "start"):
            self.register_buffer("start", x.detach().mean() + 1)
        return x / self.start


class Scaled(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return 7 * super().forward(x)


class Plain(nn.BatchNorm2d):
    pass


@pytest.mark.parametrize("rule", ["freeze", "replace"])
def test_a_batch_norm_with_a_forward_of_its_own_is_not_taken_for_torchs(rule: str) -> None:
    patched = nn.BatchNorm2d(6)
    patched.forward = lambda x: x  # type: ignore[method-assign, assignment]
    for norm in (Scaled(6), patched):
        with pytest.raises(ConfigError, match=r"1 \(\w+\) is a batch norm with a forward"):
            small(own_module(norm), batch_norm=rule)
    small(own_module(Plain(6)), batch_norm=rule)


class OwnFrozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_var", torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return x / self.running_var[:, None, None]


def test_what_only_looks_like_a_batch_norm_is_not_advised_in_a_circle() -> None:
    with pytest.raises(ConfigError, match=r"OwnFrozen.*torch's BatchNorm with the same tensors"):
        small(own_module(OwnFrozen()), batch_norm="freeze")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["running_mean", "running_var", "weight"])
def test_numbers_that_are_not_finite_are_called_so(name: str, value: float) -> None:
    norm = nn.BatchNorm2d(6)
    getattr(norm, name).data[2] = value
    with pytest.raises(ConfigError, match=rf"not finite: 1\.{name}\. "):
        small(own_module(norm), batch_norm="freeze")


class Two(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


@pytest.mark.parametrize(
    "module, message",
    [
        (own_module(nn.Dropout(0.5)), r"active dropout: 1 \(Dropout\).*global generator"),
        (own_module(DropPath()), "active dropout"),
        (Functional(), "draws random numbers"),
        (own_module(Counter()), r"changes buffers when it trains: 1\.calls\. .*leave them"),
        (own_module(RunningMean()), r"changes buffers when it trains: 1\.average"),
        (own_module(FromFirstBatch()), r"changes buffers when it trains: 1\.start"),
        (
            own_module(nn.InstanceNorm2d(6, track_running_stats=True)),
            r"InstanceNorm2d.*without track_running_stats, or batch_norm=freeze",
        ),
        (nn.Conv2d(1, 4, 3), r"\[1, features\], but gives \[1, 4, 26, 26\].*pooling"),
        (nn.Flatten(0), r"but gives \[784\]"),
        (Two(), "but gives a tuple"),
        (nn.Sequential(nn.Flatten(), nn.Linear(100, 4)), "fails: RuntimeError"),
        (nn.Sequential(nn.Flatten(), nn.LazyLinear(4)), "lazy"),
        (own_module(nn.LazyBatchNorm2d(affine=False)), r"lazy.*1\.running_mean"),
        (own_module().double(), "fails: RuntimeError"),
    ],
)
def test_modules_that_do_not_fit_are_refused(module: nn.Module, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small(module)


def test_buffers_that_stay_are_welcome() -> None:
    module = own_module(Counter(), RunningMean())
    module[1].forward = module[2].forward = lambda x: x
    module.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    before = copy.deepcopy(module.state_dict())
    assert same_bits(small(module).backbone.state_dict(), before)


def norm_of(change: str) -> nn.Module:
    kind = {"sync": nn.SyncBatchNorm, "vector": nn.BatchNorm1d}.get(change, nn.BatchNorm2d)
    norm = kind(6, track_running_stats=change != "weight, no statistics")
    if change == "mean":
        norm.running_mean[2] = 0.1
    elif change in ("variance", "sync", "vector"):
        norm.running_var[2] = 1.1
    elif change.startswith("weight"):
        norm.weight.data[2] = 0.9
    elif change == "bias":
        norm.bias.data[2] = 0.1
    elif change == "begins as 0":
        nn.init.zeros_(norm.weight)
    return norm


def own_with(norm: nn.Module) -> nn.Module:
    if isinstance(norm, nn.BatchNorm1d):
        return nn.Sequential(own_module(), norm)
    return own_module(norm)


LEARNT = ["mean", "variance", "sync", "vector", "weight", "weight, no statistics", "bias"]


@pytest.mark.parametrize("change", [*LEARNT, "nothing", "begins as 0"])
def test_trained_norms_are_not_replaced_in_silence(change: str) -> None:
    module = own_with(norm_of(change))
    build: Callable[..., Embedder] = build_embedder
    how = dict(channels=1, image_size=28, embedding_size=6, seed=0)
    if change in LEARNT:
        with pytest.raises(ConfigError, match=r"batch_norm: .*earlier training.*freeze.*replace"):
            build(module, **how)
    else:
        assert norm_groups(build(module, **how).backbone)
    replaced = build(module, batch_norm="replace", **how)
    assert norm_groups(replaced.backbone)
    assert not replaced.spec.pretrained
    if change != "weight, no statistics":
        images = torch.rand(3, 1, 28, 28)
        for told in ({"batch_norm": "freeze"}, {"pretrained": True}):
            kept = build(module, **told, **how)
            features = module.eval()(channels_last(images * 2 - 1))
            assert torch.equal(kept.train()(images), nn.functional.normalize(features))


def test_frozen_instance_norm_is_the_module_in_eval_mode() -> None:
    norms = [nn.InstanceNorm2d(6, affine=True, track_running_stats=True), nn.InstanceNorm2d(6)]
    for _ in range(3):
        norms[0](torch.randn(4, 6, 9, 9) + 2)
    module = own_module(*norms).eval()
    images = torch.rand(3, 1, 28, 28)
    torch.testing.assert_close(freeze_batch_norm(module).train()(images), module(images))


@pytest.mark.parametrize(
    "channels, given, expected",
    [
        (3, ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), None),
        (3, ((0.5,), (1,)), ([0.5] * 3, [1] * 3)),
        (1, ((0.3, 0.4, 0.5), (0.1, 0.2, 0.3)), ([0.4], [0.2])),
    ],
)
def test_pixels_are_scaled_as_told(
    channels: int, given: tuple[tuple[float, ...], ...], expected: tuple[list[float], ...] | None
) -> None:
    embedder = build_embedder(
        "conv4-4",
        channels=channels,
        image_size=16,
        embedding_size=4,
        seed=0,
        pixel_mean=given[0],
        pixel_std=given[1],
    )
    mean, std = expected or given
    torch.testing.assert_close(embedder.mean, torch.tensor(mean))
    torch.testing.assert_close(embedder.std, torch.tensor(std, dtype=torch.float32))


@pytest.mark.parametrize(
    "given, message",
    [
        (((0.5,), None), "pixel_std: pixel_mean and pixel_std go together.*got none"),
        (((0.5, 0.5), (1, 1)), "pixel_mean: .*expected 3 numbers.*got 2"),
        (((123.7, 116.3, 103.5), (0.2,)), "pixel_mean: expected numbers 0 to 1.*not to 255"),
        (((0.5,), (0,)), "pixel_std: expected numbers above 0"),
        (((float("nan"),), (1,)), "pixel_mean: expected numbers"),
    ],
)
def test_statistics_that_cannot_be(given: tuple[Any, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_embedder(
            "conv4-4",
            channels=3,
            image_size=16,
            embedding_size=4,
            seed=0,
            pixel_mean=given[0],
            pixel_std=given[1],
        )


def test_a_model_of_before_keeps_its_groups_and_its_fingerprint(tmp_path: Path) -> None:
    """Descriptions that say nothing of groups are of as many as divide the channels."""
    deep = nn.Sequential(*[nn.Sequential(nn.MaxPool2d(4), nn.Conv2d(1, 1, 1))] * 2)
    module = nn.Sequential(deep, nn.Conv2d(1, 16, 1), nn.BatchNorm2d(16), nn.Flatten())
    embedder = small(module)
    assert norm_groups(embedder.backbone) == {"2": 2}
    save_embedder(embedder, tmp_path, {})
    assert fingerprint(load_embedder(tmp_path, module)) == fingerprint(embedder)
    config = tmp_path / "config.json"
    description = json.loads(config.read_text())
    assert description["embedder"].pop("group_values") == 8
    config.write_text(json.dumps(description))
    old = load_embedder(tmp_path, module)
    assert norm_groups(old.backbone) == {"2": 16}
    digest = hashlib.sha256(json.dumps(description["embedder"], sort_keys=True).encode())
    for name, tensor in sorted(old.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().tobytes())
    assert fingerprint(old) == digest.hexdigest()


def test_pretrained_module_keeps_its_statistics() -> None:
    module = shaken(nn.Sequential(own_module(nn.BatchNorm2d(6)), nn.BatchNorm1d(6))).eval()
    build = dict(channels=1, image_size=28, embedding_size=6, seed=0)
    embedder = build_embedder(module, pretrained=True, **build).train()
    images = torch.rand(3, 1, 28, 28)
    scaled = channels_last((images - 0.5) / 0.5)
    assert torch.equal(embedder(images), nn.functional.normalize(module(scaled)))
    with pytest.raises(ConfigError, match="without running statistics"):
        build_embedder(
            own_module(nn.BatchNorm2d(6, track_running_stats=False)), pretrained=True, **build
        )


@pytest.mark.parametrize(
    "name, message",
    [
        ("conv5", 'unknown backbone "conv5".*did you mean "conv4"'),
        ("conv4-0", "unknown backbone"),
        ("resnet18", 'written "timm:resnet18"'),
        pytest.param("timm:resnet_18", "no model.*near it: .*resnet18", marks=needs_timm),
    ],
)
def test_names_that_do_not_exist_are_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small(name)


def test_settings_that_cannot_be_are_refused() -> None:
    build: Callable[..., Embedder] = build_embedder
    good = dict(channels=1, image_size=28, embedding_size=8, seed=0)
    for change, message in (
        (dict(channels=0), "channels must be 1"),
        (dict(image_size=7), "image_size must be 8"),
        (dict(embedding_size=0), "embedding_size must be 1"),
        (dict(seed=-1), "seed must lie"),
        (dict(pretrained=True), "no pretrained weights"),
    ):
        with pytest.raises(ConfigError, match=message):
            build("conv4-8", **{**good, **change})
    with pytest.raises(ConfigError, match="width must be 1"):
        conv4(width=0)


@pytest.mark.parametrize(
    "error, message",
    [
        (
            ModuleNotFoundError("No module named 'timm'", name="timm"),
            r'pip install "fedss\[timm\]"',
        ),
        (RuntimeError("operator torchvision::nms does not exist"), "torchvision does not fit"),
        (AttributeError("partially initialized module 'torchvision'"), "torchvision does not fit"),
    ],
)
def test_a_timm_that_cannot_be_imported_is_explained(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str) -> ModuleType:
        raise error

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(ConfigError, match=message):
        small("timm:resnet18")


def test_a_torchvision_of_another_build_is_imported_without_its_operators(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    came: list[str] = []

    def fail_once(name: str) -> ModuleType:
        came.append(name)
        if len(came) == 1:
            raise RuntimeError("operator torchvision::nms does not exist")
        return ModuleType(name)

    kept = {n: m for n, m in sys.modules.items() if n.partition(".")[0] in ("timm", "torchvision")}
    monkeypatch.setattr(importlib, "import_module", fail_once)
    monkeypatch.setattr(optional, "_declare_operators", lambda: came.append("declared"))
    try:
        assert optional.import_extra("timm", "timm").__name__ == "timm"
        assert came == ["timm", "declared", "timm"]
        assert not {"timm", "torchvision"} & sys.modules.keys()
    finally:
        sys.modules.update(kept)


@pytest.mark.parametrize(
    "pixels",
    [random_pixels(2, 3), random_pixels(2, 1, 32), random_pixels()[0], random_pixels().long()],
)
def test_pixels_that_do_not_fit_are_refused(pixels: Tensor) -> None:
    with pytest.raises(ValueError, match="pixels must be"):
        small()(pixels)


# --- layout


def blocks(
    norm: Callable[[], nn.Module] = lambda: nn.GroupNorm(2, 16), channels: int = 1
) -> nn.Sequential:
    """Two blocks as one would write them down."""
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1),
        norm(),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 16, 3, padding=1),
        norm(),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
    )


class View(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(len(x), -1)


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_last_says_so_in_its_strides(channels: int) -> None:
    x = torch.rand(4, channels, 6, 5)
    apart = torch.rand(9, *x.shape)[3]
    for laid_out in (x, x.contiguous(memory_format=torch.channels_last), apart):
        laid = channels_last(laid_out)
        assert torch.equal(laid, laid_out)
        assert laid.stride() == (6 * 5 * channels, 1, 5 * channels, channels)
        convolved = nn.Conv2d(channels, 4, 3)(laid)
        assert convolved.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "body, pays",
    [
        (blocks(), True),
        (blocks(nn.Identity), True),
        (blocks(lambda: nn.BatchNorm2d(16)), False),  # becomes a norm over one channel
        (blocks(lambda: nn.GroupNorm(4, 16)), False),
        (blocks(lambda: nn.InstanceNorm2d(16)), False),
        (nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 5)), False),
        (nn.Sequential(nn.Conv2d(1, 4, 3), View()), False),
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), View()), True),
        ("conv4-16", False),
    ],
)
def test_the_layout_is_a_rule(body: nn.Module | str, pays: bool) -> None:
    assert small(body).channels_last == pays


def test_the_layout_does_not_depend_on_what_trains() -> None:
    how = dict(channels=1, image_size=28, embedding_size=12, seed=0)
    for trainable in ("all", "last-1", "head"):
        build: Callable[..., Embedder] = build_embedder
        assert build(blocks(nn.Identity), trainable=trainable, **how).channels_last


@pytest.mark.parametrize("channels", [1, 3])
def test_the_layout_changes_rounding_alone(channels: int) -> None:
    embedder = build_embedder(
        blocks(channels=channels), channels=channels, image_size=28, embedding_size=12, seed=0
    )
    seen: list[Tensor] = []
    embedder.backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    contiguous = copy.deepcopy(embedder)
    contiguous.channels_last = False
    pixels = random_pixels(5, channels)
    torch.testing.assert_close(embedder(pixels), contiguous(pixels))
    assert [x.stride()[1] for x in seen] == [1, 28 * 28]
    gradients = [backward_flat(model, pixels) for model in (embedder, contiguous)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


def backward_flat(embedder: Embedder, pixels: Tensor) -> Tensor:
    flat = flatten_(embedder)
    embedder(pixels)[:, 0].sum().backward()
    return flat.grad_P


@given(
    st.lists(st.integers(-2, 2), min_size=2 * 3 * 6 * 6, max_size=2 * 3 * 6 * 6),
    st.sampled_from([nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2, ceil_mode=True)]),
    st.booleans(),
)
def test_pooling_before_relu_is_the_same_bits(
    values: list[int], pool: nn.MaxPool2d, inplace: bool
) -> None:
    """Small integers, so that windows are full of ties, and of nothing above 0."""
    x = torch.tensor(values).float().view(2, 3, 6, 6)
    scale = nn.Conv2d(3, 3, 1, groups=3, bias=False)
    nn.init.ones_(scale.weight)
    module = nn.Sequential(scale, nn.ReLU(inplace=inplace), pool, nn.Flatten())
    twin = copy.deepcopy(module)
    pool_before_relu_(twin, x)
    assert [type(layer) for layer in twin] == [nn.Conv2d, nn.MaxPool2d, nn.ReLU, nn.Flatten]
    found = []
    for model in (module, twin):
        leaf = x.clone().requires_grad_()
        out = model(leaf)
        weight = torch.linspace(-1, 1, out.numel()).view_as(out)
        found.append((out, *torch.autograd.grad(out, (leaf, model[0].weight), weight)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_pooling_first_keeps_parameters_and_their_order() -> None:
    embedder = small("conv4-16").train()
    twin = copy.deepcopy(embedder)
    pool_before_relu_(twin, random_pixels())
    layers = [name for name, _ in twin.named_modules() if "block2." in name]
    assert [name.rpartition(".")[2] for name in layers] == ["conv", "norm", "pool", "relu"]
    assert [n for n, _ in twin.named_parameters()] == [n for n, _ in embedder.named_parameters()]
    assert twin.state_dict().keys() == embedder.state_dict().keys()
    assert torch.equal(
        backward_flat(twin, random_pixels()), backward_flat(embedder, random_pixels())
    )


class LooksBetween(nn.Module):
    """Uses what comes out of every ReLU, beside what comes out in the end."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = blocks()

    def forward(self, x: Tensor) -> Tensor:
        between = []
        for layer in self.layers:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                between.append(x.mean((1, 2, 3)))
        return torch.cat([x, torch.stack(between, dim=1)], dim=1)


def test_a_module_that_looks_between_stays_as_it_is() -> None:
    embedder = small(LooksBetween())
    pixels, before = random_pixels(), copy.deepcopy(embedder)
    pool_before_relu_(embedder, pixels)
    assert str(embedder) == str(before)
    assert torch.equal(embedder(pixels), before(pixels))


# --- flat parameters


def test_views_stay_views_and_steps_are_those_of_sgd() -> None:
    embedder = small()
    twin = copy.deepcopy(embedder)
    names = [n for n, _ in twin.named_parameters()]
    flat = flatten_(embedder)
    assert [n for n, _ in embedder.named_parameters()] == names
    assert same_bits(dict(embedder.named_parameters()), dict(twin.named_parameters()))
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    pixels = random_pixels(16)
    for step in range(4):
        flat.grad_P.zero_()
        optimizer.zero_grad()
        for model in (embedder, twin):
            for half in (pixels[step:8], pixels[8:]):  # gradients accumulate
                model(half)[:, 0].sum().backward()
        flat.theta_P.add_(flat.grad_P, alpha=-0.1)
        optimizer.step()
    start = 0
    for ours, theirs in zip(embedder.parameters(), twin.parameters(), strict=True):
        end = start + ours.numel()
        assert ours.data_ptr() == flat.theta_P[start:].data_ptr()
        assert ours.grad.data_ptr() == flat.grad_P[start:].data_ptr()
        assert torch.equal(flat.theta_P[start:end].view_as(theirs), theirs)
        assert torch.equal(flat.grad_P[start:end].view_as(theirs), theirs.grad)
        start = end
    assert start == len(flat.theta_P)

    other = flatten_(small(seed=3)).theta_P
    flat.theta_P.copy_(other)
    assert same_bits(embedder.state_dict(), small(seed=3).state_dict())


def test_frozen_is_left_out_and_shared_counts_once() -> None:
    module = nn.Sequential(
        nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    )
    module[2].weight = module[1].weight
    module[0].bias.requires_grad_(False)
    flat = flatten_(module)
    assert flat.theta_P.shape == (32,)
    flat.theta_P.zero_()
    assert not module[2].weight.any()
    assert module[0].bias.any()
    module(torch.ones(1, 4)).sum().backward()
    assert module[0].bias.grad is None


def test_parameters_that_cannot_be_flat_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"float32.*bias \(torch.float16\)"):
        flatten_(nn.Linear(2, 2).half())
    with pytest.raises(ConfigError, match="no trainable parameter"):
        flatten_(nn.ReLU())
    with pytest.raises(ConfigError, match="several devices"):
        flatten_(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta")))


# --- many images


def test_embed_pixels_reads_a_memory_map(tmp_path: Path) -> None:
    embedder = small()
    embedder.backbone.eval()
    pixels = random_pixels(23).numpy()
    np.save(tmp_path / "pixels.npy", pixels)
    mapped = np.load(tmp_path / "pixels.npy", mmap_mode="r")
    whole = embed_pixels(embedder, mapped)
    assert not whole.requires_grad
    for batch in (1, 5, 23):
        torch.testing.assert_close(embed_pixels(embedder, mapped, batch), whole, atol=1e-6, rtol=0)
    assert torch.equal(whole[:0], embed_pixels(embedder, pixels[:0]))
    assert torch.equal(whole.flip(0), embed_pixels(embedder, pixels[::-1]).clone())
    assert (embedder.training, embedder.backbone.training) == (True, False)
    with pytest.raises(DataError, match="must be uint8"):
        embed_pixels(embedder, pixels.astype(np.float32))
    with pytest.raises(DataError, match=r"\[N, 1, 28, 28\]"):
        embed_pixels(embedder, pixels[:, :, :20])
    with pytest.raises(ConfigError, match="batch_size"):
        embed_pixels(embedder, pixels, 0)


# --- files


def tied() -> nn.Sequential:
    module = nn.Sequential(own_module(nn.BatchNorm2d(6)), nn.Linear(6, 6), nn.Linear(6, 6))
    module[2].weight = module[1].weight
    return module


@pytest.mark.parametrize(
    "source", by_timm("conv4-16", "timm:mobilenetv3_small_050", "own", "own, pretrained")
)
@pytest.mark.parametrize("flat", [False, True])
def test_round_trip_gives_identical_bits(source: str, flat: bool, tmp_path: Path) -> None:
    own = source.startswith("own")
    embedder = build_embedder(
        tied() if own else source,
        channels=1,
        image_size=28,
        embedding_size=12,
        seed=3,
        pretrained=source.endswith("pretrained"),
    )
    embedder.mean.fill_(0.3)
    if flat:
        flatten_(embedder)
    save_embedder(embedder, tmp_path / "new" / "model", {"rounds": 3})
    loaded = load_embedder(tmp_path / "new" / "model", tied() if own else None)
    assert same_bits(loaded.state_dict(), embedder.state_dict())
    assert loaded.spec == embedder.spec
    assert not loaded.training
    pixels = random_pixels()
    assert torch.equal(loaded(pixels), embedder.eval()(pixels))
    assert sorted(p.name for p in (tmp_path / "new" / "model").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    assert json.loads((tmp_path / "new/model/config.json").read_text())["config"] == {"rounds": 3}


def test_a_failed_write_leaves_the_old_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_embedder(small(seed=0), tmp_path, {})
    monkeypatch.setattr("os.fsync", lambda handle: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_embedder(small(seed=1), tmp_path, {})
    assert same_bits(load_embedder(tmp_path).state_dict(), small(seed=0).state_dict())
    assert len(list(tmp_path.iterdir())) == 2


def test_folders_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"config.json is missing.*delete .*summary.json and start"
    ):
        load_embedder(tmp_path)
    with pytest.raises(ConfigError, match="cannot be written as JSON"):
        save_embedder(small(), tmp_path, {"x": object()})
    assert not list(tmp_path.iterdir())
    save_embedder(small(), tmp_path, {})
    with pytest.raises(ConfigError, match="leave backbone out"):
        load_embedder(tmp_path, own_module())

    config = tmp_path / "config.json"
    text = config.read_text()
    config.write_text(text.replace("conv4-16", "conv4-8"))
    with pytest.raises(ConfigError, match=r"block1.conv.weight is .*\[16, 1.*expected.*\[8, 1"):
        load_embedder(tmp_path)
    config.write_text(text.replace('"conv4-16"', "null"))
    with pytest.raises(ConfigError, match=r"pass one of the same structure, fedss\.load\(f"):
        load_embedder(tmp_path)
    with pytest.raises(ConfigError, match=r"missing backbone.0.weight.*left over backbone.block1"):
        load_embedder(tmp_path, own_module())
    for bad in ("{", "[]", '{"format": "other"}'):
        config.write_text(bad)
        with pytest.raises(ConfigError, match=re.escape(str(config))):
            load_embedder(tmp_path)
    config.write_text(text.replace('"channels"', '"colours"'))
    with pytest.raises(ConfigError, match="does not describe a model"):
        load_embedder(tmp_path)
    config.write_text(text)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match=r"cannot read .*model.safetensors.*summary.json"):
        load_embedder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(
        ConfigError, match=r"model.safetensors is missing.*same fedss train command"
    ):
        load_embedder(tmp_path)
