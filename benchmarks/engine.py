"""A round of the local engine against loops written by hand, its floor, and other simulators.

    python benchmarks/engine.py                (about 10 minutes)
    python benchmarks/engine.py --short        (a minute: ours and the loops; writes nothing)
    python benchmarks/engine.py --peer pfl=PYTHON --peer fedjax=PYTHON --peer flower=PYTHON
    python benchmarks/engine.py --profile      (where a round's time goes; writes nothing)

The job is described in ``peers/job.py``; ``full`` asks for all n class rows, ``fedss`` for 64.
Participants are processes of their own that take turns, a round each: ``ours`` is ``fedss.train``,
``loop`` the best loop we could write by hand, ``plain`` a simple one on one thread,
``convolutions`` nothing but the network's convolutions, forward and backward. Each peer runs as its
users run it, by the Python of an environment with ``pip install "fedss[peer-pfl]"`` (or
``peer-fedjax``, ``peer-flower``), in all its variants: ``pfl`` is one process, ``pfl-torchrun`` one
process of one torch thread for each core, as our workers have, and ``-tuned`` has what ours does to
memory (freed memory is kept, channels lie side by side). Before anything is timed, each trains one
round alone, and must end at the weights of ``plain`` to 1e-4 (not if short).

Writes ``benchmarks/results/engine.txt`` (not with --short, --classes or --rounds).
"""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from job import CLIENTS, COHORT, DIM, IMAGES, settings
from network import network

from fedss.config import Config
from fedss.core.algorithm import draw_cohort
from fedss.core.class_rows import create_class_rows, read
from fedss.core.client import batches, draw_classes, limit_own_classes
from fedss.seeds import generator
from fedss.settings import Problem, resolve
from fedss.training.build import round_plan

# Who takes part, by number of classes and method. ("peers": those given.)
LOOPS = ("ours", "loop", "plain")
TABLES = {
    964: {"full": (*LOOPS, "convolutions", "peers"), "fedss": LOOPS},
    100_000: {"full": ("ours", "loop"), "fedss": LOOPS},
    1_000_000: {"full": ("ours",), "fedss": LOOPS},
}
SHORT = {964: {"full": LOOPS, "fedss": LOOPS}, 100_000: {"fedss": LOOPS}}
VARIANTS = {
    "pfl": ("pfl", "pfl-torchrun", "pfl-torchrun-tuned"),
    "flower": ("flower", "flower-tuned"),
    "fedjax": ("fedjax",),
}
PACKAGES = {
    "pfl": ("pfl", "torch"),
    "flower": ("flwr", "ray", "torch"),
    "fedjax": ("fedjax", "jax"),
}
# Rounds beside those timed: the first ones warm up, and the last one of ours evaluates.
WARM, LAST = 2, 1


def write_job(folder: Path, method: str, n: int, rounds: int) -> None:
    """Everything that ``job.read_job`` reads, drawn as fedss draws it."""
    folder.mkdir()
    config, _ = resolve(Config(**settings(method, rounds)), Problem(n, CLIENTS, IMAGES, IMAGES / 2))
    pixels = common.random_pixels(CLIENTS * IMAGES, 28).reshape(CLIENTS, IMAGES, 1, 28, 28)
    labels = common.paired_labels(CLIENTS, IMAGES, n)
    torch.manual_seed(0)
    theta = torch.nn.utils.parameters_to_vector(network().parameters()).detach()
    rows = read(create_class_rows(n, DIM, (), config.seed), torch.arange(n))[0]
    cohorts = [draw_cohort(CLIENTS, COHORT, config.seed, r) for r in range(rounds)]
    orders, samples = [], []
    for r, cohort in enumerate(cohorts):
        plan = round_plan(config, n, r)
        for k in cohort.tolist():
            order = batches(IMAGES, plan.local, generator(config.seed, "batches", r, k))
            orders.append(np.concatenate(list(order)))
            if method != "full":
                samples.append(draw_classes(plan, k, limit_own_classes(plan, k, labels[k])))
    arrays: dict[str, Any] = {"pixels": pixels, "labels": labels, "theta": theta, "rows": rows}
    arrays |= {"cohorts": np.stack(cohorts), "orders": _by_slot(orders, rounds)}
    if samples:
        arrays["samples"] = _by_slot([s.ids_S for s in samples], rounds)
        arrays["log_q"] = _by_slot([s.log_q_S for s in samples], rounds)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    (folder / "job.json").write_text(json.dumps(settings(method, rounds)))


def _by_slot(values: Sequence[Any], rounds: int) -> np.ndarray:
    return np.stack(values).reshape(rounds, COHORT, -1)


def started(
    name: str, folder: Path, pythons: Mapping[str, str], workers: int, **environment: str
) -> AbstractContextManager[common.Participant]:
    """A participant, once it is ready; it is ended with the block."""
    peer, *variant = name.split("-")
    command: list[str | Path] = [pythons.get(peer, sys.executable)]
    if "torchrun" in variant:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(workers)]
        environment["OMP_NUM_THREADS"] = "1"
    command.append(common.PEERS / (f"with_{peer}.py" if peer in pythons else f"{name}.py"))
    command += [folder, str(workers), name]
    return common.participant(name, command, folder, environment)


def distance_from_plain(
    folder: Path, names: Sequence[str], pythons: Mapping[str, str], workers: int
) -> dict[str, float]:
    """One round of each: all end at the same weights. The largest difference of each."""
    far: dict[str, float] = {}
    for name in ("plain", *(n for n in names if n not in ("plain", "convolutions"))):
        # In float32, JAX's other rounding turns a max-pool or ReLU here and there: 2e-4 apart.
        with started(name, folder, pythons, workers, JAX_ENABLE_X64="1") as alone:
            alone.turn()
            alone.finish()
        plain, end = (np.load(folder / f"{n}.npz") for n in ("plain", name))
        moved = np.abs(plain["theta"] - np.load(folder / "theta.npy")).max()
        far[name] = max(np.abs(plain[k] - end[k]).max() for k in ("theta", "rows"))
        if not far[name] < 1e-4 < moved:
            raise SystemExit(f"{name} ends {far[name]:.1e} away from plain")
    return far


@dataclass(frozen=True)
class Times:
    """What was measured of a participant: its rounds in order, and its peak of memory, MB."""

    rounds: Sequence[Mapping[str, float]]
    peak_mb: float | None

    def median(self, clock: str) -> float:
        """Seconds a round."""
        return statistics.median(r[clock] for r in self.rounds)

    def ratio(self, other: "Times", clock: str = "wall") -> float:
        """Median over the rounds of the same turn."""
        own, others = ([r[clock] for r in times.rounds] for times in (self, other))
        return common.median_ratio(own, others)


def measure(
    folders: Mapping[str, Path],
    who: Mapping[str, Sequence[str]],
    pythons: Mapping[str, str],
    workers: int,
    rounds: Mapping[str, int],
) -> dict[tuple[str, str], Times]:
    """All methods' participants take turns, each time in another order."""
    with ExitStack() as stack:
        participants = {
            (method, name): stack.enter_context(started(name, folders[method], pythons, workers))
            for method, names in who.items()
            for name in names
        }
        turns: dict[tuple[str, str], list[dict[str, float]]] = {key: [] for key in participants}
        for turn in range(max(rounds.values()) + WARM):
            for key in common.rotated([*participants], turn):
                if turn < rounds[key[0]] + WARM:
                    turns[key].append(participants[key].turn())
        for one in participants.values():
            one.turn()
        for one in participants.values():
            one.finish()
    told = {
        key: json.loads((folders[key[0]] / f"{key[1]}.json").read_text()) for key in participants
    }
    return {key: Times(turns[key][WARM:], told[key]["peak_mb"]) for key in participants}


def table(
    times: Mapping[tuple[str, str], Times], far: Mapping[str, Mapping[str, float]]
) -> list[str]:
    names = ("seconds", "/ loop", "/ ours", "CPU s", "/ loop", "clients/s", "peak MB", "from plain")
    lines = [f"  {'':<25}" + "".join(f"{name:>11}" for name in names)]
    for (method, name), result in times.items():
        ours, loop = times[method, "ours"], times.get((method, "loop"))
        cells = [
            f"{result.median('wall'):.3f}",
            loop and f"{result.ratio(loop):.2f}",
            f"{result.ratio(ours):.2f}",
            # The CPU time of several processes is not known.
            result.peak_mb and f"{result.median('cpu'):.3f}",
            result.peak_mb and loop and f"{result.ratio(loop, 'cpu'):.2f}",
            f"{COHORT / result.median('wall'):.1f}",
            result.peak_mb and f"{result.peak_mb:.0f}",
            f"{far[method][name]:.0e}" if name in far.get(method, {}) else None,
        ]
        lines.append(f"  {method + ' ' + name:<25}" + "".join(f"{c or '-':>11}" for c in cells))
    if ("full", "ours") in times:
        saved = times["full", "ours"].ratio(times["fedss", "ours"])
        lines.append(f"  ours: full takes {saved:.2f} times fedss")
    return lines


def versions(python: str, names: Sequence[str]) -> str:
    code = "import sys\nfrom importlib.metadata import version\nprint(*map(version, sys.argv[1:]))"
    versions = subprocess.check_output([python, "-c", code, *names], text=True).split()
    return ", ".join(f"{name} {v}" for name, v in zip(names, versions, strict=True))


def print_profiles(sizes: Sequence[int]) -> None:
    from engine_profile import profile

    for n in sizes:
        for method in TABLES[n]:
            with tempfile.TemporaryDirectory() as place:
                write_job(Path(place) / "job", method, n, 1)
                print("\n".join(profile(Path(place) / "job", method, n)), flush=True)


def main() -> None:
    parser = common.parser(__doc__, short="few participants, 5 rounds")
    parser.add_argument("--classes", type=int, nargs="+", choices=TABLES, help="default: all")
    parser.add_argument("--rounds", type=int, help="timed rounds (default: 15)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="threads of ours")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    if options.profile:
        print_profiles(options.classes or (964, 100_000))
        return
    pythons = dict(peer.split("=", 1) for peer in options.peer)
    if unknown := pythons.keys() - VARIANTS:
        parser.error(f"--peer knows {', '.join(VARIANTS)}, not {', '.join(sorted(unknown))}")
    peers = [name for peer in pythons for name in VARIANTS[peer]]
    words = re.sub("=[^ ]+", "=PYTHON", " ".join(sys.argv[1:]))
    report = common.Report(
        "A round of the common job (benchmarks/peers/job.py): 16 clients of 30 images",
        command=f"python benchmarks/engine.py {words}",
    )
    report.add(
        f"threads   {options.workers} in ours, loop and convolutions; 1 in plain; torchrun: "
        f"{options.workers} processes of 1; other peers: their own",
        *(f"{peer:<9} {versions(p, PACKAGES[peer])}" for peer, p in pythons.items()),
    )
    tables = SHORT if options.short else TABLES
    for n in options.classes or tables:
        rounds = dict.fromkeys(tables[n], options.rounds or (5 if options.short else 15))
        if n == 1_000_000:
            rounds["full"] = 2  # each takes as long as 100 of fedss
        who = {
            method: [p for name in names for p in (peers if name == "peers" else [name])]
            for method, names in tables[n].items()
        }
        with tempfile.TemporaryDirectory() as place:
            folders, far = {}, {}
            for method, names in who.items():
                folders[method] = Path(place) / method
                write_job(folders[method], method, n, rounds[method] + WARM + LAST)
                if "plain" in names and not options.short:
                    alone = Path(place) / f"{method}-alone"
                    write_job(alone, method, n, 1)
                    far[method] = distance_from_plain(alone, names, pythons, options.workers)
            times = measure(folders, who, pythons, options.workers, rounds)
            report.add("", f"n = {n:,}", *table(times, far))
    report.write(unless=options.short or options.classes or options.rounds)


if __name__ == "__main__":
    main()
