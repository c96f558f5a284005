"""What a federation moves and how long it takes: three sites as processes, TLS, node keys.

    python benchmarks/federation.py     (about 8 minutes; --short: one job, writes no file)

Bytes: between every site and the SuperLink stands a relay that counts all that passes under TLS:
messages, polling, heartbeats, Flower's receipts. They are compared with what the run's records say,
from the end of the first round to that of the last. Time: seconds per round and phase. The
federation is that of ``examples/federation.py``: glyphs as image files, eight clients a site;
the server evaluates, at the end alone.

Writes ``benchmarks/results/federation.txt``.
"""

import json
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import common

import fedss
from examples import federation
from examples.federation import Place, status
from fedss.flower.settings import Deployment, write_app

SITES, ROUNDS = 3, 6
BASE: dict[str, Any] = {"image_size": 28, "channels": 1, "clients_per_round": 12, "eval_every": 0}
JOBS: dict[str, dict[str, Any]] = {
    "fedss": {},
    "fedss, conv4-128": {"backbone": "conv4-128"},
    "the same, int8 up": {"backbone": "conv4-128", "rows_up": "int8", "backbone_up": "int8"},
    "full": {"method": "full", "backbone": "conv4-128"},
}


@dataclass
class Relay:
    """Counts bytes by direction: down to the sites, up from them."""

    port: int
    counts: dict[str, int] = field(default_factory=lambda: {"down": 0, "up": 0})
    lock: threading.Lock = field(default_factory=threading.Lock)

    def pump(self, source: socket.socket, sink: socket.socket, way: str) -> None:
        """Pass on what comes until no more does."""
        with suppress(OSError):
            while block := source.recv(1 << 16):
                with self.lock:
                    self.counts[way] += len(block)
                sink.sendall(block)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


@contextmanager
def relay(to: int) -> Iterator[Relay]:
    """A port that passes everything on to another one of this machine."""
    listener = socket.create_server(("127.0.0.1", 0))
    counter = Relay(listener.getsockname()[1])

    def serve() -> None:
        with suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection(("127.0.0.1", to))
                for pair, way in (((near, far), "up"), ((far, near), "down")):
                    threading.Thread(target=counter.pump, args=(*pair, way), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield counter
    finally:
        listener.close()


def run_job(
    place: Place, counter: Relay, folder: Path, changes: dict[str, Any], rounds: int
) -> dict[str, Any]:
    """A whole run: what the wire carried and what the ledger says, after the first round."""
    out = folder / "run"
    config = fedss.Config(**BASE, **changes, rounds=rounds)
    deployment = Deployment(out=str(out), sites=SITES, evaluate_at="server", deadline=120.0)
    write_app(folder / "app", config, deployment)
    number = federation.submit(place, folder / "app")
    lines = out / "records.jsonl"
    marks: list[tuple[float, dict[str, int]]] = []
    looked = time.monotonic()
    while len(marks) < rounds:
        # A record is written before the next round's messages are made.
        done = len(lines.read_bytes().splitlines()) if lines.exists() else 0
        while len(marks) < done:
            marks.append((time.monotonic(), dict(counter.counts)))
        if time.monotonic() - max([looked, *(mark for mark, _ in marks)]) > 60:
            looked = time.monotonic()
            if status(place, number).startswith("finished"):
                raise SystemExit("\n".join(federation.follow(place, number)))
        time.sleep(0.01)
    while not status(place, number).startswith("finished"):
        time.sleep(0.5)
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    (first, before), (last, after) = marks[0], marks[-1]
    later = records[1:]
    seconds = {
        phase: statistics.median(record["seconds"].get(phase, 0.0) for record in later)
        for phase in ("request", "train", "aggregate")
    }
    return {
        "ledger": {way: sum(record[f"bytes_{way}"] for record in later) for way in ("down", "up")},
        "wire": {way: after[way] - before[way] for way in ("down", "up")},
        "seconds": seconds,
        "round": (last - first) / len(later),
        "failures": sum(len(record.get("failures", [])) for record in records),
    }


def idle(counter: Relay, seconds: float) -> dict[str, float]:
    """Bytes a second that pass while nothing runs."""
    before = dict(counter.counts)
    time.sleep(seconds)
    return {way: (counter.counts[way] - before[way]) / seconds for way in before}


def rows(name: str, counted: dict[str, Any], rounds: int) -> Iterator[str]:
    for way in ("down", "up"):
        ledger, wire = (counted[what][way] / (rounds - 1) for what in ("ledger", "wire"))
        row = f"{name if way == 'down' else '':<18}{way:<6}{ledger / 1e3:>18,.1f}"
        row += f"{wire / 1e3:>16,.1f}{wire / ledger:>13.3f}"
        if way == "down":
            row += f"{counted['round']:>9.1f}"
            for phase, width in (("request", 9), ("train", 8), ("aggregate", 8)):
                row += f"{counted['seconds'][phase]:>{width}.2f}"
        yield row
    if counted["failures"]:
        yield f"  {counted['failures']} failures"


def main() -> None:
    options = common.parser(__doc__, short="one job; write no file").parse_args()
    jobs = dict(list(JOBS.items())[:1]) if options.short else JOBS
    rounds = 3 if options.short else ROUNDS
    report = common.Report("What a federation moves, and how long it takes", ["flwr"])
    report.add(
        f"{SITES} sites, 8 clients each, 12 clients a round, {rounds} rounds, the first left out"
    )
    with TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        images = federation.write_images(folder / "images", SITES)
        place = stack.enter_context(federation.place(folder / "federation", SITES))
        federation.superlink(place)
        federation.superexec(place)
        counter = stack.enter_context(relay(place.port))
        through = replace(place, port=counter.port)
        for number, data in enumerate(images):
            federation.register(place, number)
            config = {"data": str(data), "own-secret-file": federation.secret(place)}
            federation.site(through, number, {**config, "site": f"site-{number + 1}"})
        time.sleep(10)
        quiet = idle(counter, 10 if options.short else 30)
        report.add(
            f"idle, all sites: {quiet['down']:.0f} B/s down, {quiet['up']:.0f} B/s up (polling)",
            "",
            f"{'job':<18}{'way':<6}{'ledger, kB/round':>18}{'wire, kB/round':>16}"
            f"{'wire/ledger':>13}{'s/round':>9}{'request':>9}{'train':>8}{'server':>8}",
        )
        for name, changes in jobs.items():
            (folder / name).mkdir()
            counted = run_job(place, counter, folder / name, changes, rounds)
            report.add(*rows(name, counted, rounds))
    report.write(unless=options.short)


if __name__ == "__main__":
    main()
