"""Backbones by name: a network of this library's own, and timm's."""

import difflib
import inspect
import re
import reprlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fedss.errors import ConfigError
from fedss.models.checks import check_image, size_hint
from fedss.models.norms import LEAST_VALUES, largest_groups
from fedss.optional import import_extra
from fedss.own_code import FORM, import_code
from fedss.text import one_line

_MOST_WIDTH = 2048  # 450 MB of weights


def conv4(channels: int = 1, image_size: int = 28, width: int = 64) -> nn.Sequential:
    """Four blocks of 3 x 3 convolution (padding 1, no bias), group norm, ReLU, max-pool 2.

    The usual small network of few-shot learning (Vinyals et al. 2016, arXiv 1606.04080), changed
    in what federated training and small images ask for:

    - group norm instead of batch norm, since running statistics do not average over clients; one
      group per channel, or as many channels as make 8 values where `width` allows: a norm over
      one value is constant 0, whatever the image;
    - a first convolution of stride 2 takes the place of the first pool; no pool where the map has
      4 pixels a side or less: what is left of where strokes are is worth its parameters;
    - no ReLU in the last block: its output meets a linear layer, and half of it would be gone
      (with default initialization too, such a network was seen to collapse);
    - Kaiming initialization (He et al. 2015, arXiv 1502.01852).

    Drawn from torch's global generator, as torch's own layers are; `build_embedder` draws the same
    network from a seed.

    Args:
        channels: of the images.
        image_size: H and W, 8 or more.
        width: channels of each block, 1 to 2,048.

    Returns:
        A module from [B, channels, image_size, image_size] to [B, width * s * s], s the last map's
        side (28 gives s = 3, 64 gives 4, 105 gives 6).

    Raises:
        ConfigError: a size or number out of range.
    """
    conv4_features(channels, image_size, width)
    blocks: dict[str, nn.Module] = {}
    inputs, side = channels, image_size
    for number in range(1, 5):
        stride = 2 if number == 1 else 1
        side = -(-side // stride)
        convolution = nn.Conv2d(inputs, width, 3, stride=stride, padding=1, bias=False)
        nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
        groups = largest_groups(width, width, -(-LEAST_VALUES // side**2))
        layers: dict[str, nn.Module] = {"conv": convolution, "norm": nn.GroupNorm(groups, width)}
        if number < 4:
            layers["relu"] = nn.ReLU(inplace=True)
        if number > 1 and side > 4:
            layers["pool"] = nn.MaxPool2d(2)
            side //= 2
        blocks[f"block{number}"] = nn.Sequential(OrderedDict(layers))
        inputs = width
    blocks["flatten"] = nn.Flatten()
    return nn.Sequential(OrderedDict(blocks))


def conv4_features(channels: int, image_size: int, width: int) -> int:
    """The length of what :func:`conv4` gives of an image, without making it.

    Raises:
        ConfigError: a size or number out of range.
    """
    check_image(channels, image_size)
    if not 1 <= width <= _MOST_WIDTH:
        raise ConfigError(f"conv4: width must be 1 to {_MOST_WIDTH}, not {reprlib.repr(width)}")
    side = -(-image_size // 2)
    for _ in range(3):
        side //= 2 if side > 4 else 1
    return width * side**2


@contextmanager
def own_random_state(seed: int) -> Iterator[None]:
    """Torch's CPU generator seeded for a while. (torch.manual_seed would seed GPUs for good.)"""
    if not 0 <= seed < 2**64:
        raise ConfigError(f"seed must lie between 0 and 2^64 - 1, not {seed}")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def named_backbone(name: str, channels: int, image_size: int, pretrained: bool) -> nn.Module:
    """A backbone by one of the names of `build_embedder`, a model of timm without its classifier.

    Weights are drawn from torch's global generator.

    Raises:
        ConfigError: an unknown name or model; timm missing or unusable; no pretrained weights.
    """
    width = conv4_width(name)
    if width is not None:
        if pretrained:
            raise ConfigError(f'there are no pretrained weights for "{name}": only for timm models')
        return conv4(channels, image_size, width)
    if name.startswith("timm:"):
        return _timm_model(name.removeprefix("timm:"), channels, image_size, pretrained)
    near = difflib.get_close_matches(name, ["conv4", "conv4-32", "conv4-64"], n=1)
    hint = f'did you mean "{near[0]}"' if near else f'a timm model is written "timm:{name}"'
    raise ConfigError(
        f'unknown backbone "{name}": names are "conv4" (64 channels), "conv4-<width>", '
        f'"timm:<model>" or, of code of your own, "{FORM}"; {hint}'
    )


def own_backbone(name: str, channels: int, image_size: int, embedding_size: int) -> nn.Module:
    """A backbone that a function of the user's own makes; a class of modules is one, too.

    It is called with those of the three numbers, by keyword, that it has arguments for.

    Raises:
        ConfigError: no such function; it fails, or gives something else.
    """
    make = import_code(name)
    if isinstance(make, nn.Module) or not callable(make):
        raise ConfigError(
            f"backbone {name}: expected a function or class that makes a torch.nn.Module, got "
            f"an object of type {type(make).__name__}"
        )
    offered = {"channels": channels, "image_size": image_size, "embedding_size": embedding_size}
    try:
        wanted = inspect.signature(make).parameters.values()
    except (TypeError, ValueError) as error:
        raise ConfigError(f"backbone {name}: its arguments are not known: {error}") from error
    if not any(argument.kind is argument.VAR_KEYWORD for argument in wanted):
        offered = {a.name: offered[a.name] for a in wanted if a.name in offered}
    try:
        body = make(**offered)
    except Exception as error:
        called = ", ".join(f"{key}={value}" for key, value in offered.items())
        raise ConfigError(f"backbone {name}: {name}({called}) fails: {one_line(error)}") from error
    if not isinstance(body, nn.Module):
        raise ConfigError(
            f"backbone {name}: expected it to make a torch.nn.Module, got {type(body).__name__}"
        )
    return body


def conv4_width(name: str | None) -> int | None:
    """The width of a `conv4` by its name; None if it is the name of something else."""
    own = re.fullmatch(r"conv4(?:-([1-9][0-9]{0,4}))?", name or "")
    return None if own is None else int(own[1] or 64)


def weights_size(name: str) -> int | None:
    """The side of the images that a timm model's weights were made for, by a backbone's name.

    The size of training (``input_size``). Where timm states a larger one for tests, a network that
    goes on to train has no use for it, and each step takes longer. None: no model of timm, or one
    that states none.

    Raises:
        ConfigError: an unknown model; timm missing or unusable.
    """
    if not name.startswith("timm:"):
        return None
    published = _published(name.removeprefix("timm:"))
    return None if published is None else int(published.input_size[-1])


def _published(name: str) -> Any:
    """What timm states of a model's weights (``PretrainedCfg``); None where it states nothing."""
    timm = import_extra("timm", "timm")
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=5)
        hint = f"near it: {', '.join(near)}" if near else "timm.list_models() lists them"
        raise ConfigError(f'timm has no model "{name}"; {hint}')
    try:
        return timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        plain, _, tag = name.partition(".")
        tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{plain}.*")]
        among = f"one of {', '.join(tags)}" if tags else "none"
        raise ConfigError(
            f'timm has no weights "{tag}" of {plain}; expected {among} after the dot, or '
            f'"timm:{plain}"'
        ) from error


def _timm_model(name: str, channels: int, image_size: int, pretrained: bool) -> nn.Module:
    timm, published = import_extra("timm", "timm"), _published(name)
    settings: dict[str, Any] = {"num_classes": 0, "in_chans": channels, "pretrained": pretrained}
    if published is not None and published.fixed_input_size:
        settings["img_size"] = image_size
    try:
        model = _without_dropout(timm.create_model, name, settings)
    except (RuntimeError, OSError, ValueError, TypeError, AssertionError) as error:
        what = "with its pretrained weights " if pretrained else ""
        size = size_hint(published and published.to_dict(), image_size)
        raise ConfigError(
            f'timm cannot build "{name}" {what}for {channels} channels at {image_size} px: '
            f"{one_line(error)}{size}"
            + ("; without a network give a file with them, --weights FILE" if pretrained else "")
        ) from error
    for part in model.modules():
        # Some models have a share of their own.
        if isinstance(part, nn.modules.dropout._DropoutNd):
            part.p = 0.0
    return model


def _without_dropout(
    create: Callable[..., nn.Module], name: str, settings: dict[str, Any]
) -> nn.Module:
    """The model without dropout and without paths left out, as far as its class knows of them."""
    settings = {**settings, "drop_rate": 0.0, "drop_path_rate": 0.0}
    while True:
        try:
            return create(name, **settings)
        except TypeError as error:
            unknown = re.search(r"unexpected keyword argument.*'(drop_(?:path_)?rate)'", str(error))
            if unknown is None or unknown[1] not in settings:
                raise
            del settings[unknown[1]]
