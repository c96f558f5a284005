"""One typed configuration for Python, the command line and the run folder."""

import dataclasses
import difflib
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_type_hints

from fedss.core.class_rows import RowDtype
from fedss.core.optimizers import ServerOptimizerKind
from fedss.data import parse_partition
from fedss.data.augment import Augment
from fedss.errors import ConfigError
from fedss.losses.methods import METHODS, RowMean
from fedss.losses.softmax import MarginKind
from fedss.models import BatchNormRule, ForwardPrecision, is_trainable
from fedss.sampling.samplers import SAMPLERS
from fedss.wire.codec import Precision

Schedule = Literal["constant", "linear", "cosine"]
RowStore = Literal["memory", "file"]
EvalSplit = Literal["test", "validation"]

_MOST_OF_MOMENTS = 4096  # 67 MB for a matrix in float32


def _option(default: Any, help: str, group: str) -> Any:
    return field(default=default, metadata={"help": help, "group": group})


@dataclass(frozen=True)
class Config:
    """Everything that decides what a run does. Each field is an option of the command line.

    Raises:
        ConfigError: a value that cannot be, on construction.
    """

    data: str = _option(
        "glyphs", "glyphs, omniglot, csv, folder, or a published set: docs/datasets.md", "data"
    )
    data_path: str | None = _option(None, "where its files are (csv: the manifest)", "data")
    image_size: int | None = _option(
        None, "side that pictures are resized to, pixels; default 64, drawings 28", "data"
    )
    channels: int | None = _option(
        None, "1 grayscale, 3 colour; default: colour if a picture of the data is", "data"
    )
    test_classes: float = _option(
        0.2, "share of classes held out for the test where the data names none", "data"
    )
    skip_broken: bool = _option(False, "leave out and count pictures that can't be read", "data")
    data_seed: int = _option(0, "draws the glyphs, held-out classes and clients", "data")
    glyphs_classes: int = _option(1280, "glyphs: number of classes, test classes included", "data")
    glyphs_clients: int = _option(256, "glyphs: number of training clients", "data")
    partition: str | None = _option(
        None, "deal pictures to clients anew: classes:K, dirichlet:ALPHA or class", "data"
    )
    partition_clients: int | None = _option(None, "partition: number of clients", "data")
    client_classes: int | None = _option(
        None, "split clients so that none holds more classes; default: as they are", "data"
    )
    rotations: bool = _option(False, "quarter turns are classes and clients of their own", "data")
    eval_split: EvalSplit = _option("test", "retrieval task that is evaluated", "data")

    method: str = _option("fedss", "training method, one of those listed below", "method")
    sample_size: int | None = _option(
        None,
        "|S|, class rows per client (moments: own ones at most); default 64",
        "method",
    )
    sampler: str = _option("uniform", f"draws negatives: {', '.join(SAMPLERS)}", "method")
    correction: float = _option(1.0, "a in -a log q of negatives; below 1: tempered", "method")
    cover: int = _option(0, "moments: negatives that only hide own classes", "method")
    scale: float = _option(10.0, "s, inverse temperature of the softmax", "method")
    margin_kind: MarginKind = _option("none", "margin of the softmax", "method")
    margin: float = _option(0.2, "margin m: cosface in cosine, arcface in radians", "method")
    row_mean: RowMean | None = _option(
        None, "whose weight divides a row's sum; default: cohort; moments: holders", "method"
    )
    normalize_rows: bool = _option(
        True, "class rows get length 1 in the rounds that touch them", "method"
    )
    spread_out_weight: float = _option(0.1, "fedaws: weight of the spread-out step", "method")
    spread_out_margin: float = _option(0.7, "fedaws: cosine distance to keep", "method")
    spread_out_neighbours: int = _option(10, "fedaws: nearest rows kept apart", "method")

    backbone: str = _option("conv4-32", "conv4, conv4-<width> or timm:<name>", "model")
    pretrained: bool = _option(False, "start from timm's pretrained weights", "model")
    weights: str | None = _option(
        None, "file with weights of a timm model: .safetensors, .pth or .pt", "model"
    )
    trainable: str = _option(
        "all", "all, head (the projection) or last-<number> blocks of the backbone", "model"
    )
    batch_norm: BatchNormRule = _option(
        "auto", "batch norms; auto: replaced unless weights are trained", "model"
    )
    pixel_mean: str | None = _option(
        None, "that weights expect, such as 0.485,0.456,0.406", "model"
    )
    pixel_std: str | None = _option(None, "that weights expect, beside pixel_mean", "model")
    embedding_size: int = _option(64, "d, numbers per embedding", "model")

    rounds: int = _option(120, "number of rounds", "training")
    clients_per_round: int = _option(20, "cohort, clients per round", "training")
    local_epochs: int = _option(1, "passes of a client over its pictures per round", "training")
    local_steps: int | None = _option(
        None, "batches of a client per round, in place of epochs", "training"
    )
    batch_size: int = _option(8, "pictures per local step", "training")
    client_lr: float = _option(0.05, "learning rate of the backbone at clients", "training")
    class_row_lr: float | None = _option(
        None, "learning rate of the class rows at clients; default 2; moments: 1", "training"
    )
    augment: Augment = _option("none", "changes of training pictures at clients", "training")
    precision: ForwardPrecision = _option("float32", "of the network's forward pass", "training")
    lr_schedule: Schedule = _option("linear", "decay of both over rounds", "training")
    lr_decay_start: float = _option(0.5, "share of rounds before the decay starts", "training")
    server_optimizer: ServerOptimizerKind = _option("momentum", "server optimizer", "training")
    server_lr: float = _option(1.0, "learning rate of the server optimizer", "training")
    server_momentum: float = _option(0.9, "momentum (adam: beta1) of the server", "training")
    server_second_momentum: float = _option(0.99, "adam: beta2 of the server", "training")
    server_epsilon: float = _option(1e-3, "adam: epsilon of the server", "training")

    rows_down: Precision = _option("float32", "how class rows and moments are sent", "wire")
    rows_up: Precision = _option("float32", "how their changes come back", "wire")
    backbone_down: Precision = _option("float32", "how the backbone is sent", "wire")
    backbone_up: Precision = _option("float32", "how its change comes back", "wire")
    moments_rank: int | None = _option(
        None, "moments: eigenvectors sent of a matrix; default: all of it", "wire"
    )

    row_dtype: RowDtype = _option("float32", "how the server keeps class rows", "server")
    row_store: RowStore = _option("memory", "where: in memory, or in a file on disk", "server")

    seed: int = _option(0, "every random draw of the run is keyed by it", "run")
    eval_every: int = _option(20, "rounds between evaluations; 0: at the end alone", "run")
    checkpoint_every: int = _option(10, "rounds between checkpoints", "run")
    device: str = _option("cpu", "where clients train and embed: cpu, cuda, cuda:1, ...", "run")
    stack: int = _option(
        1, "clients that share each call of the network; for GPUs and small networks", "run"
    )
    workers: int | None = _option(
        None, "threads that train clients; default: all cores; on a GPU 1", "run"
    )
    keep_memory: bool = _option(
        True, "keep freed memory for the next step: faster (Linux, glibc)", "run"
    )

    def __post_init__(self) -> None:
        for name in ("pixel_mean", "pixel_std"):
            value = getattr(self, name)
            if isinstance(value, tuple | list):
                object.__setattr__(self, name, ",".join(map(str, value)))
        for option in OPTIONS:
            _check_type(option, getattr(self, option.name))
        check_choice("method", self.method, METHODS)
        check_choice("sampler", self.sampler, SAMPLERS)
        for names, valid, expected in _RANGES:
            for name in names.split():
                value = getattr(self, name)
                if value is not None and not valid(value):
                    raise ConfigError(f"{name}: expected {expected}, got {value}")
        numbers(self, "pixel_mean")
        numbers(self, "pixel_std")
        parse_partition(self.partition, self.partition_clients)
        if METHODS[self.method].moments:
            self._check_moments()

    def _check_moments(self) -> None:
        if not self.normalize_rows:
            raise ConfigError(
                "normalize_rows: method moments takes rows for unit vectors; leave it on"
            )
        if self.embedding_size > _MOST_OF_MOMENTS:
            raise ConfigError(
                f"embedding_size: method moments sends matrices of its square, expected at most "
                f"{_MOST_OF_MOMENTS}, got {self.embedding_size}"
            )
        if self.moments_rank is not None and self.moments_rank >= self.embedding_size:
            raise ConfigError(
                f"moments_rank: expected below embedding_size = {self.embedding_size} (or leave it "
                f"out to send whole matrices), got {self.moments_rank}"
            )


def numbers(config: Config, name: str) -> tuple[float, ...] | None:
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
    """A configuration field as the command line needs it.

    ``choices`` is empty unless the values are a closed list; ``optional`` fields may be None.
    """

    name: str
    type: type
    optional: bool
    choices: tuple[str, ...]
    default: Any
    help: str
    group: str


def _options() -> tuple[Option, ...]:
    hints, options = get_type_hints(Config), []
    for item in dataclasses.fields(Config):
        hint, args = hints[item.name], get_args(hints[item.name])
        optional = type(None) in args
        values = args[0] if optional else hint
        choices = get_args(values)
        kind = str if choices else values
        options.append(Option(item.name, kind, optional, choices, item.default, **item.metadata))
    return tuple(options)


OPTIONS = _options()

_RANGES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("sample_size", lambda v: v >= 2, "at least 2 classes: an own one and a negative"),
    (
        "rounds clients_per_round local_epochs local_steps batch_size workers"
        " checkpoint_every moments_rank client_classes stack",
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
        "client_lr class_row_lr server_lr server_epsilon",
        lambda v: 0 < v <= 1e30,
        "a number above 0 and at most 1e30",
    ),
    # Above, rounding of a cosine in float32 decides.
    ("scale", lambda v: 0 < v <= 1e6, "a number above 0 and at most 1e6"),
    ("correction", lambda v: 0 <= v <= 1, "0 (none) to 1 (full)"),
    ("margin spread_out_weight spread_out_margin", lambda v: 0 <= v <= 2, "0 to 2"),
    ("server_momentum server_second_momentum", lambda v: 0 <= v < 1, "0 or more and below 1"),
    ("lr_decay_start", lambda v: 0 <= v <= 1, "0 to 1"),
    ("test_classes", lambda v: 0 <= v < 1, "0 or more and below 1"),
    ("trainable", is_trainable, "all, head or last-<number>"),
)


def _check_type(option: Option, value: Any) -> None:
    if option.optional and value is None:
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
    near = difflib.get_close_matches(str(value), choices)
    hint = f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(choices)}"
    raise ConfigError(f"{name}: {value!r} is unknown; {hint}")


def config_from_dict(values: Mapping[str, Any]) -> Config:
    """A configuration from its JSON form; the inverse of ``dataclasses.asdict``.

    Raises:
        ConfigError: an unknown field (nearest names offered) or a value that cannot be.
    """
    for name in values:
        check_choice("configuration field", name, [option.name for option in OPTIONS])
    return Config(**values)


def variant(config: Config, text: str) -> Config:
    """``config`` as ``method`` or ``method:option=value,option=value`` says, e.g. as
    ``fedss:sampler=uniform,rows_up=int8``.

    Raises:
        ConfigError: an unknown method or option, or a value that cannot be.
    """
    method, colon, settings = text.partition(":")
    values: dict[str, Any] = {"method": method}
    # What all variants of a comparison have in common stays out of them.
    shared = ("method", "seed", "rounds", "eval_every")
    by_name = {o.name: o for o in OPTIONS if o.group != "data" and o.name not in shared}
    for setting in settings.split(",") if colon else []:
        name, equals, value = setting.partition("=")
        check_choice(f"option in {text!r}", name, by_name)
        if not equals or name in values:
            raise ConfigError(
                f"{text!r}: expected method:option=value,..., each option once; got {setting!r}"
            )
        values[name] = _value(by_name[name], value, text)
    return dataclasses.replace(config, **values)


def _value(option: Option, value: str, text: str) -> Any:
    if option.type is bool:
        check_choice(f"{option.name} in {text!r}", value, ("yes", "no"))
        return value == "yes"
    if option.optional and value == "none":
        return None
    try:
        return option.type(value)
    except ValueError as error:
        raise ConfigError(
            f"{option.name} in {text!r}: expected {option.type.__name__}, got {value!r}"
        ) from error
