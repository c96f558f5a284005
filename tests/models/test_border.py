"""A backbone cut where its trained part begins is the same backbone."""

import copy

import pytest
import torch
from torch import Tensor, nn

from fedss.models import Embedder, build_embedder, find_border
from tests.installed import by_timm


def cut(name: str, trainable: str, size: int = 32) -> tuple[Embedder, Tensor]:
    embedder = build_embedder(
        name, channels=3, image_size=size, embedding_size=8, seed=3, trainable=trainable
    ).train()
    images = torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    embedder.border = find_border(embedder.backbone, images)
    return embedder, images


@pytest.mark.parametrize("trainable", ["head", "last-1", "last-2"])
@pytest.mark.parametrize(
    "name",
    [
        "conv4-8",
        *by_timm("timm:test_efficientnet", "timm:test_resnet", "timm:vit_tiny_patch16_224"),
    ],
)
def test_the_two_parts_give_what_the_whole_gives(name: str, trainable: str) -> None:
    embedder, images = cut(name, trainable, 224 if "vit" in name else 32)
    assert embedder.border is not None
    activations = embedder.activations(images)
    assert activations.dtype == torch.float16
    assert tuple(activations.shape[1:]) == embedder.border.shape
    whole, parts = embedder(images), embedder(activations)
    assert torch.allclose(whole, parts, atol=2e-3)
    gradients = []
    for h_BD in (whole, parts):
        embedder.zero_grad()
        h_BD[:, 0].sum().backward()
        trained = [p for p in embedder.parameters() if p.requires_grad]
        gradients.append([p.grad.clone() for p in trained if p.grad is not None])
        assert len(gradients[-1]) == len(trained)
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.allclose(ours, theirs, atol=2e-2 * float(theirs.abs().max()) + 1e-6)


def test_the_trained_part_holds_the_backbones_own_parameters() -> None:
    embedder, images = cut("conv4-8", "last-1")
    activations = embedder.activations(images)
    before = embedder(activations)
    with torch.no_grad():
        for parameter in embedder.backbone.parameters():
            if parameter.requires_grad:
                parameter.uniform_(-1, 1)
    assert not torch.allclose(embedder(activations), before)
    assert torch.allclose(embedder(activations), embedder(images), atol=2e-3)
    # And a copy those of the copied backbone.
    copied = copy.deepcopy(embedder)
    with torch.no_grad():
        for parameter in copied.backbone.parameters():
            parameter.zero_()
    assert torch.allclose(embedder(activations), embedder(images), atol=2e-3)


class _Odd(nn.Module):
    """Two layers, of which the first is frozen, put together by ``forward``."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 4)
        self.first.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        first = self.first(flat)
        if self.way == "depends" and first.sum() > 0:
            first = -first
        if self.way == "two":
            return self.second(first) + self.second(flat)
        return self.second(first)


@pytest.mark.parametrize("way", ["depends", "two", "plain"])
def test_what_cannot_be_cut_is_left_whole(way: str) -> None:
    border = find_border(_Odd(way), torch.rand(2, 3, 2, 2))
    assert (border is not None) == (way == "plain")


def test_nothing_is_cut_where_all_trains() -> None:
    net = _Odd("plain").requires_grad_(True)
    assert find_border(net, torch.rand(2, 3, 2, 2)) is None
