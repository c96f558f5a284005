"""The command line: arguments and printing only. Each command stands beside its arguments."""

from fedss.cli.main import main

__all__ = ["main"]
