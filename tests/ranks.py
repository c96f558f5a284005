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
from fedss import algorithm, experiment, ranks
from fedss.algorithm import ServerState
from fedss.cli import main
from tests import reference

# A server that has imported everything once; each rank is a fork of it.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.ranks", "torch.utils.tensorboard", "matplotlib.pyplot"])


@dataclasses.dataclass(frozen=True)
class Rank:
    """How a rank ended: exit code (minus the signal), its output, and what it found."""

    code: int
    output: str
    found: Any


def launch(
    size: int, job: Callable[..., Any], *arguments: Any, halted: int | None = None
) -> list[Rank]:
    """Run ``job(*arguments)`` at each rank until all have ended; one that halts does not."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
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
        for rank, (process, (output, _)) in enumerate(started):
            if rank != halted:
                process.join(600)
                hangs = process.is_alive()
                process.kill()
                assert not hangs, f"rank {rank} hangs; it said: {output.read_text()}"
        ended = []
        for process, (output, found) in started:
            process.kill()
            process.join()
            text = found.read_text() if found.exists() else "null"
            ended.append(Rank(process.exitcode or 0, output.read_text(), json.loads(text)))
        return ended


def _be(
    environment: dict[str, Any], files: list[Path], job: Callable[..., Any], arguments: Any
) -> None:
    os.environ.update({name: str(value) for name, value in environment.items()})
    torch.set_num_threads(1)
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
    tensors += [rows.weight_ND, *rows.slots.values(), rows.updated_N]
    if rows.history is not None:
        tensors += [rows.history.second_ZZ, *rows.history.maps.values()]
    for tensor in tensors:
        content.update(tensor.numpy().tobytes())
    return content.hexdigest()


def train(configs: dict[str, fedss.Config], folder: Path) -> dict[str, Any]:
    """Train each; by name: the state's digest after each round, and examples of this rank."""
    found: dict[str, Any] = {}
    run_round, tally = experiment.run_round, algorithm.tally

    def watched_round(*arguments: Any) -> Any:
        found[name]["examples"].append([])
        state, whole = run_round(*arguments)
        found[name]["digests"].append(digest(state))
        return state, whole

    def watched_tally(update: Any) -> Any:
        found[name]["examples"][-1].append(update.num_examples)
        return tally(update)

    experiment.run_round, algorithm.tally = watched_round, watched_tally
    for name, config in configs.items():
        found[name] = {"digests": [], "examples": []}
        run = fedss.train(config, folder / name, **tiny())
        found[name]["summary"] = run.summary
    return found


def tiny() -> dict[str, Any]:
    """Data and model of the tests."""
    return {"data": reference.tiny_dataset(), "backbone": reference.tiny_backbone()}


def command(*words: str) -> int:
    """A ``fedss`` command; its exit code."""
    return main(list(words))


class StopError(Exception):
    """An error that is not the library's."""


def fail_in_every_way(config: fedss.Config, folder: Path) -> list[list[str]]:
    """One rank alone meets with an error, each time another: what every rank raises."""
    this = int(os.environ["RANK"])
    found = []

    def attempt(expected: str, settings: dict[str, Any], **changed: Any) -> None:
        try:
            now = dataclasses.replace(config, **settings)
            fedss.train(now, folder / str(len(found)), **{**tiny(), **changed})
        except Exception as error:
            found.append([expected, type(error).__name__, str(error)])
        else:
            found.append([expected, "", ""])

    def stop(record: Any) -> None:
        raise StopError("enough")

    attempt("first's own", {}, on_round=stop)
    attempt("other data", {}, data=reference.tiny_dataset(seed=this))
    attempt("other settings", {"client_lr": 0.05 + this})
    check_finite = algorithm.check_finite

    def diverge(update: Any, plan: Any) -> Any:
        loss = float("nan") if this == 1 and plan.round == 1 else update.loss
        return check_finite(dataclasses.replace(update, loss=loss), plan)

    algorithm.check_finite = diverge
    attempt("diverged", {})

    def break_down(update: Any, plan: Any) -> Any:
        if this == 1:
            raise IndexError("out of range")
        return update

    algorithm.check_finite = break_down
    attempt("a bug", {})
    algorithm.check_finite = check_finite
    attempt("nothing", {})
    return found


def die(victim: int, round: int, number: int, words: list[str], patience: int) -> int:
    """A ``fedss train`` in which one rank gets a signal when its first client of a round (1-based)
    is done; others wait for ``patience`` signs of life of a silent one."""
    ranks._SILENT = patience
    if int(os.environ["RANK"]) == victim:
        check_finite = algorithm.check_finite

        def check_or_die(update: Any, plan: Any) -> Any:
            if plan.round + 1 == round:
                os.kill(os.getpid(), number)
            return check_finite(update, plan)

        algorithm.check_finite = check_or_die
    return command("train", *words)


if __name__ == "__main__":
    victim, round, name, *options = sys.argv[1:]
    sys.exit(die(int(victim), int(round), signal.Signals[name], options, ranks._SILENT))
