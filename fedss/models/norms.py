"""What takes the place of batch norm, whose statistics do not average over clients."""

import copy
from collections.abc import Callable

from torch import Tensor, nn

from fedss.errors import ConfigError

BatchNorm = nn.modules.batchnorm._BatchNorm
_MOST_GROUPS = 32


def replace_batch_norm(module: nn.Module) -> nn.Module:
    """A copy in which every BatchNorm2d (or SyncBatchNorm) is a GroupNorm; for new weights.

    Running statistics are neither gradients nor sums of them: averaged over clients of different
    classes they describe no client (Hsieh et al. 2020, arXiv 1910.00189; group norm: Wu and He
    2018, arXiv 1803.08494).

    Rule: 32 groups, or the largest divisor of the number of channels below. Affine weights, their
    `requires_grad`, eps and any activation inside the norm (timm's BatchNormAct2d) are kept. The
    outputs are other ones than before, so trained weights should use `freeze_batch_norm`.
    """
    return _replace_each(module, (nn.BatchNorm2d, nn.SyncBatchNorm), _group_norm_like)


def freeze_batch_norm(module: nn.Module) -> nn.Module:
    """A copy in which every batch norm (of any dimension) is a constant affine map.

    For trained weights: the outputs are those of the module in eval mode, bit for bit, whatever
    `.train()` says, since statistics and affine weights become buffers of a `FrozenBatchNorm`:
    saved with the model, not trained, not sent.

    Raises:
        ConfigError: a batch norm without running statistics: there is nothing to freeze.
    """
    return _replace_each(module, (BatchNorm,), _frozen_like)


class FrozenBatchNorm(nn.Module):
    """y = (x - running_mean) / sqrt(running_var + eps) * weight + bias, all of it constant."""

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        running_mean: Tensor,
        running_var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.register_buffer("running_mean", running_mean)
        self.register_buffer("running_var", running_var)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """The same shape and dtype."""
        return nn.functional.batch_norm(
            x_BCHW,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            training=False,
            eps=self.eps,
        )


class NormAct(nn.Sequential):
    """What takes the place of a norm that held layers of its own: a norm, then those layers.

    timm's BatchNormAct2d applies drop and then act after its norm. Here the norm is the first layer
    and its tensors are named ``0.weight``, ...; the type tells exported files where to leave the
    ``0.`` out (:func:`fedss.models.saving.safetensors_of`).
    """


def largest_groups(channels: int, most: int, least_channels: int = 1) -> int:
    """The largest number of groups, up to `most`, of at least so many channels each; else 1."""
    for groups in range(min(most, channels // least_channels), 1, -1):
        if channels % groups == 0:
            return groups
    return 1


def _replace_each(
    module: nn.Module,
    kinds: tuple[type[BatchNorm], ...],
    make: Callable[[BatchNorm], nn.Module],
) -> nn.Module:
    """A deep copy with make(norm) in place of every norm of these kinds, shared ones shared."""
    module = copy.deepcopy(module)
    if isinstance(module, kinds):
        return make(module)
    made: dict[nn.Module, nn.Module] = {}
    for path, part in list(module.named_modules(remove_duplicate=False)):
        if isinstance(part, kinds):
            made[part] = made.get(part) or make(part)
            parent, _, leaf = path.rpartition(".")
            module.get_submodule(parent).register_module(leaf, made[part])
    return module


def _group_norm_like(norm: BatchNorm) -> nn.Module:
    group_norm = nn.GroupNorm(
        largest_groups(norm.num_features, _MOST_GROUPS),
        norm.num_features,
        eps=norm.eps,
        affine=norm.affine,
    )
    if norm.affine:
        group_norm.weight = norm.weight
        group_norm.bias = norm.bias
    return _followed_by_children(group_norm, norm)


def _frozen_like(norm: BatchNorm) -> nn.Module:
    if norm.running_mean is None or norm.running_var is None:
        raise ConfigError(
            "a batch norm without running statistics cannot be frozen: use pretrained=False, "
            "which replaces it by a group norm"
        )
    frozen = FrozenBatchNorm(
        norm.running_mean,
        norm.running_var,
        norm.weight.detach() if norm.affine else None,
        norm.bias.detach() if norm.affine else None,
        norm.eps,
    )
    return _followed_by_children(frozen, norm)


def _followed_by_children(new: nn.Module, norm: nn.Module) -> nn.Module:
    children = [child for child in norm.children() if not isinstance(child, nn.Identity)]
    new = NormAct(new, *children) if children else new
    return new.train(norm.training)
