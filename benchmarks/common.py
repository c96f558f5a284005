"""What the benchmarks share: options, reports, clocks, processes, and federations of random images.

Each is run as ``python benchmarks/NAME.py``, so Python looks for modules in this folder. Importing
this one adds ``peers``, and the root of the repository for ``examples`` and ``tests``.
"""

import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import fedss
from fedss.core.class_rows import create_class_rows, with_sums
from fedss.core.client import LocalTraining, RoundPlan
from fedss.core.engine import Engine
from fedss.core.optimizers import ServerOptimizer
from fedss.core.state import ServerState
from fedss.data import ClientIndex, LazyNames
from fedss.distributed import Ranks
from fedss.engines.local import LocalEngine, local_engine
from fedss.losses.methods import METHODS
from fedss.losses.softmax import Scoring
from fedss.models import Embedder, flatten_
from fedss.sampling.samplers import SAMPLERS
from fedss.wire.messages import WireFormat

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PEERS = ROOT / "benchmarks" / "peers"
sys.path[:0] = [str(ROOT), str(PEERS)]

T = TypeVar("T")

# Options and reports.


def parser(doc: str | None, short: str = "") -> argparse.ArgumentParser:
    """Described by the first line of a script's docstring; with ``--short`` if that has a help."""
    made = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    if short:
        made.add_argument("--short", action="store_true", help=short)
    return made


def head(
    title: str,
    packages: Sequence[str] = (),
    *,
    command: str | None = None,
    hardware: str = "no GPU used",
) -> list[str]:
    """The first lines of a results file: what, by which command, when, on what, with what.

    Args:
        packages: Those whose versions matter beside fedss, torch and numpy.
        command: Given where the command line names folders of this machine.
        hardware: What to say beside the processor.
    """
    words = ["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]
    try:
        versions = [f"{name} {version(name)}" for name in ("fedss", "torch", "numpy", *packages)]
    except PackageNotFoundError as error:
        raise SystemExit(
            f"{error.name} is missing: benchmarks/README.md has what to install"
        ) from None
    return [
        title,
        f"command   {command or ' '.join(words)}",
        f"date      {datetime.date.today()}",
        f"hardware  {processor()}, {os.cpu_count()} cores, {hardware}",
        f"software  {', '.join(versions)}, Python {platform.python_version()}",
        "",
    ]


def processor() -> str:
    """The processor's name, where the system tells."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


class Report:
    """Lines that are printed when they are added, and written to ``results/`` at the end."""

    def __init__(
        self, title: str, packages: Sequence[str] = (), *, name: str = "", **more: str
    ) -> None:
        self.path = RESULTS / f"{name or Path(sys.argv[0]).stem}.txt"
        self.lines: list[str] = []
        self.add(*head(title, packages, **more))

    def add(self, *lines: str) -> None:
        """Print some lines, and keep them."""
        self.lines += lines
        print("\n".join(lines), flush=True)

    def write(self, *, unless: object = False, append: bool = False) -> None:
        """Write the file, ``unless`` this was a short form; or append to it."""
        if unless:
            return
        before = self.path.read_text() + "\n" if append and self.path.exists() else ""
        self.path.write_text(before + "\n".join(self.lines) + "\n")
        print(f"written to {self.path}")


# Clocks and memory.


class Spent(NamedTuple):
    """Seconds of the clock, and of the CPU in all threads of this process."""

    wall: float
    cpu: float


def timed(work: Callable[[], T]) -> tuple[T, Spent]:
    """What ``work`` returns, and the time that it took."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return result, Spent(time.perf_counter() - wall, time.process_time() - cpu)


def rotated(items: Sequence[T], turn: int) -> list[T]:
    """All items, each turn with another one first: nobody always runs after the same one."""
    first = turn % len(items)
    return [*items[first:], *items[:first]]


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Median over turns: what runs in the same turn finds the machine equally busy."""
    return statistics.median(a / b for a, b in zip(above, below, strict=False))


def peak_megabytes() -> float:
    """The most memory that this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def resident_megabytes() -> float:
    """The memory that this process holds now, where the system tells; else its peak."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return peak_megabytes()
    return pages * resource.getpagesize() / 1e6


# Processes.


def run_script(main: Callable[[], None], **jobs: Callable[..., object]) -> None:
    """Run ``main``, or the job that :func:`job_command` names."""
    if sys.argv[1:2] == ["--job"]:
        print(json.dumps(jobs[sys.argv[2]](*json.loads(sys.argv[3]))))
    else:
        main()


def job_command(job: str, *args: object) -> list[str]:
    """This script, running one of its jobs with these arguments: numbers, texts, paths, None."""
    return [sys.argv[0], "--job", job, json.dumps(args, default=str)]


def in_own_process(job: str, *args: object, threads: int | None = None) -> dict[str, Any]:
    """What a job of this script returns, run by a process of its own."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS") if threads else ()
    done = subprocess.run(
        [sys.executable, *job_command(job, *args)],
        env={**os.environ, **dict.fromkeys(names, str(threads))},
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{job} {args} failed")
    return dict(json.loads(done.stdout.splitlines()[-1]))


@dataclass(frozen=True)
class Participant:
    """A process that waits for its turn, and answers each with a line of JSON."""

    name: str
    process: "subprocess.Popen[str]"
    log: Path

    def turn(self) -> dict[str, float]:
        """Let it run a round; what it says of it."""
        self._go()
        return self.answer()

    def answer(self) -> dict[str, float]:
        """What it says next; the first thing it says means nothing but that it is ready."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise self._failed()
        return dict(json.loads(line))

    def finish(self) -> None:
        """Let it end."""
        self._go()
        if self.process.wait():
            raise self._failed()

    def _go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def _failed(self) -> SystemExit:
        said = self.log.read_text()[-2000:]
        return SystemExit(f"{said}\n{self.name} ended with exit code {self.process.wait()}")


@contextmanager
def participant(
    name: str, command: Sequence[str | Path], folder: Path, environment: Mapping[str, str]
) -> Iterator[Participant]:
    """Start one, with its log in ``folder``, and wait until it is ready; the block ends it."""
    log = folder / f"{name}.log"
    with (
        open(log, "w") as file,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            env={**os.environ, **environment},
        ) as process,
    ):
        started = Participant(name, process, log)
        try:
            started.answer()
            yield started
        finally:
            process.terminate()


def train(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The summary of a ``fedss train`` in its folder: one that is complete is not run again.

    A setting that is None is left out.
    """
    words = [sys.executable, "-m", "fedss", "train", "--out", str(folder)]
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if value is None:
            continue
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", str(value)]
    done = subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}\n{done.stderr}")
    (summary,) = json.loads((folder / "summary.json").read_text())
    place = f"{folder.parent.name}/{folder.name}"
    print(f"{place:<60} MAP@10 {summary['map_at_10']:.3f}", flush=True)
    return dict(summary)


def search(
    start: Mapping[str, float],
    judge: Callable[[dict[str, float]], float],
    steps: Mapping[str, float],
    *,
    again: bool = True,
) -> list[dict[str, Any]]:
    """Climb from ``start``, one setting after another, and ``again`` until no step of any helps.

    Returns:
        ``settings`` and ``map_at_10`` of all that was tried, as trials.
    """
    tried: dict[tuple[Any, ...], float] = {}

    def value(settings: dict[str, float]) -> float:
        key = tuple(settings.values())
        if key not in tried:
            tried[key] = judge(settings)
        return tried[key]

    best, moved = dict(start), True
    while moved:
        moved = False
        for name in start:
            for factor in (steps[name], 1 / steps[name]):
                while value(further := step(best, name, factor)) > value(best):
                    best, moved = further, again
    return [
        {"settings": dict(zip(start, key, strict=True)), "map_at_10": score}
        for key, score in tried.items()
    ]


def step(settings: Mapping[str, float], name: str, factor: float) -> dict[str, float]:
    """The settings with one of them multiplied, to three digits."""
    return {**settings, name: float(f"{settings[name] * factor:.3g}")}


# Random images, embeddings and clients.

DIM = 64
OPTIMIZER = ServerOptimizer("momentum")


def random_pixels(count: int, side: int, channels: int = 1) -> np.ndarray:
    """uint8 [count, channels, side, side]."""
    shape = (count, channels, side, side)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def photograph(seed: int, width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Random fields from coarse to fine, and grain."""
    rng = np.random.default_rng(seed)
    bands = []
    for _ in range(3):
        band = rng.normal(128, 3, (height, width)).astype(np.float32)
        for cells, strength in ((8, 60), (32, 35), (128, 20)):
            field = Image.fromarray(rng.normal(0, strength, (cells, cells)).astype(np.float32))
            band += np.asarray(field.resize((width, height), Image.Resampling.BICUBIC))
        bands.append(np.clip(band, 0, 255).astype(np.uint8))
    return Image.fromarray(np.stack(bands, axis=2)).convert(mode)


def paired_labels(clients: int, images: int, classes: int, seed: int = 0) -> np.ndarray:
    """int64 [clients, images]: each client has two images of each of its random classes."""
    rng = np.random.default_rng(seed)
    own = [rng.choice(classes, images // 2, replace=False) for _ in range(clients)]
    return np.repeat(np.stack(own), 2, axis=1)


def named_images(
    pixels: np.ndarray, labels: np.ndarray, clients: np.ndarray, kind: str = "class"
) -> fedss.Images:
    """Images with names that are made up when somebody asks for them."""
    return fedss.Images(
        pixels,
        labels,
        clients,
        LazyNames(int(labels.max()) + 1, f"{kind} {{}}".format),
        LazyNames(int(clients.max()) + 1, "client {}".format),
        LazyNames(len(labels), f"{kind}-{{}}.png".format),
    )


def random_embeddings(rows: int) -> tuple[Tensor, Tensor]:
    """Embeddings [rows, 64] and labels: classes of 2 to 12 images, 5.35 on average.

    As many as the test set of Stanford Online Products has: 60,502 in 11,316 classes.
    """
    generator = torch.Generator().manual_seed(0)
    classes = max(1, rows * 11_316 // 60_502)
    more = torch.randperm(10 * classes, generator=generator)[: rows - 2 * classes]
    labels = torch.cat([torch.arange(2 * classes), more]) % classes
    labels = labels[torch.randperm(rows, generator=generator)]
    centres = torch.randn(classes, DIM, generator=generator)
    return centres[labels] + torch.randn(rows, DIM, generator=generator), labels


@dataclass(frozen=True)
class Unnamed:
    """As much of ``fedss.Images`` as an engine reads: with a name for each class it takes long."""

    pixels: Any
    labels: np.ndarray


def clients_of(pixels: Any, labels: np.ndarray, starts: np.ndarray | None = None) -> ClientIndex:
    """Clients that each hold a row of labels, or the images from one start to the next."""
    if starts is None:
        starts, labels = labels.shape[1] * np.arange(len(labels) + 1), labels.ravel()
    return ClientIndex(Unnamed(pixels, labels), np.arange(len(labels)), starts)  # type: ignore[arg-type]


def plan_of(num_classes: int, sample_size: int, local: LocalTraining, round: int = 0) -> RoundPlan:
    """A round of FedSS with uniform samples."""
    method, sampler, size = METHODS["fedss"], SAMPLERS["uniform"], min(sample_size, num_classes)
    return RoundPlan(round, 0, method, sampler, num_classes, size, 0, Scoring(10.0), local)


def first_state(embedder: Embedder, num_classes: int) -> ServerState:
    """What the server starts from under FedAvgM."""
    theta_P = flatten_(embedder).theta_P.clone()
    rows = with_sums(
        create_class_rows(num_classes, embedder.spec.embedding_size, OPTIMIZER.slots, 0)
    )
    return ServerState(theta_P, {"momentum": torch.zeros_like(theta_P)}, rows, 0)


def cpu_milliseconds(
    engine: LocalEngine, state: ServerState, cohort: np.ndarray, plan: RoundPlan
) -> float:
    """CPU time that the clients of a round take to train."""
    return 1000 * timed(lambda: list(engine.train(state, cohort, plan)))[1].cpu


@contextmanager
def engine_of(
    embedder: Embedder, clients: ClientIndex, num_classes: int, workers: int | None, **more: Any
) -> Iterator[LocalEngine]:
    """The local engine under FedAvgM; ``more`` are its other arguments."""
    shapes = tuple(p.shape for p in embedder.parameters() if p.requires_grad)
    wire = WireFormat(shapes, embedder.spec.embedding_size, num_classes)
    with local_engine(embedder, clients, OPTIMIZER, wire, workers, **more) as engine:
        yield engine


@dataclass(frozen=True)
class WrappedEngine:
    """Another engine, whose training a subclass watches or changes."""

    engine: Engine

    @property
    def ranks(self) -> Ranks:
        """Those of the engine."""
        return self.engine.ranks

    def num_clients(self, round: int) -> int:
        """Those of the engine."""
        return self.engine.num_clients(round)
