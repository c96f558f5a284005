"""Ctrl-C: it ends a command at any time, with exit code 130 and without a traceback."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


def end_on_ctrl_c() -> None:
    """From now on Ctrl-C ends this process at once, but where it is :func:`interruptible`.

    Whoever has made it ignore Ctrl-C, as ``nohup`` does, or handles it, is left alone.
    """
    main = threading.current_thread() is threading.main_thread()
    if main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


@contextmanager
def interruptible() -> Iterator[None]:
    """Work that has something to put in order: Ctrl-C raises KeyboardInterrupt in it."""
    if signal.getsignal(signal.SIGINT) is not _end:
        yield
        return
    signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, _end)


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, b"\nfedss: interrupted\n")
    os._exit(130)


def _interrupt(number: int, frame: FrameType | None) -> None:
    caller = frame
    while caller is not None:
        # In an import it may be lost, or come out as another error. A process that is gone there
        # leaves no more to put in order than one that is killed.
        if caller.f_code.co_filename == "<frozen importlib._bootstrap>":
            _end(number, frame)
        caller = caller.f_back
    raise KeyboardInterrupt
