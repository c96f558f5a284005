"""The settings of a federation, and the app folder that is submitted to Flower with them."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, get_type_hints

from fedss.config import OPTIONS, Config, config_from_dict
from fedss.errors import ConfigError
from fedss.files import write_file


def _setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Deployment:
    """What a federation needs beside the configuration of a run.

    Raises:
        ConfigError: a value that cannot be, on construction.
    """

    out: str = _setting("", "run folder on the server, as an absolute path")
    sites: int = _setting(1, "number of sites to wait for before the first round")
    evaluate_at: Literal["sites", "server"] = _setting(
        "sites", "who evaluates: sites, on their own test images; server, on the images of data"
    )
    deadline: float = _setting(600.0, "longest wait for the answers to a message, in seconds")
    quorum: float = _setting(0.5, "share of a round's clients that must return an update")
    share: float = _setting(
        0.8, "share of a round's clients that must answer before the wait for the others is limited"
    )
    grace: float = _setting(
        60.0, "seconds to wait for the others then; longer, if the first answers took longer"
    )
    aside: int = _setting(10, "rounds for which a site that was too slow is left out")
    absence: int = _setting(
        20, "rounds after which clients that are offline are not drawn until they return; 0: never"
    )
    site_classes: int = _setting(100_000, "most classes that a site may register")
    site_clients: int = _setting(10_000, "most clients that a site may register")
    attempts: int = _setting(5, "times that a round is tried before the run ends with an error")
    pause: float = _setting(60.0, "seconds between two attempts at a round")

    def __post_init__(self) -> None:
        for name, valid, expected in (
            ("out", Path(self.out).is_absolute(), "a full path at the server"),
            ("sites", self.sites >= 1, "at least 1"),
            ("attempts", self.attempts >= 1, "at least 1"),
            ("aside", self.aside >= 0, "at least 0"),
            ("absence", self.absence >= 0, "at least 0"),
            ("site_classes", self.site_classes >= 1, "at least 1"),
            ("site_clients", self.site_clients >= 1, "at least 1"),
            ("deadline", 1 <= self.deadline <= 1e7, "1 to 1e7 seconds"),
            ("pause", 0 <= self.pause <= 1e7, "0 to 1e7 seconds"),
            ("grace", 0 <= self.grace <= 1e7, "0 to 1e7 seconds"),
            ("quorum", 0 <= self.quorum <= 1, "0 to 1"),
            ("share", 0 <= self.share <= 1, "0 to 1"),
            ("evaluate_at", self.evaluate_at in ("sites", "server"), "sites or server"),
        ):
            if not valid:
                raise ConfigError(f"{name}: expected {expected}, got {getattr(self, name)!r}")


# How a simulation may rearrange images; sites take theirs as they are.
_NOT_AT_SITES = ("rotations", "client_classes", "partition", "partition_clients")

DEPLOYMENT_FIELDS = dataclasses.fields(Deployment)
SERVER_APP = "fedss.flower.server_app:app"
CLIENT_APP = "fedss.flower.client_app:app"


def read_settings(run_config: Mapping[str, Any]) -> tuple[Config, Deployment]:
    """Configuration and deployment out of Flower's run configuration; an empty text is None.

    Raises:
        ConfigError: an unknown setting, or a value that cannot be.
    """
    values = {name.replace("-", "_"): value for name, value in run_config.items()}
    kinds = get_type_hints(Deployment)
    config = config_from_dict(
        {k: None if v == "" else v for k, v in values.items() if k not in kinds}
    )
    _check_apart(config)
    deployment = {}
    for name in kinds.keys() & values.keys():
        kind, value = kinds[name], values[name]
        if kind is float and type(value) is int:
            value = float(value)
        if kind in (int, float, str) and type(value) is not kind:
            raise ConfigError(f"{name}: expected {kind.__name__}, got {value!r}")
        deployment[name] = value
    chosen = Deployment(**deployment)
    _check_evaluation(config, chosen)
    return config, chosen


def _check_evaluation(config: Config, deployment: Deployment) -> None:
    if config.noise and deployment.evaluate_at == "sites":
        raise ConfigError(
            "evaluate_at: figures that sites measure on their images are hidden in no noise; take "
            "server, and test images of its own (data)"
        )


def _check_apart(config: Config) -> None:
    for name in _NOT_AT_SITES:
        if getattr(config, name):
            raise ConfigError(f"{name}: sites read their images as they are; leave it out")
    if config.secret_file is not None:
        raise ConfigError(
            "secret_file: a federation's server must not have it; leave it out, and give it to the "
            "sites (node-config: secret-file)"
        )
    from fedss.losses.methods import METHODS

    if METHODS[config.method].pooled:
        raise ConfigError(f"method: {config.method} pools images, which a federation cannot")


def explicit(config: Config) -> Config:
    """The configuration with what a data set decides by itself, which must be the same at all
    sites: the size of images, grayscale for glyphs and Omniglot, else in colour.
    """
    from fedss.settings import usual_images

    config, drawn = usual_images(config), config.data in ("glyphs", "omniglot")
    return replace(config, channels=config.channels or (1 if drawn else 3))


def write_app(folder: Path, config: Config, deployment: Deployment) -> Path:
    """Write the folder that ``flwr run`` submits: a ``pyproject.toml`` without any code.

    It names the apps of the installed fedss, and has every setting with what it means, so that
    each can also be given to ``flwr run --run-config``.

    Raises:
        ConfigError: there is such a file already, a setting that a federation cannot have, or no
            Flower.
    """
    _check_apart(config)
    _check_evaluation(config, deployment)
    config = explicit(config)
    try:
        flower = version("flwr")
    except PackageNotFoundError as error:
        raise ConfigError(
            'a federation needs Flower: pip install "fedss[flower]", here, at the server and at '
            "every site"
        ) from error
    path = folder / "pyproject.toml"
    if path.exists():
        raise ConfigError(f"{path} is there already; edit it, or choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    lines = _app_lines(config, deployment, flower)
    write_file(path, "".join(f"{line}\n" for line in lines).encode())
    write_file(folder / "LICENSE", b"Settings of a run; no licence is needed for them.\n")
    return path


def _app_lines(config: Config, deployment: Deployment, flower: str) -> list[str]:
    options = {option.name: option for option in OPTIONS}
    lines = [
        "[project]",
        'name = "fedss-federation"',
        f'version = "{version("fedss")}"',
        'description = "Settings of a federation; the code is that of the installed fedss"',
        'license = { file = "LICENSE" }',
        # Not fedss itself: it is installed beforehand, and Flower is not to install anything.
        f'dependencies = ["flwr>={flower}"]',
        "",
        "[tool.flwr.app]",
        'publisher = "fedss"',
        "fab-format-version = 1",
        f'flwr-version-target = "{flower}"',
        "",
        "[tool.flwr.app.components]",
        f'serverapp = "{SERVER_APP}"',
        f'clientapp = "{CLIENT_APP}"',
        "",
        "[tool.flwr.app.config]",
        "# The federation",
    ]
    for item in DEPLOYMENT_FIELDS:
        lines += [f"# {item.metadata['help']}", _toml(item.name, getattr(deployment, item.name))]
    group = ""
    for name, value in dataclasses.asdict(config).items():
        if name in (*_NOT_AT_SITES, "secret_file"):
            continue
        option = options[name]
        if option.group != group:
            group = option.group
            lines += ["", f"# {group.capitalize()}; an empty text means the default"]
        choices = f": {option.listed}" if option.choices else ""
        lines += [f"# {option.help}{choices}", _toml(name, value)]
    return lines


def _toml(name: str, value: Any) -> str:
    # TOML writes values as JSON does, but has no null.
    return f"{name.replace('_', '-')} = {json.dumps('' if value is None else value)}"
