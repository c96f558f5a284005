"""The parser, and mistakes on the command line in one line."""

import argparse
import difflib
import re
from typing import Any, NoReturn

import fedss
from fedss.cli import train, use  # noqa: F401  Their commands register themselves.
from fedss.cli.options import COMMANDS
from fedss.text import printable


class _Parser(argparse.ArgumentParser):
    """Says a mistake in one line, and which option or command may have been meant."""

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
        self.exit(2, f"{self.prog}: {printable(message)}{hint} (see {self.prog} --help)\n")


def make_parser() -> argparse.ArgumentParser:
    """The parser of ``fedss``, with one for each command."""
    parser = _Parser(
        prog="fedss",
        description="Federated Sampled Softmax: image embeddings from images that stay where they "
        "are, with very many classes.",
    )
    parser.add_argument("--version", action="version", version=f"fedss {fedss.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
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
        sub.set_defaults(run=command.run)
    return parser
