"""A user's own sampler, loss and augmentation, before training; and the name of such a loss."""

import hashlib
from functools import partial

import torch

from fedss.config import Config
from fedss.core.client_stacked import stacked_losses
from fedss.data.augment import check_augmentation
from fedss.errors import ConfigError
from fedss.losses.methods import METHODS
from fedss.losses.softmax import ClassSample, Objective, completed_softmax, sampled_softmax
from fedss.sampling.samplers import find_sampler
from fedss.training.build import chosen_sampler, named_objective, scoring

_LONGEST = 100  # characters of a partial's arguments that are shown as they are


def objective_name(objective: Objective) -> str:
    """A loss's name, by which a run knows it again: that of its function, or of its class.

    Of a ``functools.partial`` it is the function's name with the arguments, such as
    ``smoothed(0.1, rest='mean')``, or with a SHA-256 of them where they are long.

    Raises:
        ConfigError: a lambda, or a partial of one or with arguments that cannot be told from
            others.
    """
    if isinstance(objective, partial):
        arguments = [_described(value) for value in objective.args]
        arguments += [
            f"{key}={_described(value)}" for key, value in sorted(objective.keywords.items())
        ]
        inside = ", ".join(arguments)
        if len(inside) > _LONGEST:
            inside = f"sha256 {hashlib.sha256(inside.encode()).hexdigest()[:16]}"
        return f"{objective_name(objective.func)}({inside})"
    name = getattr(objective, "__name__", type(objective).__name__)
    if name == "<lambda>":
        raise ConfigError(
            "objective: expected a function with a name, by which a run knows its loss again, got "
            "a lambda; give it a name with def"
        )
    return name


def _described(value: object) -> str:
    """An argument of a partial as text, the same in every process."""
    # No repr of other objects: some hold an address, some leave most of the numbers out.
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"{type(value).__name__}({', '.join(map(_described, value))})"
    if isinstance(value, torch.Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest = hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
        return f"{value.dtype}{list(value.shape)} sha256 {digest}"
    raise ConfigError(
        "objective: expected a partial of numbers, strings, tensors and lists of these, by which a "
        f"run knows its loss again, got one of type {type(value).__name__}; give it a name with def"
    )


def check_own_code(config: Config, shape: tuple[int, ...], objective: Objective | None) -> None:
    """Try what a configuration names: sampler, loss and augmentation of images [C, H, W].

    ``config`` has numbers in place of ``auto``, see :func:`fedss.settings.resolve`; ``objective``,
    if given, takes the place of its loss.

    Raises:
        ConfigError: it is not there, or is none.
    """
    find_sampler(config.sampler)
    chosen_sampler(config)
    check_augmentation(config.augment, shape)
    if objective is not None:
        check_objective(config, objective, objective_name(objective))
    elif (named := named_objective(config)) is not None:
        check_objective(config, named, str(config.objective))


def check_objective(config: Config, objective: Objective, name: str) -> None:
    """Try a loss of a user's own on two clients of two images and three classes.

    Raises:
        ConfigError: the method is made by its loss, or this is none; says what came.
    """
    named = f"objective {name!r}"
    losses = sampled_softmax, completed_softmax
    if METHODS[config.method].objective not in losses:
        free = [name for name, method in METHODS.items() if method.objective in losses]
        raise ConfigError(
            f"{named}: method {config.method} is what its own loss makes of it; expected method "
            f"to be one of {', '.join(free)}"
        )
    h_KBD = torch.eye(4).view(2, 2, 4).requires_grad_()
    rows_KSD = torch.linspace(-1, 1, 24).view(2, 3, 4).requires_grad_()
    target_KB = torch.tensor([[0, 2], [2, 2]])
    own_S = torch.tensor([True, False, True])
    sample = ClassSample(torch.arange(3), torch.where(own_S, 0.0, -1.0), own_S)
    scored = scoring(config)
    before = torch.get_rng_state()
    try:
        loss_B = objective(h_KBD[0], rows_KSD[0], target_KB[0], sample, scored, None)
    except Exception as error:
        raise ConfigError(f"{named} fails: {type(error).__name__}: {error}") from error
    if not isinstance(loss_B, torch.Tensor) or loss_B.shape != (2,):
        came = list(loss_B.shape) if isinstance(loss_B, torch.Tensor) else type(loss_B).__name__
        raise ConfigError(f"{named}: expected a tensor with a loss per image, [2], got {came}")
    if not torch.equal(before, torch.get_rng_state()):
        raise ConfigError(
            f"{named} draws random numbers from torch's global generator, so that results would "
            "depend on the number and order of workers"
        )
    for tensor, what in ((h_KBD, "embeddings h_BD"), (rows_KSD, "class rows rows_SD")):
        total = loss_B.sum()
        if (
            not total.requires_grad
            or torch.autograd.grad(total, tensor, retain_graph=True, allow_unused=True)[0] is None
        ):
            raise ConfigError(f"{named} has no gradient with respect to the {what}")
    if config.stack > 1:
        try:
            stacked_losses(objective, scored, h_KBD, rows_KSD, target_KB, [sample] * 2)
        except Exception as error:
            reason = str(error).strip().splitlines()
            raise ConfigError(
                f"stack: torch.func.vmap cannot run {named} for several clients at once; leave "
                f"--stack out. It said: {type(error).__name__}: {reason[0] if reason else ''}"
            ) from error
