"""One typed configuration for Python, the command line and the run folder."""

import dataclasses
import difflib
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from inspect import cleandoc
from typing import Any, Literal, get_args, get_type_hints

from fedss.choices import (
    METHOD_SUMMARIES,
    MOMENT_METHODS,
    SAMPLER_NAMES,
    Aggregate,
    Augment,
    BatchNormRule,
    ForwardPrecision,
    MarginKind,
    Precision,
    ProjectionInit,
    RowDtype,
    RowMean,
    RowRequests,
    RowsInit,
    ServerOptimizerKind,
    fault_of_requests,
    is_trainable,
)
from fedss.errors import ConfigError
from fedss.own_code import CODE_FIELDS, FORM, is_code
from fedss.privacy import check_privacy

Auto = Literal["auto"]
"""Follows from the data, see :func:`fedss.settings.resolve`."""
Schedule = Literal["constant", "linear", "cosine"]
RowStore = Literal["memory", "file"]
EvalSplit = Literal["test", "validation"]

_FIRST_OF_GROUP = {
    "data": "data",
    "method": "method",
    "backbone": "model",
    "rounds": "training",
    "clip": "privacy",
    "rows_down": "wire",
    "row_dtype": "server",
    "seed": "run",
}

_CHOICES = {"sampler": SAMPLER_NAMES, "augment": get_args(Augment)}


@dataclass(frozen=True)
class Config:
    """Everything that decides what a run does. Each field is an option of the command line.

    Attributes:
        data: glyphs, omniglot, csv, folder (told from data_path), or of docs/datasets.md
        data_path: file, folder, zip or tar of the data set (csv: the manifest)
        columns: csv: names of its columns, such as image=path,label=species
        image_size: side that images are resized to (auto: that of the weights; 64, drawings 28)
        channels: 1 for grayscale, 3 for colour (default: 3 if any has colour, or with weights)
        test_classes: share of the classes held out for testing, if the data set has no test split
        skip_broken: leave out unreadable images, and count them
        data_seed: seed of the glyphs, the held-out classes and the assignment to clients
        glyphs_classes: glyphs: number of classes, including test classes
        glyphs_clients: glyphs: number of training clients
        partition: reassign images to clients: classes:K, dirichlet:ALPHA or class
        partition_clients: partition: number of clients
        client_classes: most classes per client; clients with more are split (default: no limit)
        rotations: add images rotated by 90, 180 and 270 degrees, as new classes and clients
        eval_split: split to evaluate on; validation is made of training classes if there is none
        method: training method; fedss.METHODS has a line on each
        sample_size: |S|, class rows per client; moments: most own classes per client
        sampler: how negatives are drawn
        requests: rows asked for: own and negatives, all, or a set common to all of a round
        objective: loss of your own, package.module:function (default: the method's)
        correction: factor a of the correction -a log q of negatives' logits: 1 full, 0 none
        cover: moments: number of decoy classes requested to hide a client's own classes
        scale: s, factor of the cosines in the softmax (inverse temperature)
        margin_kind: margin of the softmax
        margin: size of the margin, in units of the cosine (cosface) or in radians (arcface)
        row_mean: clients that a class row's update is averaged over
        normalize_rows: scale class rows to length 1 after each update
        spread_out_weight: fedaws: weight of the step that spreads class rows out
        spread_out_margin: fedaws: smallest cosine distance between class rows to aim for
        spread_out_neighbours: fedaws: number of nearest rows that each row is pushed away from
        backbone: network: conv4, conv4-<width>, timm:<name> or package.module:function
        pretrained: start from timm's pretrained weights
        weights: file with weights of a timm model: .safetensors, .pth or .pt
        trainable: part that is trained: all, head (the projection) or last-<number> blocks
        batch_norm: batch norm layers (auto: pretrained ones are frozen)
        pixel_mean: mean pixel value per channel that the weights expect, such as 0.485,0.456,0.406
        pixel_std: standard deviation of pixel values per channel that the weights expect
        embedding_size: d, dimension of an embedding (auto: 64, with trained weights up to 512)
        projection_init: whitened: features are whitened by sums that all clients send, before
        rows_init: means: class rows begin with the mean embedding of their class
        rounds: number of rounds
        clients_per_round: cohort size: clients that train in a round
        local_epochs: passes of a client over its images per round
        local_steps: batches of a client per round, in place of local_epochs
        batch_size: images per batch (auto: 8, for trained last-K 128)
        client_lr: learning rate of the backbone at clients
        class_row_lr: learning rate of the class rows at clients
        augment: random changes to training images
        precision: number format of the network's forward pass
        lr_schedule: decay of client_lr and class_row_lr over the rounds
        lr_decay_start: share of the rounds before the decay starts
        server_optimizer: optimizer of the server
        server_lr: learning rate of the server
        server_row_lr: learning rate of the server for class rows
        server_momentum: momentum of the server (adam: beta1)
        server_second_momentum: adam: beta2 of the server
        server_epsilon: adam: epsilon of the server
        clip: largest norm of a client's update, or adaptive[:FIRST] (default: no limit)
        row_clip: norm of its class rows alone; clip is then for the backbone alone
        noise: differential privacy: standard deviation of a sum's noise, in units of clip
        delta: differential privacy: the delta of its epsilon (auto: N^-1.1 for N clients)
        epsilon: differential privacy: the run ends before it spends more (default: no limit)
        rows_down: format of rows and moments sent to clients
        rows_up: format of row updates sent to the server
        backbone_down: format of the backbone sent to clients
        backbone_up: format of its updates sent to the server
        moments_rank: moments: number of eigenvectors sent of the covariance matrix (default: all)
        row_dtype: number format of the class rows kept by the server
        row_store: where the server keeps the class rows
        norm_bound: refuse updates longer than so many times what is usual; 0: none
        weight_cap: most that a client may weigh, in medians of its round; 0: any
        aggregate: mean of clients by images; trimmed mean or median, clients alike
        seed: seed of every random draw of the run
        secret_file: secret that clients' draws are keyed by (default: the seed alone)
        eval_every: rounds between evaluations (auto: 8 or more in a run); 0: only at the end
        patience: evaluations without a better MAP@10 after which a run ends (default: no limit)
        checkpoint_every: rounds between checkpoints
        device: where clients train and embed: cpu, cuda, cuda:1, ...
        stack: clients trained in one call of the network; for GPUs and small networks
        workers: threads that train clients (default: one per core, 1 on a GPU)
        cache_activations: compute the frozen part of the backbone once for each image
        keep_memory: reuse freed memory in the next step: faster (Linux with glibc)

    Raises:
        ConfigError: a value that cannot be, on construction.
    """

    data: str = "glyphs"
    data_path: str | None = None
    columns: str | None = None
    image_size: int | Auto = "auto"
    channels: int | None = None
    test_classes: float = 0.2
    skip_broken: bool = False
    data_seed: int = 0
    glyphs_classes: int = 1280
    glyphs_clients: int = 256
    partition: str | None = None
    partition_clients: int | None = None
    client_classes: int | None = None
    rotations: bool = False
    eval_split: EvalSplit = "test"

    method: str = "fedss"
    sample_size: int | Auto = "auto"
    sampler: str = "uniform"
    requests: RowRequests = "own"
    objective: str | None = None
    correction: float = 1.0
    cover: int = 0
    scale: float = 10.0
    margin_kind: MarginKind = "none"
    margin: float = 0.2
    row_mean: RowMean | Auto = "auto"
    normalize_rows: bool = True
    spread_out_weight: float = 0.1
    spread_out_margin: float = 0.7
    spread_out_neighbours: int = 10

    backbone: str = "conv4-32"
    pretrained: bool = False
    weights: str | None = None
    trainable: str | Auto = "auto"
    batch_norm: BatchNormRule = "auto"
    pixel_mean: str | None = None
    pixel_std: str | None = None
    embedding_size: int | Auto = "auto"
    projection_init: ProjectionInit | Auto = "auto"
    rows_init: RowsInit | Auto = "auto"

    rounds: int = 120
    clients_per_round: int = 20
    local_epochs: int = 1
    local_steps: int | None = None
    batch_size: int | Auto = "auto"
    client_lr: float | Auto = "auto"
    class_row_lr: float | Auto = "auto"
    augment: str = "none"
    precision: ForwardPrecision = "float32"
    lr_schedule: Schedule = "linear"
    lr_decay_start: float = 0.5
    server_optimizer: ServerOptimizerKind = "momentum"
    server_lr: float = 1.0
    server_row_lr: float | Auto = "auto"
    server_momentum: float | Auto = "auto"
    server_second_momentum: float = 0.99
    server_epsilon: float = 1e-3

    clip: str | None = None
    row_clip: float | None = None
    noise: float = 0.0
    delta: float | Auto = "auto"
    epsilon: float | None = None

    rows_down: Precision = "float32"
    rows_up: Precision = "float32"
    backbone_down: Precision = "float32"
    backbone_up: Precision = "float32"
    moments_rank: int | None = None

    row_dtype: RowDtype = "float32"
    row_store: RowStore = "memory"
    norm_bound: float = 20.0
    weight_cap: float = 10.0
    aggregate: Aggregate = "mean"

    seed: int = 0
    secret_file: str | None = None
    eval_every: int | Auto = "auto"
    patience: int | None = None
    checkpoint_every: int = 10
    device: str = "cpu"
    stack: int = 1
    workers: int | None = None
    cache_activations: bool = True
    keep_memory: bool = True

    def __post_init__(self) -> None:
        for name in ("pixel_mean", "pixel_std"):
            value = getattr(self, name)
            if isinstance(value, tuple | list):
                object.__setattr__(self, name, ",".join(map(str, value)))
        if isinstance(self.clip, int | float):
            object.__setattr__(self, "clip", str(self.clip))
        for option in OPTIONS:
            if option.auto and getattr(self, option.name) is None:
                object.__setattr__(self, option.name, "auto")
            _check_type(option, getattr(self, option.name))
        check_choice("method", self.method, METHOD_SUMMARIES)
        for names, valid, expected in _RANGES:
            for name in names.split():
                value = getattr(self, name)
                if value not in (None, "auto") and not valid(value):
                    raise ConfigError(f"{name}: expected {expected}, got {value}")
        option_numbers(self, "pixel_mean")
        option_numbers(self, "pixel_std")
        if self.objective is not None and not is_code(self.objective):
            raise ConfigError(f"objective: expected {FORM}, got {self.objective!r}")
        if self.patience is not None and self.eval_split != "validation":
            raise ConfigError(
                "patience: to choose a round by the test makes its figures too good; take "
                "eval_split validation"
            )
        if self.method in MOMENT_METHODS:
            self._check_moments()
        if fault := fault_of_requests(self.requests, self.method, self.row_mean, self.sampler):
            raise ConfigError(fault)
        check_privacy(self)
        # Last, as their import takes long.
        if (self.partition, self.partition_clients, self.columns) != (None, None, None):
            from fedss.data import parse_columns, parse_partition

            parse_partition(self.partition, self.partition_clients)
            parse_columns(self.columns)

    def __repr__(self) -> str:
        """What differs from the defaults: ``Config(data='csv', rounds=40)``."""
        values = ((option, getattr(self, option.name)) for option in OPTIONS)
        told = (f"{o.name}={value!r}" for o, value in values if value != o.default)
        return f"Config({', '.join(told)})"

    def _check_moments(self) -> None:
        instead = ", or take fedss-published" if self.method == "fedss" else ""
        if not self.normalize_rows:
            raise ConfigError(
                f"normalize_rows: method {self.method} takes rows for unit vectors; leave it on"
                f"{instead}"
            )
        size = self.embedding_size
        if size != "auto" and size > 4096:  # 67 MB for a matrix in float32
            raise ConfigError(
                f"embedding_size: method {self.method} sends matrices of its square, expected at "
                f"most 4096{instead}; got {size}"
            )
        if size != "auto" and self.moments_rank is not None and self.moments_rank >= size:
            raise ConfigError(
                f"moments_rank: expected below embedding_size = {size} (or leave it "
                f"out to send whole matrices), got {self.moments_rank}"
            )


def option_numbers(config: Config, name: str) -> tuple[float, ...] | None:
    """The numbers of an option that holds them as text, separated by commas.

    Raises:
        ConfigError: something else.
    """
    text = getattr(config, name)
    try:
        return None if text is None else tuple(map(float, text.split(",")))
    except ValueError as error:
        raise ConfigError(
            f"{name}: expected numbers separated by commas, such as 0.485,0.456,0.406, got {text!r}"
        ) from error


@dataclass(frozen=True)
class Option:
    """A configuration field for the command line; ``choices`` is empty unless values are listed.

    ``auto``: the default follows from the data. Beside its choices, one of ``CODE_FIELDS`` takes
    the name of own code.
    """

    name: str
    type: type
    optional: bool
    auto: bool
    choices: tuple[str, ...]
    default: Any
    help: str
    group: str

    @property
    def listed(self) -> str:
        """Its choices, for people; empty unless values are listed."""
        code = f" or {FORM}" if self.choices and self.name in CODE_FIELDS else ""
        return f"{', '.join(self.choices)}{code}"


def _options() -> tuple[Option, ...]:
    hints, options, group = get_type_hints(Config), [], ""
    # One source: what help() and an IDE show of the class.
    section = cleandoc(Config.__doc__ or "").partition("Attributes:")[2].partition("\n\n")[0]
    texts = dict(re.findall(r"^    (\w+): (.+)$", section, re.M))
    for item in dataclasses.fields(Config):
        args = get_args(hints[item.name])
        optional, auto = type(None) in args, item.default == "auto" and Auto in args
        values = args[0] if optional or auto else hints[item.name]
        choices = _CHOICES.get(item.name) or get_args(values)
        text = texts[item.name]
        group = _FIRST_OF_GROUP.get(item.name, group)
        kind = str if choices else values
        options.append(Option(item.name, kind, optional, auto, choices, item.default, text, group))
    return tuple(options)


OPTIONS = _options()

_RANGES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("sample_size", lambda v: v >= 2, "at least 2 classes: an own one and a negative"),
    (
        "rounds clients_per_round local_epochs local_steps batch_size workers"
        " checkpoint_every moments_rank client_classes stack patience",
        lambda v: v >= 1,
        "at least 1",
    ),
    ("glyphs_classes glyphs_clients", lambda v: v >= 2, "at least 2"),
    ("image_size", lambda v: 8 <= v <= 4096, "8 to 4096 pixels"),
    ("embedding_size", lambda v: 1 <= v <= 2**20, "1 to 1048576"),
    ("channels", lambda v: v in (1, 3), "1 or 3"),
    (
        "device",
        lambda v: bool(re.fullmatch(r"cpu|cuda(:(0|[1-9]\d?))?", v)),
        "cpu, cuda or cuda:<number>",
    ),
    ("eval_every spread_out_neighbours data_seed seed cover", lambda v: v >= 0, "0 or more"),
    (
        "client_lr class_row_lr server_lr server_row_lr server_epsilon",
        lambda v: 0 < v <= 1e30,
        "a number above 0 and at most 1e30",
    ),
    ("norm_bound weight_cap", lambda v: v == 0 or 1 <= v <= 1e30, "0 (none), or 1 or more"),
    # Above, rounding of a cosine in float32 decides.
    ("scale", lambda v: 0 < v <= 1e6, "a number above 0 and at most 1e6"),
    ("correction", lambda v: 0 <= v <= 1, "0 (none) to 1 (full)"),
    ("margin spread_out_weight spread_out_margin", lambda v: 0 <= v <= 2, "0 to 2"),
    ("server_momentum server_second_momentum", lambda v: 0 <= v < 1, "0 or more and below 1"),
    ("lr_decay_start", lambda v: 0 <= v <= 1, "0 to 1"),
    ("row_clip epsilon", lambda v: 0 < v <= 1e30, "a number above 0 and at most 1e30"),
    ("noise", lambda v: v == 0 or 1e-6 <= v <= 1e6, "0 (none), or 1e-6 to 1e6"),
    ("delta", lambda v: 0 < v < 1, "above 0 and below 1"),
    ("test_classes", lambda v: 0 <= v < 1, "0 or more and below 1"),
    ("trainable", is_trainable, "all, head or last-<number>"),
)


def _check_type(option: Option, value: Any) -> None:
    if (option.optional and value is None) or (option.auto and value == "auto"):
        return
    if option.name in CODE_FIELDS and is_code(value):
        return
    if option.choices:
        check_choice(option.name, value, option.choices)
        return
    accepted = (int, float) if option.type is float else (option.type,)
    if not isinstance(value, accepted) or (isinstance(value, bool) and option.type is not bool):
        raise ConfigError(
            f"{option.name}: expected {option.type.__name__}, "
            f"got {reprlib.repr(value)} ({type(value).__name__})"
        )
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ConfigError(f"{option.name}: expected below 2^63, got {reprlib.repr(value)}")
    if isinstance(value, str) and "\0" in value:
        raise ConfigError(f"{option.name}: expected text without NUL, got {reprlib.repr(value)}")


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise a ConfigError that offers the nearest names if ``value`` is none of ``choices``."""
    choices = list(choices)
    if value in choices:
        return
    similar = difflib.get_close_matches(str(value), choices)
    hint = (
        f"did you mean {' or '.join(similar)}?" if similar else f"choose from {', '.join(choices)}"
    )
    raise ConfigError(f"{name}: {value!r} is unknown; {hint}")


def config_from_dict(values: Mapping[str, Any]) -> Config:
    """A configuration from its JSON form; the inverse of ``dataclasses.asdict``.

    Raises:
        ConfigError: an unknown field (nearest names offered) or a value that cannot be.
    """
    for name in values:
        check_choice("configuration field", name, [option.name for option in OPTIONS])
    return Config(**values)
