"""A model's trainable parameters, and their gradients, each as one vector.

Shape suffix: P trainable parameters.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedss.errors import ConfigError
from fedss.models.checks import few


@dataclass(frozen=True, eq=False)
class FlatParameters:
    """A module's trainable parameters and their gradients, each as one vector.

    Every parameter is a view into `theta_P` and its gradient a view into `grad_P`, both float32,
    in the order of `named_parameters()`. So with `flat = flatten_(module)`::

        flat.theta_P.copy_(received)                   # load
        flat.grad_P.zero_()                            # instead of zero_grad()
        flat.theta_P.add_(flat.grad_P, alpha=-lr)      # a step of SGD

    Move and copy a module first, then flatten it: `module.zero_grad()`, which sets gradients to
    None, `module.to(...)` and `copy.deepcopy` undo these views.
    """

    theta_P: Tensor
    grad_P: Tensor


def raw_bytes(tensor: Tensor) -> bytes:
    """A tensor's numbers as they lie in memory, row after row; for digests."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def flatten_(module: nn.Module) -> FlatParameters:
    """Move a module's trainable parameters into one vector, in place; gradients become zero.

    Parameters that do not require grad are left out: what is frozen is neither sent nor returned.
    A parameter shared by several layers counts once. The values stay as they are, bit for bit.

    Raises:
        ConfigError: no trainable parameter, one that is not float32, or several devices.
    """
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    if not named:
        raise ConfigError("the model has no trainable parameter: every requires_grad is False")
    wrong = [f"{n} ({p.dtype})" for n, p in named if p.dtype != torch.float32]
    if wrong:
        raise ConfigError(
            f"trainable parameters must be float32; call .float() on the model: {few(wrong)}"
        )
    devices = sorted({str(p.device) for _, p in named})
    if len(devices) > 1:
        raise ConfigError(f"trainable parameters lie on several devices: {', '.join(devices)}")
    theta_P = torch.cat([p.detach().reshape(-1) for _, p in named])
    grad_P = torch.zeros_like(theta_P)
    sizes = [p.numel() for _, p in named]
    parts = zip(torch.split(theta_P, sizes), torch.split(grad_P, sizes), strict=True)
    for (_, parameter), (values, gradient) in zip(named, parts, strict=True):
        parameter.data = values.view(parameter.shape)
        parameter.grad = gradient.view(parameter.shape)
    return FlatParameters(theta_P, grad_P)
