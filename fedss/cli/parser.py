"""The parser, and mistakes on the command line in one line."""

import argparse
import difflib
import re
from typing import Any, NoReturn

import fedss
from fedss.cli import train, trust, use  # noqa: F401  Their commands register themselves.
from fedss.cli.options import COMMANDS, RARE
from fedss.text import printable


class _Parser(argparse.ArgumentParser):
    """Says a mistake in one line, with what may have been meant; its help can be the basic one."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.shows_all = False

    def format_help(self) -> str:
        """All options, or those that are not rare and how many others there are."""
        rare = [] if self.shows_all else [a for a in self._actions if a.dest in RARE]
        helps = [action.help for action in rare]
        for action in rare:
            action.help = argparse.SUPPRESS
        text = super().format_help()
        for action, help in zip(rare, helps, strict=True):
            action.help = help
        return text + (f"\n{len(rare)} more options: {self.prog} --help-all\n" if rare else "")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return options, unknown

    def error(self, message: str) -> NoReturn:
        known = [*self._option_string_actions, *([] if self.prog != "fedss" else COMMANDS)]
        words = re.findall(r"(?:arguments: |choice: ')([\w-]+)", message)
        similar = [near for word in words for near in difflib.get_close_matches(word, known, 1)]
        hint = f"; did you mean {' or '.join(similar)}?" if similar else ""
        usage = " ".join(self.format_usage().split())
        self.exit(2, f"{self.prog}: {printable(message)}{hint} ({usage}; see {self.prog} --help)\n")


class _HelpAll(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *given: object) -> NoReturn:
        assert isinstance(parser, _Parser)
        parser.shows_all = True
        parser.print_help()
        parser.exit()


def make_parser() -> argparse.ArgumentParser:
    """The parser of ``fedss``, with one for each command."""
    parser = _Parser(
        prog="fedss",
        usage="fedss COMMAND ...",
        description="Federated Sampled Softmax: image embeddings from images that stay where they "
        "are, with very many classes.",
    )
    parser.add_argument("--version", action="version", version=f"fedss {fedss.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", prog="fedss")
    for name, command in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=command.run.__doc__,
            description=command.run.__doc__,
            usage=f"fedss {name} {command.usage}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for add in command.arguments:
            add(sub)
        if any(action.dest in RARE for action in sub._actions):
            sub.add_argument(
                "--help-all", action=_HelpAll, nargs=0, help="show all options and exit"
            )
        sub.set_defaults(run=command.run)
    return parser
