"""The parser, and how a command ends: exit codes, and mistakes in one line."""

import argparse
import difflib
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from importlib.metadata import version
from typing import Any, NoReturn

from fedss.cli import train, use  # noqa: F401  Their commands register themselves.
from fedss.cli.options import COMMANDS
from fedss.cli.output import lasting_output
from fedss.cli.progress import progress_bars
from fedss.distributed import join, this_rank
from fedss.errors import ConfigError, FedssError, LostRankError
from fedss.log import show_on_stderr
from fedss.text import printable


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code: 0 done, 2 a mistake to mend, 1 a rank lost, 130 interrupted.

    Where torchrun has started several of it, the first speaks for all. Output that nobody reads
    any more changes neither what is done nor the code.
    """
    with lasting_output() as written:
        undo = show_on_stderr()
        try:
            code = _run(arguments)
        finally:
            undo()
        sys.stdout.flush()
        if written is not None and written.error is not None:
            print(f"fedss: cannot write its output: {written.error.strerror}", file=sys.stderr)
            code = code or 2
    return code


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
    parser.add_argument("--version", action="version", version=f"fedss {version('fedss')}")
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


def _run(arguments: Sequence[str] | None) -> int:
    stderr = sys.stderr
    try:
        ranks = this_rank()
    except ConfigError as error:
        print(f"fedss: {printable(str(error))}", file=stderr)
        return 2
    command, met = "fedss", False
    with nullcontext() if ranks.first else _silence():
        try:
            with join():
                met = True
                options = make_parser().parse_args(arguments)
                command = f"fedss {options.command}"
                with progress_bars():
                    options.run(options)
        except FedssError as error:
            if ranks.size > 1:
                # torchrun tells the others to end as soon as one has: not before this is said.
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            lost = isinstance(error, LostRankError)
            # Whoever is there speaks then: it may be the first that is not.
            speaks = stderr if lost or not met else sys.stderr
            print(f"{command}: {printable(str(error))}", file=speaks)
            return 1 if lost else 2
        except (MemoryError, RuntimeError, UnicodeEncodeError) as error:
            advice = _advice(error)
            if advice is None:
                raise
            print(f"{command}: {advice}", file=stderr)
            return 2
        except KeyboardInterrupt:
            again = command.removeprefix("fedss ") in ("train", "compare", "index")
            then = "; start the same command again to go on" if again else ""
            print(f"\nfedss: interrupted{then}", file=sys.stderr)
            return 130
    return 0


def _advice(error: Exception) -> str | None:
    """What to do about an error that is not one of fedss; None: it is a fault."""
    import torch

    text = str(error)
    if isinstance(error, UnicodeEncodeError):
        # No output fails so: it is the name of a file.
        return (
            f"the name {printable(str(error.object))} has letters that this system's encoding, "
            f"{sys.getfilesystemencoding()}, lacks: set LC_ALL=C.UTF-8 (or PYTHONUTF8=1)"
        )
    # Of Python and NumPy, of torch on a GPU and, as a plain RuntimeError, on a CPU.
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    if known or "not enough memory" in text or "allocate memory" in text:
        return (
            f"not enough memory ({printable(text.partition(chr(10))[0]) or type(error).__name__}): "
            "take smaller images (--image-size), a smaller network (--backbone, --embedding-size) "
            "or smaller batches (--batch-size)"
        )
    return None


@contextmanager
def _silence() -> Iterator[None]:
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield
