"""Run ``fedss train`` and die by SIGKILL at the n-th change it makes to its run folder."""

import os
import signal
import sys
from typing import Any

from fedss.cli import main

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


if __name__ == "__main__":
    die_at(int(sys.argv[1]), sys.argv[2])
    sys.exit(main(["train", "--out", *sys.argv[2:]]))
