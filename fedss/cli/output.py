"""Standard output and error of a command: no encoding and no closed pipe keeps it from its work."""

import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from fedss.text import PLAIN, encodable, printable

# The reader has seen enough, or its terminal is gone: no fault of what is written.
_NOBODY_READS = (errno.EPIPE, errno.EIO)


def say(*lines: object, file: TextIO | None = None) -> None:
    """Print a line each, at once, with whatever they have in them from elsewhere."""
    stream = file or sys.stdout
    for line in lines:
        print(encodable(printable(str(line)), stream.encoding), file=stream, flush=True)


class _Lasting(io.FileIO):
    """A file that drops what cannot be written, and remembers why."""

    error: OSError | None = None

    def write(self, content: Any, /) -> int:
        # By map in C: an interrupt after the call would lose how much was written, and the buffer
        # would write it once more.
        written: list[int] = []
        try:
            written.extend(map(super().write, (content,)))
        except OSError as error:
            if error.errno not in _NOBODY_READS:
                self.error = error
            return memoryview(content).nbytes
        except KeyboardInterrupt:
            if not written:
                raise
            main = threading.main_thread().ident
            assert main is not None
            # As soon as the buffer has heard of it.
            threading.Timer(0.01, signal.pthread_kill, (main, signal.SIGINT)).start()
        return written[0]


@contextmanager
def lasting_output() -> Iterator[_Lasting | None]:
    """The process's own stdout and stderr, for a while, as a command needs them.

    What their encoding lacks is written as escapes. What nobody reads any more (``| head``, a
    terminal that was closed) is dropped, and the command goes on to its end. Streams that somebody
    has put in their place, as a notebook does, stay as they are.

    Returns:
        The file behind stdout, whose ``error`` says, in the end, what kept it from being written;
        None where it is not the process's own.
    """
    before = sys.stdout, sys.stderr
    ours: list[TextIO] = []
    sys.stdout, file = _lasting(sys.stdout, sys.__stdout__, ours)
    sys.stderr, _ = _lasting(sys.stderr, sys.__stderr__, ours)
    try:
        yield file
    finally:
        for stream in ours:
            stream.flush()
        sys.stdout, sys.stderr = before


def _lasting(
    stream: TextIO | None, original: TextIO | None, ours: list[TextIO]
) -> tuple[TextIO, _Lasting | None]:
    if stream is None:  # closed, before Python began
        ours.append(open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        return ours[-1], None
    if stream is not original or not isinstance(stream, io.TextIOWrapper):
        return stream, None
    stream.flush()
    file = _Lasting(stream.fileno(), "w", closefd=False)
    text = io.TextIOWrapper(
        io.BufferedWriter(file),
        encoding=stream.encoding,
        errors=PLAIN,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
    ours.append(text)
    return text, file
