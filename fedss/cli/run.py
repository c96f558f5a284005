"""How a command runs and ends: output, ranks, exit codes, and mistakes in one line."""

import argparse
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from typing import TextIO

from fedss.cli.interrupts import interruptible
from fedss.cli.output import lasting_output
from fedss.cli.parser import make_parser
from fedss.distributed import join, this_rank
from fedss.errors import ConfigError, FedssError, LostRankError
from fedss.log import show_on_stderr
from fedss.text import printable


def run(arguments: Sequence[str] | None) -> int:
    """As :func:`fedss.cli.main`."""
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


def _run(arguments: Sequence[str] | None) -> int:
    stderr = sys.stderr
    try:
        ranks = this_rank()
    except ConfigError as error:
        print(f"fedss: {printable(str(error))}", file=stderr)
        return 2
    with nullcontext() if ranks.first else _silence():
        # Help and mistakes end it here, at every rank, before anything is imported that takes long.
        options = make_parser().parse_args(arguments)
        return _run_command(options, stderr, ranks.size)


def _run_command(options: argparse.Namespace, stderr: TextIO, size: int) -> int:
    from fedss.cli.progress import progress_bars

    command, met = f"fedss {options.command}", False
    try:
        with interruptible(), join():
            met = True
            with progress_bars():
                options.run(options)
    except FedssError as error:
        if size > 1:
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
        again = options.command in ("train", "compare", "index")
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
