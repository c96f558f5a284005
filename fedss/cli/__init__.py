"""The command line: arguments and printing only. Each command stands beside its arguments."""

from collections.abc import Sequence

from fedss.cli.interrupts import end_on_ctrl_c


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code: 0 done, 2 a mistake to mend, 1 a rank lost, 130 interrupted.

    Where torchrun has started several of it, the first speaks for all. Output that nobody reads
    any more changes neither what is done nor the code.

    Args:
        arguments: None: those of this process, which is the command's from then to its end.
    """
    if arguments is None:
        end_on_ctrl_c()
    from fedss.cli.run import run  # Not before Ctrl-C is seen to.

    return run(arguments)
