"""Run ``fedss train`` and die by SIGKILL at the n-th change it makes to its run folder."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from fedss.cli import main
from tests.ranks import PROCESSES

CHANGES = {"open", "os.rename", "os.mkdir", "shutil.rmtree", "os.remove", "os.truncate"}


def die_at(change: int, folder: str) -> None:
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in CHANGES or not str(arguments[0]).startswith(folder):
            return
        if event == "open" and not int(arguments[2]) & (os.O_WRONLY | os.O_RDWR):
            return
        count += 1
        if count == change:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _train(change: int, folder: str, words: list[str]) -> None:
    for descriptor in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    die_at(change, folder)
    sys.exit(main(["train", "--out", folder, *words]))


def train_until(change: int, folder: Path, words: list[str]) -> int:
    """The exit code of a process of its own: -9 if the run did not end before that change."""
    process = PROCESSES.Process(target=_train, args=(change, str(folder), words))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode
