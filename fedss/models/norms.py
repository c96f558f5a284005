"""What takes the place of batch norm, whose statistics do not average over clients."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fedss.errors import ConfigError

BatchNorm = nn.modules.batchnorm._BatchNorm
InstanceNorm = nn.modules.instancenorm._InstanceNorm
LEAST_VALUES = 8
_MOST_GROUPS = 32
_KNOWN = ("torch.nn.modules.batchnorm", "torch.nn.modules.instancenorm", "timm.layers.norm_act")


def replace_batch_norm(
    module: nn.Module, images_BCHW: Tensor, least_values: int = LEAST_VALUES
) -> nn.Module:
    """A copy in which every batch norm is a GroupNorm; for new weights.

    Running statistics are neither gradients nor sums of them: averaged over clients of different
    classes they describe no client (Hsieh et al. 2020, arXiv 1910.00189; group norm: Wu and He
    2018, arXiv 1803.08494).

    Rule: as many groups, up to 32, as divide the channels and leave each group `least_values`
    values of an image or more, however small its map has become; else one. A group of one value is
    constant 0 whatever the image, and one of two is a sign with a gradient that explodes. Affine
    weights, their `requires_grad`, eps and any activation inside the norm (timm's BatchNormAct2d)
    are kept. The outputs are other ones than before, so trained weights should use
    `freeze_batch_norm`. `images_BCHW`, float32 and of the training size, show the size of the maps.

    Raises:
        ConfigError: a batch norm that computes something else, in a `forward` of its own.
    """
    module = copy.deepcopy(module)
    positions = _positions(module, images_BCHW)

    def make(norm: nn.Module) -> nn.Module:
        assert isinstance(norm, BatchNorm)
        least_channels = -(-least_values // positions.get(norm, least_values))
        groups = largest_groups(norm.num_features, _MOST_GROUPS, least_channels)
        new = nn.GroupNorm(groups, norm.num_features, eps=norm.eps, affine=norm.affine)
        if norm.affine:
            new.weight, new.bias = norm.weight, norm.bias
        return _followed_by_children(new, norm)

    return _replace_each(module, lambda part: isinstance(part, BatchNorm), make)


def freeze_batch_norm(module: nn.Module) -> nn.Module:
    """A copy in which every norm with running statistics is a constant affine map.

    For trained weights: the outputs are those of the module in eval mode, bit for bit, whatever
    `.train()` says, since statistics and affine weights become buffers of a `FrozenBatchNorm`:
    saved with the model, not trained, not sent.

    Raises:
        ConfigError: a batch norm without running statistics: there is nothing to freeze; or one
            that computes something else, in a `forward` of its own.
    """

    def has_statistics(part: nn.Module) -> bool:
        tracks = isinstance(part, InstanceNorm) and part.track_running_stats
        return isinstance(part, BatchNorm) or tracks

    def make(norm: nn.Module) -> nn.Module:
        assert isinstance(norm, BatchNorm | InstanceNorm)
        if norm.running_mean is None or norm.running_var is None:
            raise ConfigError(
                "a batch norm without running statistics cannot be frozen: use pretrained=False, "
                "which replaces it by a group norm (or batch_norm=replace)"
            )
        weight = norm.weight.detach() if norm.affine else None
        bias = norm.bias.detach() if norm.affine else None
        frozen = FrozenBatchNorm(norm.running_mean, norm.running_var, weight, bias, norm.eps)
        return _followed_by_children(frozen, norm)

    return _replace_each(copy.deepcopy(module), has_statistics, make)


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
        statistics = self.running_mean, self.running_var, self.weight, self.bias
        return nn.functional.batch_norm(x_BCHW, *statistics, training=False, eps=self.eps)


class NormAct(nn.Sequential):
    """What takes the place of a norm that held layers of its own: a norm, then those layers.

    timm's BatchNormAct2d applies drop and then act after its norm. Here the norm is the first layer
    and its tensors are named ``0.weight``, ...; the type tells exported files where to leave the
    ``0.`` out (:func:`fedss.models.saving.safetensors_of`).
    """


def norm_groups(backbone: nn.Module) -> dict[str, int]:
    """The number of groups of each group norm, by the path that its backbone gave it."""
    inside = {f"{path}.0" for path, part in backbone.named_modules() if isinstance(part, NormAct)}
    return {
        path.removesuffix(".0") if path in inside else path: part.num_groups
        for path, part in backbone.named_modules()
        if isinstance(part, nn.GroupNorm)
    }


def largest_groups(channels: int, most: int, least_channels: int = 1) -> int:
    """The largest number of groups, up to `most`, of at least so many channels each; else 1."""
    most = min(most, channels // least_channels)
    return next((groups for groups in range(most, 1, -1) if channels % groups == 0), 1)


def _positions(module: nn.Module, images_BCHW: Tensor) -> dict[nn.Module, int]:
    """How many values of a channel each batch norm sees of an image: the fewest of its calls."""
    twin = copy.deepcopy(module).eval()
    original = dict(zip(twin.modules(), module.modules(), strict=True))
    positions: dict[nn.Module, int] = {}

    def see(norm: nn.Module, inputs: tuple[Tensor]) -> None:
        values = inputs[0][0, 0].numel()
        positions[original[norm]] = min(values, positions.get(original[norm], values))

    for part in original:
        if isinstance(part, BatchNorm):
            part.register_forward_pre_hook(see)
    with torch.no_grad():
        twin(images_BCHW)
    return positions


def _replace_each(
    module: nn.Module, chosen: Callable[[nn.Module], bool], make: Callable[[nn.Module], nn.Module]
) -> nn.Module:
    """The module with make(part) in place of every chosen part, shared ones shared."""
    # What takes a norm's place computes what torch's does, or timm's with its activation.
    for path, norm in [(path, part) for path, part in module.named_modules() if chosen(part)]:
        forward = vars(norm).get("forward", type(norm).forward)
        if getattr(forward, "__module__", None) not in _KNOWN:
            raise ConfigError(
                f"the backbone's {path or 'norm'} ({type(norm).__name__}) is a batch norm with a "
                "forward of its own, which would be lost where it is frozen or replaced: expected "
                "torch's BatchNorm (what comes before or after it as a module beside it), or "
                "GroupNorm"
            )
    if chosen(module):
        return make(module)
    made: dict[nn.Module, nn.Module] = {}
    for path, part in list(module.named_modules(remove_duplicate=False)):
        if chosen(part):
            made[part] = made.get(part) or make(part)
            parent, _, leaf = path.rpartition(".")
            module.get_submodule(parent).register_module(leaf, made[part])
    return module


def _followed_by_children(new: nn.Module, norm: nn.Module) -> nn.Module:
    children = [child for child in norm.children() if not isinstance(child, nn.Identity)]
    new = NormAct(new, *children) if children else new
    return new.train(norm.training)
