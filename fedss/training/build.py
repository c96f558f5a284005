"""From a configuration to the things it names: data, model, optimizer, plan of a round."""

import math
import os
from dataclasses import fields, replace
from functools import partial
from typing import TypeVar

import torch
from torch import nn

from fedss.config import OPTIONS, Auto, Config, option_numbers
from fedss.core.client import LocalTraining, RoundPlan
from fedss.core.defence import Defence
from fedss.core.optimizers import ServerOptimizer
from fedss.core.privacy import Clipping, Noise
from fedss.data import (
    VALIDATION_CLASSES,
    DataOptions,
    Dataset,
    Images,
    RetrievalTask,
    count_own_classes,
    load_dataset,
    rotate_classes,
    split_clients,
)
from fedss.data.augment import find_augmentation
from fedss.errors import ConfigError, DataError
from fedss.losses.methods import METHODS
from fedss.losses.softmax import Objective, Scoring
from fedss.models import Embedder, build_embedder
from fedss.own_code import import_code
from fedss.privacy import first_norm
from fedss.sampling.samplers import SAMPLERS, Sampler, find_sampler
from fedss.seeds import generator
from fedss.settings import auto_sample_size, resolve, usual_images
from fedss.wire.messages import WireFormat

T = TypeVar("T")


def load_data(config: Config, *, at_site: bool = False) -> Dataset:
    """The data set that a configuration names.

    Its training images are reassigned to clients (``partition``), then rotated (``rotations``),
    then clients of many classes are split (``client_classes``), as far as it says so. Where
    ``eval_split`` is validation and the data name no images for it, a share
    ``VALIDATION_CLASSES`` of the training classes is held out first. ``at_site`` is that of
    :func:`fedss.data.load_dataset`.

    Raises:
        DataError: it cannot be found or read, or does not fit together.
    """
    config = usual_images(config)
    options = {field.name for field in fields(DataOptions)} & {o.name for o in OPTIONS}
    data = load_dataset(
        config.data,
        config.data_path,
        seed=config.data_seed,
        validation_classes=VALIDATION_CLASSES if config.eval_split == "validation" else 0.0,
        at_site=at_site,
        **{name: getattr(config, name) for name in options - {"seed"}},
    )
    if not len(data.train):
        return data
    if config.rotations:
        # No files are turned images.
        data = replace(data, train=rotate_classes(data.train), decode_again=None)
    if config.client_classes is not None:
        train = split_clients(data.train, config.client_classes, config.data_seed)
        data = replace(data, train=train)
    return data


def sample_size(config: Config, num_classes: int) -> int:
    """``|S|``.

    Raises:
        ConfigError: ``sample_size`` is above n.
    """
    size = config.sample_size
    if size == "auto":
        size = auto_sample_size(num_classes, requests=config.requests)
    if size > num_classes:
        raise ConfigError(
            f"sample_size: expected 2 to n = {num_classes}, the number of training classes "
            f"(n means full), got {size}"
        )
    return size


def resolved(value: T | Auto) -> T:
    """A setting of a configuration in which none is ``auto`` any more.

    Raises:
        ConfigError: it still is.
    """
    if value == "auto":
        raise ConfigError("expected a number in place of 'auto'; call fedss.settings.resolve first")
    return value


def build_model(config: Config, data: Dataset, backbone: nn.Module | None) -> Embedder:
    """The model for these images; ``backbone``, if given, in place of ``config.backbone``."""
    _, channels, image_size, _ = data.train.pixels.shape
    return model_for(config, channels, image_size, backbone)


def model_for(
    config: Config, channels: int, image_size: int, backbone: nn.Module | None = None
) -> Embedder:
    """As :func:`build_model`, for images of so many channels and pixels a side."""
    config, _ = resolve(config, None)
    return build_embedder(
        backbone if backbone is not None else config.backbone,
        channels=channels,
        image_size=image_size,
        embedding_size=resolved(config.embedding_size),
        seed=config.seed,
        pretrained=config.pretrained,
        weights=config.weights,
        trainable=resolved(config.trainable),
        batch_norm=config.batch_norm,
        pixel_mean=option_numbers(config, "pixel_mean"),
        pixel_std=option_numbers(config, "pixel_std"),
        whitened=resolved(config.projection_init) == "whitened",
    )


def compute_device(config: Config) -> torch.device:
    """Where clients train; ``cuda`` is the GPU of this process's number where torchrun started it.

    Raises:
        ConfigError: this machine has no such device.
    """
    device = torch.device(config.device)
    if device.type == "cuda":
        number = device.index if device.index is not None else int(os.environ.get("LOCAL_RANK", 0))
        device, count = torch.device("cuda", number), torch.cuda.device_count()
        if number >= count:
            others = f"up to cuda:{count - 1}" if count else "install a CUDA build of torch"
            raise ConfigError(
                f"device: {config.device} means GPU {number} of this machine, where torch "
                f"{torch.__version__} finds {count}; use cpu, or {others}"
            )
    return device


def server_optimizer(config: Config) -> ServerOptimizer:
    """The configuration's server optimizer; pooled training is its one client's SGD alone."""
    method = METHODS[config.method]
    if method.pooled:
        return ServerOptimizer("sgd", lr=1.0, normalize_rows=config.normalize_rows)
    return ServerOptimizer(
        config.server_optimizer,
        config.server_lr,
        resolved(config.server_momentum),
        config.server_second_momentum,
        config.server_epsilon,
        config.normalize_rows,
        method.row_optimizer,
        resolved(config.server_row_lr),
    )


def defence(config: Config) -> Defence:
    """What the server does about clients that misbehave. Pooled training has no clients.

    In a run with noise there is clipping alone: whether one client's update counts, and
    for how much, must not depend on another's.
    """
    if METHODS[config.method].pooled or config.noise:
        return Defence()
    return Defence(config.norm_bound, config.weight_cap, config.aggregate)


def wire_format(config: Config, embedder: Embedder, num_classes: int) -> WireFormat:
    """How messages travel. Pooled training sends none."""
    layout = tuple(p.shape for p in embedder.parameters() if p.requires_grad)
    dim = embedder.spec.embedding_size
    if METHODS[config.method].pooled:
        return WireFormat(layout, dim, num_classes)
    formats = config.rows_down, config.rows_up, config.backbone_down, config.backbone_up
    return WireFormat(layout, dim, num_classes, *formats, config.moments_rank)


def scoring(config: Config) -> Scoring:
    """How the configuration makes logits of cosines."""
    return Scoring(config.scale, config.margin_kind, config.margin, config.correction)


def named_objective(config: Config) -> Objective | None:
    """The loss of a user's own that the configuration names, if it names one.

    Raises:
        ConfigError: there is none of that name.
    """
    if config.objective is None:
        return None
    found = import_code(config.objective)
    if not callable(found) or isinstance(found, type):
        raise ConfigError(
            f"objective {config.objective}: expected a function, such as those of "
            f"fedss.losses.softmax, got {type(found).__name__}"
        )
    loss: Objective = found
    return loss


def chosen_sampler(config: Config, given: Sampler | None = None) -> Sampler:
    """The sampler of a run: the ``given`` one, or the configured one. Where there is nothing to
    choose, the client draws: the server need not know its own classes.

    Raises:
        ConfigError: there is none of that name, or it does not go with ``requests``.
    """
    negatives = METHODS[config.method].negatives
    if negatives != "sampled" and not (negatives == "cover" and config.cover):
        return SAMPLERS["uniform"]
    chosen = given or find_sampler(config.sampler)
    if config.requests == "common" and given is not None:
        raise ConfigError(
            f"sampler {chosen.name!r}: with requests common all clients have one set, and none "
            "draws; leave it out"
        )
    if config.requests == "all" and chosen.drawn_by == "server":
        raise ConfigError(
            f"sampler {chosen.name!r}: the server draws, and must be told own classes for it; with "
            "requests all take one that clients draw by, such as uniform"
        )
    return chosen


def round_plan(
    config: Config,
    num_classes: int,
    round: int,
    sampler: Sampler | None = None,
    objective: Objective | None = None,
    secret: bytes | None = None,
) -> RoundPlan:
    """The plan of a round (0-based), which its clients get; learning rates decay over the rounds.

    ``sampler`` and ``objective``, if given, are used in place of the configured ones; ``secret`` is
    :attr:`RoundPlan.secret`.

    Before ``lr_decay_start`` the factor is 1; then, with x from 0 to 1 over the rest of the
    rounds, it is ``1 - x`` (linear) or ``(1 + cos(pi x)) / 2`` (cosine).
    """
    start = config.lr_decay_start * config.rounds
    x = max(0.0, (round - start) / max(config.rounds - start, 1))
    factor = {"constant": 1.0, "linear": 1 - x, "cosine": (1 + math.cos(math.pi * x)) / 2}
    decay = factor[config.lr_schedule]
    method = METHODS[config.method]
    objective = objective or named_objective(config)
    if objective is not None:
        method = replace(method, objective=objective, payload=None, absent=None)
    if method.server_step is not None:
        settings = {name: getattr(config, name) for name in method.server_settings}
        method = replace(method, server_step=partial(method.server_step, **settings))
    return RoundPlan(
        round,
        config.seed,
        method,
        chosen_sampler(config, sampler),
        num_classes,
        sample_size(config, num_classes),
        config.cover,
        scoring(config),
        LocalTraining(
            config.local_epochs,
            config.local_steps,
            resolved(config.batch_size),
            decay * resolved(config.client_lr),
            decay * resolved(config.class_row_lr),
        ),
        find_augmentation(config.augment),
        secret,
        # Who asks for all classes anyway gets them as it is.
        "own" if method.negatives == "all" else config.requests,
        clipping(config),
    )


def clipping(config: Config) -> Clipping | None:
    """How the configuration bounds updates, if it does."""
    if config.clip is None:
        return None
    norm, adaptive = first_norm(config.clip)
    return Clipping(norm, adaptive, config.row_clip, private=config.noise > 0)


def noise_of(config: Config, key: bytes | None) -> Noise | None:
    """What the configuration hides a client's part in, if it does; keyed by ``key``."""
    return Noise(config.noise, config.clients_per_round, key) if config.noise else None


def pool_images(images: Images, cohort_size: int, seed: int) -> Images:
    """Images assigned at random to as few clients as there are cohorts.

    One of them per round is central SGD, with as many images as a cohort holds on average.
    """
    shards = max(1, len(images.client_names) // cohort_size)
    order = generator(seed, "pool").permutation(len(images))
    return replace(
        images, clients=order % shards, client_names=[f"pool {k}" for k in range(shards)]
    )


def check_trainable(data: Dataset) -> None:
    """Raise a DataError if there are no training images."""
    if not len(data.train):
        raise DataError(
            f"data set {data.name!r} has no training images, only images to test with: give "
            "some the split 'train'. To judge a trained model on them: fedss evaluate"
        )


def check_own_classes(config: Config, data: Dataset) -> None:
    """Raise a ConfigError if clients are to tell their own classes apart, and all have but one."""
    if METHODS[config.method].local_rows and int(count_own_classes(data.train).max()) == 1:
        raise ConfigError(
            f"method: {config.method} has clients tell their own classes apart, and each of them "
            "has one; take fedss, whose rows come from the server"
        )


def evaluation_task(config: Config, data: Dataset) -> RetrievalTask:
    """The retrieval task that ``config.eval_split`` names.

    Raises:
        ConfigError: the data set has no validation task.
        DataError: it has no test.
    """
    if config.eval_split == "test":
        if data.test is None:
            raise DataError(
                f"nothing to evaluate: data set {data.name!r} has no test images. List some with "
                "the split 'test', or hold out a share test_classes of the classes, above 0 and "
                f"below 1; it is {config.test_classes}. To train on all classes without a test: 0"
            )
        return data.test
    if data.validation is None:
        raise ConfigError(
            f"eval_split: data set {data.name!r} has no validation images; use test, or hold out "
            f"a share of its classes: validation_classes={VALIDATION_CLASSES} where it is made "
            "(fedss.Dataset.from_arrays, say), or in fedss.data.load_dataset"
        )
    return data.validation


def task_in_training(config: Config, data: Dataset) -> RetrievalTask | None:
    """:func:`evaluation_task`, or None where no test is wanted: ``test_classes`` is 0, and the data
    set lists none.

    Raises:
        ConfigError, DataError: as :func:`evaluation_task`.
    """
    unwanted = config.test_classes == 0 and config.eval_split == "test"
    return None if unwanted and data.test is None else evaluation_task(config, data)


def num_parameters(embedder: Embedder, trained: bool = True) -> int:
    """Number of parameters that are trained and sent, or of those that are neither."""
    return sum(p.numel() for p in embedder.parameters() if p.requires_grad == trained)
