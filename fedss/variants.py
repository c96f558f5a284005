"""A method with settings of its own, as a comparison names it."""

import dataclasses
from typing import Any

from fedss.config import OPTIONS, Config, Option, check_choice
from fedss.errors import ConfigError


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
    if (option.optional or option.auto) and value == "none":
        return None
    if option.auto and value == "auto":
        return value
    try:
        return option.type(value)
    except ValueError as error:
        raise ConfigError(
            f"{option.name} in {text!r}: expected {option.type.__name__}, got {value!r}"
        ) from error
