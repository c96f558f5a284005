"""What tests run as ranks: real processes that meet over gloo, each with torchrun's environment."""

import dataclasses
import hashlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fedss
from fedss.cli import main
from fedss.core import checks
from fedss.core.state import ServerState
from fedss.training import loop
from tests import reference
from tests.reports import empty_reports

# A server that has imported everything once; each rank is a fork of it.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.ranks", "torch.utils.tensorboard", "matplotlib.pyplot"])


@dataclasses.dataclass(frozen=True)
class Rank:
    """How a rank ended: exit code (minus the signal), its output, and what it found."""

    code: int
    output: str
    found: Any


def launch(size: int, job: Callable[..., Any], *arguments: Any) -> list[Rank]:
    """Run ``job(*arguments)`` at each rank until all have ended."""
    with tempfile.TemporaryDirectory() as folder:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        started = []
        for rank in range(size):
            environment = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": size,
                "LOCAL_WORLD_SIZE": size,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            files = [Path(folder) / f"{kind}-{rank}" for kind in ("output", "found")]
            process = PROCESSES.Process(target=_be, args=(environment, files, job, arguments))
            process.start()
            started.append((process, files))
        ended = []
        for process, (output, found) in started:
            process.join(60)
            hangs = process.is_alive()
            process.kill()
            assert not hangs, f"a rank hangs; it said: {output.read_text()}"
            text = found.read_text() if found.exists() else "null"
            ended.append(Rank(process.exitcode or 0, output.read_text(), json.loads(text)))
        return ended


def _be(
    environment: dict[str, Any], files: list[Path], job: Callable[..., Any], arguments: Any
) -> None:
    os.environ.update({name: str(value) for name, value in environment.items()})
    torch.set_num_threads(1)
    # Where a test before has left it ignored, the server was started so.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    output = os.open(files[0], os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    # The server's standard streams have other descriptors.
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", buffering=1)
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", buffering=1)
    files[1].write_text(json.dumps(job(*arguments)))


def digest(state: ServerState) -> str:
    """Of every number of the server's state."""
    rows, content = state.class_rows, hashlib.sha256()
    tensors = [state.backbone_P, *state.backbone_slots.values()]
    tensors += [reference.whole(rows), *rows.slots.values(), rows.updated_N]
    if rows.sums_EE is not None:
        tensors.append(rows.sums_EE)
    if state.clip is not None:
        tensors.append(torch.tensor([state.clip], dtype=torch.float64))
    for tensor in tensors:
        content.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return content.hexdigest()


def train(configs: dict[str, fedss.Config], folder: Path) -> dict[str, Any]:
    """Train each. By name: the run's summary, and for each round the state's digest, the examples
    of this rank's clients, and how many rows were noted as changed before it."""
    found: dict[str, Any] = {}
    run_round = loop.run_round  # type: ignore[attr-defined]

    def watched(server: Any, engine: Any, state: ServerState, *rest: Any) -> Any:
        changed = sum(map(len, state.class_rows.changed))
        state, updates, failures = run_round(server, engine, state, *rest)
        examples = [update.num_examples for update in updates]
        found[name]["rounds"].append([digest(state), examples, changed])
        return state, updates, failures

    loop.run_round = watched  # type: ignore[attr-defined, assignment]
    with empty_reports():
        for name, config in configs.items():
            found[name] = {"rounds": []}
            found[name]["summary"] = fedss.train(config, folder / name, **tiny()).summary
    return found


def live_on(config: fedss.Config, folder: Path) -> list[Any]:
    """Runs that a callback stops at round 2, that go on to 6, and that start from the first one."""
    longer = dataclasses.replace(config, rounds=6)

    def stop(record: Any) -> object:
        return fedss.STOP if record["round"] == 2 else None

    with empty_reports():
        stopped = fedss.train(config, folder / "stopped", **tiny(), on_round=stop)
        grown = [fedss.train(c, folder / "grown", **tiny()) for c in (config, longer)]
        other = fedss.train(config, folder / "other", **tiny(), start=folder / "stopped")
    return [run.summary for run in (stopped, *grown, other)]


def tiny() -> dict[str, Any]:
    """Data and model of the tests."""
    return {"data": reference.tiny_dataset(), "backbone": reference.tiny_backbone()}


def commands(*commands: list[str]) -> list[int]:
    """The exit code of each ``fedss`` command."""
    codes = []
    for words in commands:
        try:
            codes.append(main(words))
        except SystemExit as ended:
            codes.append(int(ended.code or 0))
    return codes


class StopError(Exception):
    """An error that is not the library's."""


def fail_in_every_way(config: fedss.Config, folder: Path) -> list[list[str]]:
    """One rank alone meets with an error, each time another: what every rank raises."""
    this = int(os.environ["RANK"])
    found = []

    def attempt(settings: dict[str, Any], out: str | None = None, **changed: Any) -> None:
        try:
            now = dataclasses.replace(config, **settings)
            fedss.train(now, folder / (out or str(len(found))), **{**tiny(), **changed})
        except Exception as error:
            found.append([type(error).__name__, str(error)])
        else:
            found.append(["", ""])

    def stop(record: Any) -> None:
        raise StopError("enough")

    attempt({}, on_round=stop)
    attempt({}, data=reference.tiny_dataset(seed=this))
    attempt({"client_lr": 0.05 + this})
    attempt({}, out=f"not shared {this}")
    check_finite = checks.check_finite

    most = 99

    def diverge(update: Any, plan: Any) -> Any:
        nonlocal most
        bad = this == 1 and plan.round == 1 and most > 0
        most -= bad
        loss = float("nan") if bad else update.loss
        return check_finite(dataclasses.replace(update, loss=loss), plan)

    checks.check_finite = diverge
    attempt({})

    def break_down(update: Any, plan: Any) -> Any:
        if this == 1:
            raise IndexError("out of range")
        return update

    checks.check_finite = break_down
    attempt({})
    checks.check_finite = check_finite
    attempt({})
    most, checks.check_finite = 1, diverge
    attempt({})
    return found


def die(victim: int, round: int, number: int, words: list[str]) -> int:
    """A ``fedss`` command in which one rank gets a signal when its first client of a round
    (1-based) is done."""
    if int(os.environ["RANK"]) == victim:
        check_finite = checks.check_finite

        def check_or_die(update: Any, plan: Any) -> Any:
            if plan.round + 1 == round:
                os.kill(os.getpid(), number)
            return check_finite(update, plan)

        checks.check_finite = check_or_die
    return main(words)


if __name__ == "__main__":
    sys.exit(die(int(sys.argv[1]), int(sys.argv[2]), signal.SIGKILL, sys.argv[3:]))
