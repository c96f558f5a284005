"""How a command registers itself, and the options that several commands share."""

import argparse
import json
import re
import reprlib
import shutil
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

from fedss.choices import METHOD_SUMMARIES
from fedss.config import OPTIONS, Config, Option, config_from_dict
from fedss.errors import ConfigError
from fedss.flower.settings import DEPLOYMENT_FIELDS
from fedss.optional import import_extra
from fedss.own_code import code_names, untrusted

Adds = Callable[[argparse.ArgumentParser], object]
"""Adds an argument, or several, to the parser of a command."""
CommandFunction = Callable[[argparse.Namespace], None]

_METAVARS = {int: "INT", float: "NUMBER", str: "TEXT"}


class Command(NamedTuple):
    """What ``fedss NAME`` does, its usage, and the arguments that it takes."""

    run: CommandFunction
    usage: str
    arguments: Sequence[Adds]


COMMANDS: dict[str, Command] = {}
"""By name, in the order of ``fedss --help``."""


def command(usage: str, *arguments: Adds) -> Callable[[CommandFunction], CommandFunction]:
    """Make a function the command of its name; its docstring is the help."""

    def register(run: CommandFunction) -> CommandFunction:
        COMMANDS[run.__name__] = Command(run, usage, arguments)
        return run

    return register


def argument(name: str, metavar: str, help: str, **settings: Any) -> Adds:
    """An argument, as ``ArgumentParser.add_argument`` takes it."""
    return lambda parser: parser.add_argument(name, metavar=metavar, help=help, **settings)


def flag(name: str, help: str) -> Adds:
    """An option that is given or not."""
    return lambda parser: parser.add_argument(name, action="store_true", help=help)


def setting(name: str, default: float, help: str) -> Adds:
    """An option that is a number, with a default, which tells its type, too."""
    kind, text = type(default), f"{help} (default: {default:g})"
    return argument(name, _METAVARS[kind], text, type=kind, default=default)


# What README and docs/get-started.md use, and what decides where a run trains.
_BASIC = """
    data data_path columns image_size test_classes data_seed skip_broken partition method backbone
    pretrained weights trainable rounds augment seed device out sites
"""
_SETTINGS = {option.name for option in OPTIONS} | {item.name for item in DEPLOYMENT_FIELDS}
RARE = _SETTINGS - {*_BASIC.split()}
"""Settings that ``--help`` leaves to ``--help-all``."""

RUN = argument("folder", "RUN", "run folder of the trained model")
OUT = argument("--out", "DIR", "folder for the results, one experiment per folder", required=True)
INDEX = argument("--index", "DIR", "folder of the index (default: RUN/index)")
JSON = flag("--json", "print the result as JSON")
TRUST = flag(
    "--trust-code", "import the code of its owner's that a run or a file of settings names"
)
BACKBONE = argument(
    "--backbone",
    "TEXT",
    "package.module:function that makes the network, where the run names no code or another",
    dest="own_backbone",
)
SKIP_BROKEN = flag("--skip-broken", "leave out images that cannot be read, and say how many")
THRESHOLD = argument(
    "--threshold",
    "NUMBER",
    "lowest cosine at which a class is named; below it the image is unknown "
    "(default: measured by fedss evaluate, in RUN/verification.json)",
    type=float,
)


def config_options(
    without: Sequence[str] = (), groups: Sequence[str] | None = None, stored: bool = True
) -> Adds:
    """The fields of ``Config``, a section for each group (None: all groups), and perhaps
    ``--config FILE``."""

    def add(parser: argparse.ArgumentParser) -> None:
        if stored:
            parser.add_argument(
                "--config",
                metavar="FILE",
                help="take settings from a run's config.json, or from YAML, TOML or JSON with some "
                "fields of fedss.Config; options given here override them",
            )
            TRUST(parser)
        sections: dict[str, Any] = {}
        for option in OPTIONS:
            if option.name in without or (groups and option.group not in groups):
                continue
            if option.group not in sections:
                sections[option.group] = parser.add_argument_group(option.group)
            _add_option(sections[option.group], option)
        if "method" in sections:
            # As wide as the formatter, which leaves an epilog's lines as they are, makes the rest.
            width = shutil.get_terminal_size().columns - 2
            lines = (
                fill(f"  {name:<18} {summary}", width, subsequent_indent=" " * 21)
                for name, summary in METHOD_SUMMARIES.items()
            )
            parser.epilog = "\n".join(["methods:", *lines])

    return add


def _add_option(section: Any, option: Option) -> None:
    text = option.help.replace("%", "%%")
    if option.choices:
        text += f": {option.listed}"
    if option.default is not None:
        default = option.default
        shown = {True: "yes", False: "no"}[default] if option.type is bool else default
        text += f" (default: {shown})"
    how = {"type": _or_auto(option.type)} if option.auto else {}
    _add_field(section, option.name, option.type, text, **how)


def _or_auto(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        return text if text == "auto" else kind(text)

    read.__name__ = f"{getattr(kind, '__name__', '')} or auto"
    return read


def _add_field(section: Any, name: str, kind: Any, text: str, **how: Any) -> None:
    if kind is bool:
        how["action"] = argparse.BooleanOptionalAction
    else:
        how = {"type": kind, "metavar": _METAVARS[kind], **how}
    flag = "--" + name.replace("_", "-")
    section.add_argument(flag, default=argparse.SUPPRESS, help=text, **how)


def deployment_options(parser: argparse.ArgumentParser) -> None:
    """The fields of ``Deployment``."""
    section = parser.add_argument_group("federation")
    for item in DEPLOYMENT_FIELDS:
        text = item.metadata["help"] + (f" (default: {item.default})" if item.default else "")
        _add_field(section, item.name, type(item.default), text, required=item.name == "out")


def given(options: argparse.Namespace) -> dict[str, Any]:
    """The configuration's fields that the command line names."""
    names = {option.name for option in OPTIONS}
    return {name: value for name, value in vars(options).items() if name in names}


def stored(options: argparse.Namespace) -> dict[str, Any]:
    """The content of ``--config FILE``, as a run's ``config.json`` has it; {} without the option.

    Raises:
        ConfigError: it cannot be read, or holds no settings.
    """
    if options.config is None:
        return {}
    file, named = Path(options.config), f"--config {options.config}"
    name, read = _FILES.get(file.suffix.lower(), _FILES[".json"])
    try:
        content = read(file.read_bytes())
    except OSError as error:
        raise ConfigError(f"{named}: cannot read it: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        said = " ".join(str(error).split())
        raise ConfigError(f"{named}: cannot read it as {name}: {said}") from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"{named}: expected settings by name, such as rounds, or the config.json of a run; got "
            f"{reprlib.repr(content)}"
        )
    content = content if "config" in content else {"config": content}
    if not isinstance(content["config"], dict):
        raise ConfigError(f"{named}: config: expected settings by name")
    return content


def _read_yaml(content: bytes) -> Any:
    yaml = import_extra("yaml", "yaml")
    loader: Any = type("Loader", (yaml.SafeLoader,), {})
    # A number in YAML 1.2 and for people, a text in YAML 1.1.
    exponent = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")
    loader.add_implicit_resolver("tag:yaml.org,2002:float", exponent, list("-+0123456789"))
    try:
        values = yaml.load(content, loader)
    except yaml.MarkedYAMLError as error:
        at = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ValueError(f"{at}{error.problem}") from error
    except yaml.YAMLError as error:
        raise ValueError(error) from error
    return {} if values is None else values  # of nothing but comments


_FILES: dict[str, tuple[str, Callable[[bytes], Any]]] = {
    ".json": ("JSON", json.loads),
    ".toml": ("TOML", lambda content: tomllib.loads(content.decode())),
    ".yaml": ("YAML", _read_yaml),
    ".yml": ("YAML", _read_yaml),
}


def read_config(options: argparse.Namespace, usual: Mapping[str, Any] | None = None) -> Config:
    """``usual``, what ``--config`` has in place of it, and what the command line says."""
    of_file = stored(options).get("config", {})
    check_stored(of_file, f"--config {options.config}")
    values = {**(usual or {}), **of_file, **given(options)}
    config_from_dict(values)  # Before the data are looked for, a mistake takes no time.
    for field, name in code_names(of_file).items():
        # What the command line names itself is asked for.
        if values[field] == name and field not in given(options) and not options.trust_code:
            raise untrusted(name, f"--config {options.config}")
    return config_from_dict(values if usual else with_data_at_path(values, options))


def with_data_at_path(values: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Settings in which ``data`` follows from ``--data-path``, where that is given without.

    A published data set of the settings stays: its files are elsewhere now.
    """
    named = given(options)
    of_ones_own = values.get("data", Config.data) in (Config.data, "csv", "folder")
    if "data" in named or "data_path" not in named or not of_ones_own:
        return values
    from fedss.data import locate

    name, path = locate(named["data_path"])
    return {**values, "data": name, "data_path": str(path)}


def own_code(options: argparse.Namespace) -> dict[str, Any]:
    """What ``--backbone`` and ``--trust-code`` say, as all take it that load a model."""
    return {"backbone": options.own_backbone, "trust_code": options.trust_code}


def check_stored(settings: Mapping[str, Any], file: str) -> None:
    """Raise a ConfigError that names the file if its settings are none."""
    try:
        config_from_dict(settings)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error
