"""Settings that follow from the problem: what ``auto`` means."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedss.choices import RowRequests
from fedss.config import Config
from fedss.data import DATASETS, Dataset, count_own_classes, usual_side
from fedss.losses.methods import METHODS
from fedss.models.backbones import weights_size
from fedss.privacy import default_delta


@dataclass(frozen=True)
class Problem:
    """What is known of the training images before the first round.

    Attributes:
        classes: n.
        clients: N.
        images: of a client, on average.
        own_classes: of a client, on average.
        image_size: their side in pixels; None: that of the data set as ``image_size`` reads it.
    """

    classes: int
    clients: int
    images: float
    own_classes: float
    image_size: int | None = None


@dataclass(frozen=True)
class Setting:
    """The value that an ``auto`` stands for, and why."""

    value: Any
    why: str


def problem_of(data: Dataset) -> Problem:
    """What the rules ask about a data set."""
    train = data.train
    clients = len(train.client_names)
    own = float(np.mean(count_own_classes(train)))
    side = train.pixels.shape[2]
    return Problem(len(train.class_names), clients, len(train) / clients, own, side)


def resolve(config: Config, problem: Problem | None) -> tuple[Config, dict[str, Setting]]:
    """The configuration with a number for each ``auto``, and the reason of each.

    With K of N clients a round, R rounds, n classes, and clients that have P own classes and train
    on I images in a round, on average::

        trainable        all; with trained weights head
        projection_init  random; with trained weights whitened, unless there is noise
        rows_init        random; means where the projection is whitened (not local-heads)
        embedding_size   64; 512 where the projection is whitened
        batch_size       B = 8; 128 for the last blocks of trained weights (last-K)
        server_momentum  b = 1 - 2 (1 / K - 1 / N), within [0, 0.9]; from random weights at most
                         1 - 0.3 / T, T local steps in a round
        client_lr        0.05; where the projection is whitened at most 60 (1 - b) / (R T)
                         (central 120 / (R K T))
        class_row_lr     1 / m (central 2 / m, local-heads 4 / m)
                         m = sqrt(max(1, I / P)) max(1, B / P): a client has I / P images of
                         a class in a round, and B / P in a batch
        server_row_lr    g K (1 - b), g = max(1/2, min(40 / E, max(1, E / 2), T))
                         E = R K I / n: how often a class is seen in training
                         (rows by holders, adam, class_row_lr given, central: server_lr)
        sample_size      max(64, 2.4 sqrt(n), 2 P), at most n; with requests common max(64, n / 2)
        row_mean         the method's; with noise cohort
        delta            N^-1.1, where there is noise
        eval_every       R / 8, rounded down, from 1 to 20
        image_size       what trained weights were made for, else the data set's own

    A round's mean is divided by K, and momentum adds up 1 / (1 - b) rounds: g is how far a row
    moves at the server for what one client has learnt of it. docs/settings.md has the reasons and
    the evidence.

    Args:
        config: a configuration; what is not ``auto`` stays.
        problem: None where the data are not known, as in a federation. Then 1 / N = 0, g = 1,
            m = 1, 80 images a client in T, and ``sample_size`` stays ``auto``: it follows from n in
            each round.
    """
    settings: dict[str, Setting] = {}
    for name, rule in _RULES.items():
        if getattr(config, name) == "auto" and (setting := rule(config, problem)):
            settings[name] = setting
            config = replace(config, **{name: setting.value})
    return config, settings


def _has_weights(config: Config) -> bool:
    return config.pretrained or config.weights is not None


def _trainable(config: Config, problem: Problem | None) -> Setting:
    if _has_weights(config):
        return Setting("head", "trained weights: what is frozen is computed once, and never sent")
    return Setting("all", "the backbone has no trained weights")


def _projection_init(config: Config, problem: Problem | None) -> Setting:
    if config.noise:
        return Setting("random", "to whiten takes sums of all clients, which no noise hides")
    if _has_weights(config):
        return Setting("whitened", "trained weights: a random projection would lose of them")
    return Setting("random", "the backbone has no trained weights")


def _rows_init(config: Config, problem: Problem | None) -> Setting:
    if METHODS[config.method].local_rows:
        return Setting("random", "the server keeps no class rows")
    if config.projection_init == "whitened":
        return Setting("means", "the projection is whitened: embeddings are of use from the start")
    return Setting("random", "embeddings of an untrained network are not of use")


def _embedding_size(config: Config, problem: Problem | None) -> Setting:
    if config.projection_init == "whitened":
        return Setting(512, "axes of whitened features")
    return Setting(64, "the projection is random")


def _batch_size(config: Config, problem: Problem | None) -> Setting:
    blocks, pooled = config.trainable.startswith("last-"), METHODS[config.method].pooled
    if _has_weights(config) and blocks and not pooled:
        return Setting(128, "steps on a few classes' images lead trained blocks astray")
    return Setting(8, "many steps a round")


def _server_momentum(config: Config, problem: Problem | None) -> Setting:
    cohort = config.clients_per_round
    # The variance of a mean of K out of N, without replacement, falls with 1 / K - 1 / N.
    left_out = max(0.0, 1 / cohort - (1 / problem.clients if problem else 0.0))
    value = min(0.9, max(0.0, 1 - 2 * left_out))
    of = f" of {problem.clients}" if problem else ""
    why = f"1 - 2 (1 / K - 1 / N), at most 0.9: {cohort}{of} clients a round"
    if config.projection_init != "whitened":
        steps = _local_steps(config, problem)
        if (bound := 1 - 0.3 / steps) < value:
            value, why = bound, f"at most 1 - 0.3 / T: {steps:.3g} local steps in a round"
    return Setting(_rounded(value), why)


_USUAL_IMAGES = 80
"""Images of a client, where they are not known."""


def _local_steps(config: Config, problem: Problem | None) -> float:
    """T, the batches of a client in a round."""
    if config.local_steps is not None:
        return config.local_steps
    assert config.batch_size != "auto"  # resolved before
    images: float = _USUAL_IMAGES
    if problem is not None:
        images = problem.images * _share_in_set(config, problem)
    return config.local_epochs * max(1.0, images / config.batch_size)


def _client_lr(config: Config, problem: Problem | None) -> Setting:
    value, why = 0.05, "the same for all: it bounds how far clients drift apart"
    if config.projection_init != "whitened":
        return Setting(value, why)
    assert config.server_momentum != "auto"  # resolved before
    pooled = METHODS[config.method].pooled
    momentum = 0.0 if pooled or config.server_optimizer == "sgd" else config.server_momentum
    steps = config.rounds * _local_steps(config, problem)
    steps *= config.clients_per_round if pooled else 1
    moves = 120 if pooled else 60
    bound = moves * (1 - momentum) / steps
    if bound < value:
        value, why = (
            bound,
            f"{moves} (1 - b) / {steps:.0f} local steps: how far the projection moves",
        )
    return Setting(_rounded(value), why)


def _class_row_lr(config: Config, problem: Problem | None) -> Setting:
    step = METHODS[config.method].class_row_lr
    together = _images_together(config, problem) if problem else 1.0
    return Setting(_rounded(step / together), f"{step:g} / m, m = {together:.3g} images at once")


def _server_row_lr(config: Config, problem: Problem | None) -> Setting:
    method, momentum = METHODS[config.method], config.server_momentum
    if config.class_row_lr != "auto":
        return Setting(config.server_lr, "server_lr: class_row_lr is given")
    if method.pooled or config.server_optimizer == "adam":
        return Setting(config.server_lr, "server_lr: nothing is divided by K that counts")
    if config.row_mean == "holders":
        return Setting(config.server_lr, "server_lr: a row is divided by its holders alone")
    assert momentum != "auto"  # resolved before
    gain, why = _row_gain(config, problem)
    value = gain * config.clients_per_round
    value *= 1 if config.server_optimizer == "sgd" else 1 - momentum
    return Setting(_rounded(value), f"g K (1 - b) with g = {gain:.2g}: {why}")


def _row_gain(config: Config, problem: Problem | None) -> tuple[float, str]:
    """g, how far a class row moves at the server for one client's change of it, and why."""
    if problem is None:
        return 1.0, "the images are not known before the first round"
    images = _images_in_a_round(config, problem) * _share_in_set(config, problem)
    seen = config.rounds * config.clients_per_round * images / problem.classes
    steps = _local_steps(config, problem)
    gain = max(0.5, min(40 / seen, max(1.0, seen / 2), steps))
    return gain, f"a class is seen {seen:.3g} times, in {steps:.3g} steps of a client"


def _images_in_a_round(config: Config, problem: Problem) -> float:
    assert config.batch_size != "auto"  # resolved before
    if config.local_steps is not None:
        return config.local_steps * min(config.batch_size, problem.images)
    return config.local_epochs * problem.images


def _share_in_set(config: Config, problem: Problem) -> float:
    """Of a client's images, how many it trains on where a set of classes is common to a round."""
    if config.requests != "common":
        return 1.0
    size = config.sample_size
    if size == "auto":
        size = auto_sample_size(problem.classes, requests="common")
    return min(1.0, size / problem.classes)


def _images_together(config: Config, problem: Problem) -> float:
    assert config.batch_size != "auto"  # resolved before
    batch = min(config.batch_size, problem.images)
    of_class = max(1.0, _images_in_a_round(config, problem) / problem.own_classes)
    return math.sqrt(of_class) * max(1.0, batch / problem.own_classes)


def _row_mean(config: Config, problem: Problem | None) -> Setting:
    method = METHODS[config.method]
    if config.noise:
        return Setting("cohort", "how many hold a row is not hidden in noise")
    return Setting(method.row_mean, f"that of method {method.name}")


def _delta(config: Config, problem: Problem | None) -> Setting | None:
    if not config.noise or problem is None:
        return None
    return Setting(default_delta(problem.clients), f"N^-1.1 for {problem.clients} clients")


def _sample_size(config: Config, problem: Problem | None) -> Setting | None:
    if problem is None:
        return None  # It follows from n, in each round.
    n, own = problem.classes, problem.own_classes
    if config.requests == "common":
        why = f"max(64, n / 2) with n = {n}, at most n: each client trains on half of its images"
        return Setting(auto_sample_size(n, requests="common"), why)
    why = f"max(64, 2.4 sqrt(n), 2 P) with n = {n} and P = {own:.3g}, at most n"
    return Setting(auto_sample_size(n, own), why)


def auto_sample_size(
    num_classes: int, own_classes: float = 0.0, requests: RowRequests = "own"
) -> int:
    """``|S|`` where it is ``auto``: ``max(64, 2.4 sqrt(n), 2 P)``, at most n.

    Of a set that is common to a round it is ``max(64, n / 2)``. Then a client trains on half of its
    images, on average, so for as much training there are twice the rounds. That moves as many
    class rows as with all n in each round, and the backbone twice; a smaller set moves the backbone
    n / |S| times.
    """
    if requests == "common":
        return min(num_classes, max(64, math.ceil(num_classes / 2)))
    return min(num_classes, int(max(64, 2.4 * math.sqrt(num_classes), 2 * own_classes)))


def _eval_every(config: Config, problem: Problem | None) -> Setting:
    value = auto_eval_every(config.rounds)
    return Setting(value, f"R / 8 of {config.rounds} rounds, at most 20: 8 evaluations or more")


def auto_eval_every(rounds: int) -> int:
    """Rounds between evaluations where that is ``auto``: R / 8, from 1 to 20."""
    return min(20, max(1, rounds // 8))


def usual_images(config: Config) -> Config:
    """The configuration with what is read of images where it does not say: their size, and colour
    for trained weights, which expect it. ``channels`` may stay None: then the images decide.
    """
    trained = config.pretrained or config.weights is not None
    drawn = config.data in DATASETS and DATASETS[config.data].grayscale
    if config.channels is None and trained and config.backbone.startswith("timm:") and not drawn:
        config = replace(config, channels=3)
    if config.image_size == "auto":
        config = replace(config, image_size=_usual_size(config).value)
    return config


def small_images(config: Config, image_size: int, measured: bool = False) -> str | None:
    """A warning, if images are smaller than the trained weights were made for; ``measured``: the
    run has floors at their size."""
    made = made_for(config)
    if made is None or image_size >= made:
        return None
    floors = f"; the floors at {made} px, beside the result, say what it is worth"
    return (
        f"the weights of {config.backbone} were made for images of {made} px and get {image_size}: "
        f"their features tell less apart. --image-size {made} enlarges smaller images, too, and "
        f"takes longer{floors if measured else ''}"
    )


def _image_size(config: Config, problem: Problem | None) -> Setting:
    usual = _usual_size(config)
    if problem is None or problem.image_size in (None, usual.value):
        return usual
    return Setting(problem.image_size, "the images come with this size (data=)")


def _usual_size(config: Config) -> Setting:
    made = made_for(config)
    if made is not None:
        return Setting(made, f"what the weights of {config.backbone} were made for")
    return Setting(usual_side(config.data), f"what is usual for the data set {config.data}")


def made_for(config: Config) -> int | None:
    """The side of the images that the trained weights were made for; None where none is known."""
    return weights_size(config.backbone) if _has_weights(config) else None


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


# In this order: some depend on projection_init, and some on server_momentum.
_RULES: Mapping[str, Callable[[Config, Problem | None], Setting | None]] = {
    "trainable": _trainable,
    "projection_init": _projection_init,
    "rows_init": _rows_init,
    "embedding_size": _embedding_size,
    "batch_size": _batch_size,
    "server_momentum": _server_momentum,
    "client_lr": _client_lr,
    "row_mean": _row_mean,
    "server_row_lr": _server_row_lr,  # before class_row_lr, to see whether that is given
    "class_row_lr": _class_row_lr,
    "delta": _delta,
    "sample_size": _sample_size,
    "eval_every": _eval_every,
    "image_size": _image_size,
}
