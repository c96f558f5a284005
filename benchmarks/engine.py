"""A round of the local engine against loops written by hand, its floor, and other simulators.

    python benchmarks/engine.py                       (about 15 minutes; --jobs for less)
    python benchmarks/engine.py --peer pfl=PYTHON --peer fedjax=PYTHON --peer flower=PYTHON
    python benchmarks/engine.py --profile             (where a round's time goes; writes nothing)

The job is described in ``peers/job.py``; ``full`` asks for all n class rows, ``fedss`` for 64.
Participants are processes of their own that take turns, a round each: ``ours`` is ``fedss.train``,
``loop`` the best loop we could write by hand, ``plain`` a simple one on one thread,
``convolutions`` nothing but the network's convolutions, forward and backward. Each peer runs as its
users run it, by the Python of an environment with ``pip install "fedss[peer-pfl]"`` (or
``peer-fedjax``, ``peer-flower``). Before anything is timed, each trains one round alone, and must
end at the weights of ``plain`` to 1e-4.

Writes ``benchmarks/results/engine.txt``.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.profiler
from omniglot import processor
from torch import nn

PEERS = Path(__file__).parent / "peers"
RESULTS = Path(__file__).parent / "results" / "engine.txt"
sys.path.insert(0, str(PEERS))

from job import BATCH, CLIENTS, COHORT, DIM, LR, PICTURES, SCALE  # noqa: E402
from network import network  # noqa: E402

from fedss.algorithm import (  # noqa: E402
    Broadcast,
    Submodel,
    batches,
    draw_classes,
    draw_cohort,
    own_classes,
    train_client,
)
from fedss.allocator import keep_freed_memory  # noqa: E402
from fedss.build import (  # noqa: E402
    DEFAULT_SAMPLE_SIZE,
    build_model,
    round_plan,
    server_optimizer,
    wire_format,
)
from fedss.class_rows import create_class_rows  # noqa: E402
from fedss.config import Config  # noqa: E402
from fedss.data import Dataset, Images, RetrievalTask, index_clients  # noqa: E402
from fedss.engines.local import local_engine  # noqa: E402
from fedss.seeds import generator  # noqa: E402

LOOPS = ("ours", "loop", "plain", "convolutions")
TOLERANCE = 1e-4
# The first rounds warm up, and the last one of fedss evaluates.
WARM, LAST = 2, 1


@dataclass(frozen=True)
class Job:
    """A method at a number of classes.

    ``beside`` names a job that ours does as well, for ``beside_rounds`` rounds, so that the two can
    be compared.
    """

    method: str
    num_classes: int
    beside: str | None = None
    beside_rounds: int = 2


JOBS = {
    "full-964": Job("full", 964),
    "fedss-964": Job("fedss", 964),
    "fedss-100k": Job("fedss", 100_000, "full-100k"),
    "fedss-1M": Job("fedss", 1_000_000, "full-1M"),
    "full-100k": Job("full", 100_000),
    "full-1M": Job("full", 1_000_000),
}


def settings(method: str, rounds: int) -> dict[str, Any]:
    return {
        "method": method,
        "rounds": rounds,
        "scale": SCALE,
        "clients_per_round": COHORT,
        "batch_size": BATCH,
        "client_lr": LR,
        "class_row_lr": LR,
        "lr_schedule": "constant",
        "server_optimizer": "sgd",
        "normalize_rows": False,
        "embedding_size": DIM,
        "eval_every": 0,
        "checkpoint_every": 10**6,
    }


def first_rows(num_classes: int, seed: int) -> np.ndarray:
    """The class rows that a run of this seed begins with."""
    rows = create_class_rows(num_classes, DIM, (), generator(seed, "class rows"))
    return rows.weight_ND.numpy()


def write_job(folder: Path, job: Job, rounds: int) -> None:
    """Everything that :func:`job.read_job` reads, drawn as fedss draws it."""
    rng, values = np.random.default_rng(0), settings(job.method, rounds)
    config, n = Config(**values), job.num_classes
    pixels = rng.integers(0, 256, (CLIENTS, PICTURES, 1, 28, 28), dtype=np.uint8)
    own = [rng.choice(n, PICTURES // 2, replace=False) for _ in range(CLIENTS)]
    labels = np.repeat(np.stack(own), 2, axis=1)
    torch.manual_seed(0)
    theta = np.concatenate([p.detach().numpy().ravel() for p in network().parameters()])
    cohorts = [draw_cohort(CLIENTS, COHORT, config.seed, r) for r in range(rounds)]
    orders, samples = [], []
    for r, cohort in enumerate(cohorts):
        plan = round_plan(config, n, DEFAULT_SAMPLE_SIZE, r)
        for k in cohort.tolist():
            order = batches(PICTURES, plan.local, generator(config.seed, "batches", r, k))
            orders.append(np.concatenate(list(order)))
            samples.append(draw_classes(plan, k, own_classes(plan, k, labels[k])))
    by_slot = (rounds, COHORT, -1)
    arrays = {
        "pixels": pixels,
        "labels": labels,
        "theta": theta,
        "rows": first_rows(n, config.seed),
        "cohorts": np.stack(cohorts),
        "orders": np.stack(orders).reshape(by_slot),
    }
    if job.method != "full":
        arrays["samples"] = np.stack([s.ids_S.numpy() for s in samples]).reshape(by_slot)
        arrays["log_q"] = np.stack([s.log_q_S.numpy() for s in samples]).reshape(by_slot)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    (folder / "job.json").write_text(json.dumps({"config": values}))


@dataclass(frozen=True)
class Participant:
    """A process that waits for its turn."""

    name: str
    folder: Path
    rounds: int
    process: "subprocess.Popen[str]"

    def turn(self) -> dict[str, float]:
        """Let it run a round (or, after its last one, end): seconds of the clock and of its CPU."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, float]:
        """What it says next; the first thing it says means nothing but that it is ready."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise self._failed()
        return dict(json.loads(line))

    def finish(self) -> float | None:
        """Let it end; its peak of resident memory, MB, if it is one process."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        if self.process.wait():
            raise self._failed()
        return json.loads((self.folder / f"{self.name}.json").read_text())["peak_mb"]

    def _failed(self) -> SystemExit:
        said = (self.folder / f"{self.name}.log").read_text()[-2000:]
        return SystemExit(f"{said}\n{self.name} ended with exit code {self.process.wait()}")


def join(
    name: str, folder: Path, rounds: int, pythons: Mapping[str, str], workers: int
) -> Participant:
    """Start a participant. ``pfl-1`` is ``pfl`` with one torch thread."""
    peer, _, threads = name.partition("-")
    script = PEERS / (f"with_{peer}.py" if name in pythons else f"{name}.py")
    with open(folder / f"{name}.log", "w") as log:
        process = subprocess.Popen(
            [pythons.get(name, sys.executable), script, folder, str(workers), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, **({"OMP_NUM_THREADS": threads} if threads else {})},
        )
    participant = Participant(name, folder, rounds, process)
    participant.answer()
    return participant


def check(job: Job, names: Sequence[str], pythons: Mapping[str, str], workers: int) -> list[str]:
    """One round of each: all end at the same weights. The largest difference of each."""
    differences = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_job(folder, job, 1)
        for name in ("plain", *(n for n in names if n not in ("plain", "convolutions"))):
            participant = join(name, folder, 1, pythons, workers)
            participant.turn()
            participant.finish()
            ends = [np.load(folder / f"{n}.npz") for n in ("plain", name)]
            moved = np.abs(ends[0]["theta"] - np.load(folder / "theta.npy")).max()
            differences[name] = max(np.abs(ends[0][k] - ends[1][k]).max() for k in ends[0])
            if not differences[name] < TOLERANCE < moved:
                raise SystemExit(f"{name} ends {differences[name]:.1e} away from plain")
    return [f"{name} {far:.0e}" for name, far in differences.items() if name != "plain"]


@dataclass(frozen=True)
class Times:
    """What was measured of a participant: its rounds in order, and its peak of memory, MB."""

    rounds: Sequence[Mapping[str, float]]
    peak_mb: float | None

    def median(self, clock: str) -> float:
        """Seconds a round."""
        return statistics.median(r[clock] for r in self.rounds)

    def ratio(self, other: "Times", clock: str) -> float:
        """Median over pairs of rounds that ran one after the other."""
        pairs = zip(self.rounds, other.rounds, strict=False)
        return statistics.median(a[clock] / b[clock] for a, b in pairs)


def measure(
    job: Job, names: Sequence[str], pythons: Mapping[str, str], workers: int, rounds: int
) -> dict[str, Times]:
    """Participants take turns, each time in another order."""
    with tempfile.TemporaryDirectory() as place:
        more, jobs = WARM + LAST, [(job, name, rounds) for name in names]
        if job.beside is not None:
            jobs.append((JOBS[job.beside], "ours", job.beside_rounds))
        there: dict[str, Participant] = {}
        for of, name, count in jobs:
            folder = Path(place) / of.method
            if not folder.exists():
                folder.mkdir()
                write_job(folder, of, count + more)
            label = name if of is job else f"ours, {job.beside}"
            there[label] = join(name, folder, count, pythons, workers)
        found: dict[str, list[dict[str, float]]] = {label: [] for label in there}
        for turn in range(rounds + WARM):
            first = turn % len(there)
            for label in [*there][first:] + [*there][:first]:
                if turn < there[label].rounds + WARM:
                    found[label].append(there[label].turn())
        for participant in there.values():
            participant.turn()
        return {label: Times(found[label][WARM:], p.finish()) for label, p in there.items()}


def table(times: Mapping[str, Times]) -> list[str]:
    lines = [
        f"  {'':<16} {'seconds':>8} {'/ loop':>7} {'/ ours':>7} {'CPU s':>7} {'/ loop':>7}"
        f" {'clients/s':>10} {'peak MB':>8}"
    ]
    ours, loop = times["ours"], times["loop"]
    for label, found in times.items():
        seconds, peak, cpu = found.median("wall"), found.peak_mb, found.median("cpu")
        to_loop = found.ratio(loop, "cpu")
        # The CPU time of several processes is not known.
        of_one = f" {cpu:>7.3f} {to_loop:>7.2f}" if peak else f" {'-':>7} {'-':>7}"
        lines.append(
            f"  {label:<16} {seconds:>8.3f} {found.ratio(loop, 'wall'):>7.2f}"
            f" {found.ratio(ours, 'wall'):>7.2f}{of_one} {COHORT / seconds:>10.1f}"
            f" {'-' if peak is None else f'{peak:.0f}':>8}"
        )
    return lines


KINDS = {
    "convolutions": ("convolution",),
    "group norms": ("group_norm",),
    "pooling": ("max_pool2d",),
    "ReLU": ("relu", "threshold_backward", "clamp_min"),
    "matrix products": ("::mm", "::addmm"),
    "gradients and SGD step": ("::add_", "::sub_", "::zero_", "::fill_", "AccumulateGrad"),
}


def profile(title: str, config: Config, backbone: nn.Module | None) -> list[str]:
    """Where the time of :func:`fedss.algorithm.train_client` goes, by kind of operation."""
    rng, num_classes, clients = np.random.default_rng(0), 964, 20
    own = [rng.choice(num_classes, PICTURES // 2, replace=False) for _ in range(clients)]
    images = Images(
        rng.integers(0, 256, (clients * PICTURES, 1, 28, 28), dtype=np.uint8),
        np.repeat(np.stack(own), 2, axis=1).ravel(),
        np.repeat(np.arange(clients), PICTURES),
        [str(i) for i in range(num_classes)],
        [str(k) for k in range(clients)],
        [str(i) for i in range(clients * PICTURES)],
    )
    data = Dataset(title, images, RetrievalTask(images))
    embedder, index = build_model(config, data, backbone), index_clients(images)
    wire, optimizer = wire_format(config, embedder, num_classes), server_optimizer(config)
    plan = round_plan(config, num_classes, DEFAULT_SAMPLE_SIZE, 0)
    rows_ND = torch.from_numpy(first_rows(num_classes, 0))
    keep_freed_memory()
    with local_engine(embedder, index, optimizer, wire, 1) as engine, engine.replica() as replica:
        sent = Broadcast(replica.theta_P.clone(), None)

        def train(client: int) -> None:
            example_N = index.examples(client)
            label_N = images.labels[example_N]
            sample = draw_classes(plan, client, own_classes(plan, client, label_N))
            submodel = Submodel(sent, sample.ids_S, rows_ND[sample.ids_S])
            train_client(plan, client, replica, submodel, sample, example_N, label_N)

        for client in range(clients):
            train(client)
        began = time.thread_time()
        for client in range(clients):
            train(client)
        seconds = (time.thread_time() - began) / clients
        with torch.profiler.profile() as found:
            for client in range(clients):
                train(client)
    events = [e for e in found.key_averages() if e.self_cpu_time_total > 0]
    total = sum(e.self_cpu_time_total for e in events)
    shares, rest = dict.fromkeys(KINDS, 0.0), 0.0
    for event in events:
        kinds = [k for k, parts in KINDS.items() if any(part in event.key for part in parts)]
        if kinds:
            shares[kinds[0]] += event.self_cpu_time_total / total
        else:
            rest += event.self_cpu_time_total / total
    steps = -(-PICTURES // config.batch_size)
    calls = sum(e.count for e in events if e.key.startswith("aten::")) / clients / steps
    return [
        f"{title}: {1000 * seconds:.2f} ms of CPU a client, {1000 * seconds / steps:.2f} ms a step,"
        f" {calls:.0f} operations a step",
        *(f"  {kind:<24} {100 * share:>5.1f} %" for kind, share in shares.items()),
        f"  {'all else':<24} {100 * rest:>5.1f} %",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS)[:4])
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds (default: 9)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="threads of ours")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    pythons = dict(peer.split("=", 1) for peer in options.peer)
    if options.profile:
        for method in ("full", "fedss"):
            config = Config(**settings(method, 1))
            print("\n".join(profile(f"common job, {method}", config, network())), flush=True)
        print("\n".join(profile("fedss train, defaults", Config(), None)))
        return
    lines = [
        "A round of the common job (benchmarks/peers/job.py): 16 clients of 30 pictures",
        f"command   python benchmarks/engine.py {' '.join(sys.argv[1:])}",
        f"date      {datetime.date.today().isoformat()}",
        f"hardware  {processor()}, {os.cpu_count()} cores, no GPU",
        f"threads   {options.workers} in ours, loop and convolutions; 1 in plain; peers: their own",
        f"software  fedss {version('fedss')}, torch {version('torch')}, "
        f"numpy {version('numpy')}, Python {platform.python_version()}",
    ]
    for name in options.jobs:
        names = [*LOOPS, *(pythons if name == "full-964" else ())]
        differences = check(JOBS[name], names, pythons, options.workers)
        times = measure(JOBS[name], names, pythons, options.workers, options.rounds)
        lines += ["", f"{name} (weights after a round, from plain: {', '.join(differences)})"]
        lines += table(times)
        print("\n".join(lines[-len(times) - 2 :]), flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text("\n".join(lines) + "\n")
    print(f"written to {RESULTS}")


if __name__ == "__main__":
    main()
