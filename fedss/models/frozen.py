"""Which part of a backbone trains, and what tells the rest from that of another machine."""

import hashlib
from collections.abc import Mapping

from torch import nn

from fedss.choices import is_trainable
from fedss.errors import ConfigError
from fedss.models.checks import few
from fedss.models.flat import raw_bytes
from fedss.optional import import_extra


def freeze_(backbone: nn.Module, trainable: str) -> None:
    """Freeze the parameters that are not to train, in place: neither sent nor returned.

    ``all`` leaves everything as it is; ``head`` freezes the whole backbone, so that the projection
    alone trains; ``last-K`` freezes all but the last K of :func:`blocks`. The backbone still has
    its batch norms: they count for what a block is.

    Raises:
        ConfigError: another text, or more blocks than there are.
    """
    if not is_trainable(trainable):
        raise ConfigError(f"trainable: expected all, head or last-<number>, got {trainable!r}")
    if trainable == "all":
        return
    parts = blocks(backbone)
    count = 0 if trainable == "head" else int(trainable.removeprefix("last-"))
    if count > len(parts):
        raise ConfigError(
            f"trainable: expected last-1 to last-{len(parts)}, got {trainable}; the backbone's "
            f"blocks are {few(list(parts), 40)}"
        )
    last = [name for names in list(parts.values())[len(parts) - count :] for name in names]
    for name, parameter in backbone.named_parameters():
        if name not in last:
            parameter.requires_grad_(False)


def blocks(backbone: nn.Module) -> Mapping[str, list[str]]:
    """The names of a backbone's parameters by block, in the order of the forward pass.

    For a model of timm, its own groups (``timm.models.group_parameters`` with
    ``group_matcher(coarse=True)``): the stem, each stage of a convolutional network or each block
    of a transformer, and what comes after them, which counts with the last or is one more block,
    as timm has it. For any other module, its top-level children that have parameters, in the order
    in which it lists them (``conv4``: its four blocks), and before them what it holds itself.

    Returns:
        By the name of each block's first parameter without its last part, such as ``blocks.6.0``.
    """
    names = [name for name, _ in backbone.named_parameters()]
    matcher = getattr(backbone, "group_matcher", None)
    if matcher is not None:
        timm = import_extra("timm.models", "timm")
        groups = [*timm.group_parameters(backbone, matcher(coarse=True)).values()]
    else:
        heads = dict.fromkeys(name.rpartition(".")[0].partition(".")[0] for name in names)
        groups = [[n for n in names if n.rpartition(".")[0].partition(".")[0] == h] for h in heads]
    return {group[0].rpartition(".")[0] or group[0]: group for group in groups}


def frozen_fingerprint(embedder: nn.Module) -> str | None:
    """SHA-256 of what is not trained, hence not sent, and must be the same at server and sites.

    Of parameters that do not require grad and buffers: names, types, shapes and bits, in the order
    of the state dict. A whitening is left out: it is known once clients have told of their
    features. None if the backbone has none of these (the statistics of pixels alone, which
    the backbone's name decides, make no difference).
    """
    trained = {n for n, p in embedder.named_parameters(remove_duplicate=False) if p.requires_grad}
    frozen = {
        n: t
        for n, t in embedder.state_dict().items()
        if n not in trained and not n.startswith("whitening.")
    }
    if not any(name.startswith("backbone.") for name in frozen):
        return None
    digest = hashlib.sha256()
    for name, tensor in frozen.items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()
