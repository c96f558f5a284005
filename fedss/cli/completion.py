"""What a shell completes; shtab makes a script of it for bash, zsh and fish (docs/install.md)."""

import argparse

from fedss.choices import METHOD_SUMMARIES
from fedss.cli.parser import make_parser
from fedss.config import OPTIONS
from fedss.optional import import_extra

_PATHS = ("RUN", "OUT", "DIR", "FILE", "FILE.png", "FILE.html", "IMAGE", "IMAGES")


def completion_parser() -> argparse.ArgumentParser:
    """The parser of ``fedss``, whose settings have choices, and whose paths are completed."""
    shtab = import_extra("shtab", "completion")
    choices = {option.name: option.choices for option in OPTIONS if option.choices}
    choices["method"] = choices["methods"] = tuple(METHOD_SUMMARIES)
    parser = make_parser()
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    for command in commands.choices.values():
        for action in command._actions:
            action.choices = choices.get(action.dest)
            if action.metavar in _PATHS or action.dest in ("data_path", "weights"):
                action.complete = shtab.FILE
    return parser
