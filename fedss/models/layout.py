"""How a network's numbers lie in memory, and which of two layers goes first: speed, not results.

``docs/performance.md`` has the measurements behind both.

Shape suffixes: B images of a batch, C channels, H height, W width.
"""

import copy
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from fedss.models.checks import probe_images


def channels_last(x_BCHW: Tensor) -> Tensor:
    """The same images with the channels of a pixel side by side in memory.

    Also where C = 1: ``to(memory_format=torch.channels_last)`` finds nothing to do there and leaves
    the strides of a contiguous tensor, by which a convolution then goes.
    """
    x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)
    _, C, H, W = x_BCHW.shape
    return x_BCHW.as_strided(x_BCHW.shape, (C * H * W, 1, C * W, C))


def channels_last_pays(body: nn.Module, channels: int, image_size: int) -> bool:
    """Whether a backbone gets its images in channels_last: a rule, not a measurement.

    It does if it has convolutions, takes images of that layout (``x.view(len(x), -1)`` does
    not), and has no norm over fewer than 8 channels at a time: torch takes these in channels_last
    number by number, up to 20 times as slowly.
    """
    parts = list(body.modules())
    together = [p.num_channels // p.num_groups for p in parts if isinstance(p, nn.GroupNorm)]
    together += [1 for p in parts if isinstance(p, nn.InstanceNorm2d)]
    if not any(isinstance(p, nn.Conv2d) for p in parts) or min(together, default=8) < 8:
        return False
    body = copy.deepcopy(body).train()
    try:
        features_BF = body(channels_last(probe_images(channels, image_size)))
        if features_BF.requires_grad:
            features_BF.sum().backward()
    except RuntimeError:
        return False
    return True


def pool_before_relu_(embedder: nn.Module, x_BCHW: Tensor) -> None:
    """Let a max-pool go before the ReLU that it follows, which then has fewer numbers to clamp.

    ``max(max(0, x_1), ...) = max(0, max(x_1, ...))``: the same bits come out, and the same bits of
    gradient come back. Only neighbours in a ``nn.Sequential`` change places, in place, and only if
    the whole still gives the same bits for the images (it may use what lies between them).
    Parameters and their names stay.
    """
    chains = [part for part in embedder.modules() if type(part) is nn.Sequential]
    before = [list(chain._modules) for chain in chains]
    after = [_pools_first(chain) for chain in chains]
    if after == before:
        return
    with torch.no_grad():
        expected = embedder(x_BCHW)
        _order_layers_(chains, after)
        if not torch.equal(embedder(x_BCHW), expected):
            _order_layers_(chains, before)


def _pools_first(chain: nn.Sequential) -> list[str]:
    """The names of the layers, in the order in which they are to run."""
    names, layers = list(chain._modules), list(chain)
    for i, (relu, pool) in enumerate(pairwise(layers)):
        if type(relu) is nn.ReLU and type(pool) is nn.MaxPool2d and not pool.return_indices:
            names[i], names[i + 1] = names[i + 1], names[i]
    return names


def _order_layers_(chains: Sequence[nn.Sequential], orders: Sequence[Sequence[str]]) -> None:
    for chain, names in zip(chains, orders, strict=True):
        layers = dict(chain._modules)
        chain._modules.clear()
        chain._modules.update({name: layers[name] for name in names})
