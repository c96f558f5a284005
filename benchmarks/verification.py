"""What verification, identification and confusions cost beside the evaluation and the run.

    pip install "fedss[test]"
    python benchmarks/verification.py --data-path DIR     (Omniglot's archives; --short: seconds)

Two jobs, each a process of its own:

- `omniglot`: a run of a few rounds on Omniglot, then what its end does on the 10,180 test pictures:
  `fedss.evaluation.evaluate.findings`, part by part, in units of a round and of one evaluation.
- `many`: 60,000 made-up embeddings, d = 64, in classes of 2 to 12: 1.8e9 pairs.

And the same rates by scikit-learn's `roc_curve` from all pairs of 10,180 embeddings, which must
agree: to 1e-12 from cosines put on our grid, and to 1e-4 from float32 cosines as they are.

Writes ``benchmarks/results/verification.txt`` (not with ``--short``).
"""

import argparse
import dataclasses
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omniglot import processor
from retrieval import made_up, peak_megabytes
from torch.nn import functional as F

from fedss import Config, evaluate_retrieval, train
from fedss.evaluation.confusions import hardest_confusions
from fedss.evaluation.evaluate import embed_task, find_confused, find_neighbours, score, verify
from fedss.evaluation.verification import count_pairs, identification, verification
from fedss.models import embed_pixels
from fedss.training.build import evaluation_task
from fedss.training.experiment import load_together

RESULTS = Path(__file__).parent / "results" / "verification.txt"
FARS = (0.1, 0.01, 0.001, 0.0001)


def timed(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    wall, cpu = time.perf_counter(), time.process_time()
    found = work()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return found, {"wall": wall, "cpu": cpu, "peak": peak_megabytes()}


def omniglot(options: argparse.Namespace) -> dict[str, Any]:
    config = Config(
        data="omniglot", data_path=options.data_path, rounds=options.rounds, eval_every=0
    )
    data = load_together(config)
    with tempfile.TemporaryDirectory() as folder:
        run = train(config, folder, data=data, on_round=lambda record: None)
    task = evaluation_task(config, data)
    spent = {}
    pair, spent["embed"] = timed(
        lambda: embed_task(lambda pixels: embed_pixels(run.embedder, pixels), task)
    )
    metrics, spent["retrieval figures"] = timed(lambda: score(task, *pair))
    _, spent["panels"] = timed(lambda: find_neighbours(task, pair, 0))
    _, spent["confusions"] = timed(lambda: find_confused(task, pair))
    found, spent["verification and identification"] = timed(lambda: verify(task, pair, 0))
    phases = run.summary["seconds_by_phase"]
    spent["a round"] = {
        "wall": (run.summary["seconds"] - phases["evaluate"]) / config.rounds,
        "cpu": float("nan"),
        "peak": float("nan"),
    }
    return {"spent": spent, "map_at_10": metrics.map_at_10, "found": dataclasses.asdict(found)}


def many(options: argparse.Namespace) -> dict[str, Any]:
    rows, labels = made_up(options.rows)
    small = made_up(1000)
    count_pairs(*small), evaluate_retrieval(*small)
    spent = {}
    before = peak_megabytes()
    _, spent["retrieval figures"] = timed(lambda: evaluate_retrieval(rows, labels))
    pairs, spent["pairs counted"] = timed(lambda: count_pairs(rows, labels))
    found, spent["rates of them"] = timed(lambda: verification(pairs))
    known, spent["identification, 10 draws"] = timed(lambda: identification(rows, labels))
    _, spent["confusions"] = timed(lambda: hardest_confusions(rows, labels))
    assert known is not None
    return {
        "spent": spent,
        "before": before,
        "pairs": found.genuine + found.impostor,
        "eer": found.eer,
        "dir": known.dir,
    }


def ours(options: argparse.Namespace) -> dict[str, Any]:
    rows, labels = made_up(options.small)
    count_pairs(*made_up(1000))
    found, spent = timed(lambda: verification(count_pairs(rows, labels), FARS))
    return {"spent": spent, "tar": [point.tar for point in found.points], "eer": found.eer}


def theirs(options: argparse.Namespace, on_grid: bool = False) -> dict[str, Any]:
    from sklearn.metrics import roc_curve

    rows, labels = made_up(options.small)
    unit = F.normalize(rows.double(), dim=1)
    unit = (unit * 2**24).round() / 2**24 if on_grid else unit.float()

    def rates() -> tuple[np.ndarray, np.ndarray]:
        first, second = torch.triu_indices(len(rows), len(rows), 1)
        cosine = (unit @ unit.T)[first, second]
        if on_grid:
            cosine = ((cosine + 1) * 2**16).floor()
        same = labels[first] == labels[second]
        far, tar, _ = roc_curve(same.numpy(), cosine.numpy(), drop_intermediate=False)
        return far, tar

    (far, tar), spent = timed(rates)
    after = int((far >= 1 - tar).argmax())
    gap = far - (1 - tar)
    along = -gap[after - 1] / (gap[after] - gap[after - 1])
    return {
        "spent": spent,
        "tar": [float(tar[far <= limit].max()) for limit in FARS],
        "eer": float(far[after - 1] + along * (far[after] - far[after - 1])),
    }


JOBS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "omniglot": omniglot,
    "many": many,
    "ours": ours,
    "scikit-learn": theirs,
    "scikit-learn on the grid": lambda options: theirs(options, on_grid=True),
}


def in_own_process(job: str, options: argparse.Namespace) -> dict[str, Any]:
    words = [sys.executable, __file__, "--job", job]
    for name in ("rows", "small", "rounds", "threads", "data_path"):
        value = getattr(options, name)
        words += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
    threads = str(options.threads)
    done = subprocess.run(
        words,
        env={**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{job} failed")
    print(f"{job} done", flush=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def table(spent: dict[str, dict[str, float]], unit: str) -> list[str]:
    head = f"{'':<34} {'wall s':>7} {'CPU s':>7} {'peak MB':>8} {'/ ' + unit:>20}"
    return [head] + [
        f"{name:<34} {part['wall']:>7.2f} {part['cpu']:>7.2f} {part['peak']:>8.0f} "
        f"{part['wall'] / spent[unit]['wall']:>20.2f}".replace("    nan", "      -")
        for name, part in spent.items()
    ]


def text(options: argparse.Namespace, found: dict[str, dict[str, Any]]) -> str:
    path = "" if options.data_path is None else " --data-path DIR"
    lines = [
        "Verification, identification and confusions: what they cost",
        f"command   python benchmarks/verification.py{path} --threads {options.threads}",
        f"date      {datetime.date.today().isoformat()}",
        f"hardware  {processor()}, {os.cpu_count()} cores; load before: {os.getloadavg()[0]:.1f}",
        f"software  fedss {version('fedss')}, torch {version('torch')}, numpy {version('numpy')},",
        f"          scikit-learn {version('scikit-learn')}, Python {platform.python_version()}",
        "",
        "Peak memory is that of the process so far.",
        "",
    ]
    if "omniglot" in found:
        run = found["omniglot"]
        spent = run["spent"]
        extra = sum(
            spent[name]["wall"]
            for name in ("panels", "confusions", "verification and identification")
        )
        lines += [
            f"Omniglot, a run of {options.rounds} rounds with the defaults, then its end:",
            *table(spent, "a round"),
            f"all three of the end: {extra:.2f} s, "
            f"{extra / (120 * spent['a round']['wall']):.2%} of 120 such rounds",
            "",
        ]
    run = found["many"]
    lines += [
        f"{options.rows:,} made-up embeddings, d = 64: {run['pairs']:,} pairs",
        *table(run["spent"], "retrieval figures"),
        f"peak before: {run['before']:.0f} MB",
        "",
        f"{options.small:,} made-up embeddings, all pairs, rates only:",
        f"{'':<26} {'wall s':>7} {'CPU s':>7} {'peak MB':>8} {'EER':>12} "
        + " ".join(f"{f'TAR {far:g}':>12}" for far in FARS),
    ]
    for name in ("ours", "scikit-learn on the grid", "scikit-learn"):
        side = found[name]
        figures = " ".join(f"{value:>12.9f}" for value in (side["eer"], *side["tar"]))
        spent = side["spent"]
        lines.append(
            f"{name:<26} {spent['wall']:>7.2f} {spent['cpu']:>7.2f} {spent['peak']:>8.0f} {figures}"
        )
    return "\n".join(lines) + "\n"


def check(found: dict[str, dict[str, Any]]) -> None:
    for side, most in (("scikit-learn on the grid", 1e-12), ("scikit-learn", 1e-4)):
        here, there = ([found[name]["eer"], *found[name]["tar"]] for name in ("ours", side))
        if max(abs(a - b) for a, b in zip(here, there, strict=True)) > most:
            raise SystemExit(f"{side}: {there}, ours: {here}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-path", help="folder with the Omniglot archives; none: no such job")
    parser.add_argument("--rows", type=int, default=60_000, help="made-up embeddings")
    parser.add_argument("--small", type=int, default=10_180, help="those for scikit-learn")
    parser.add_argument("--rounds", type=int, default=10, help="of the run on Omniglot")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each process")
    parser.add_argument("--short", action="store_true", help="few rows, no file")
    parser.add_argument("--job", choices=JOBS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        torch.set_num_threads(options.threads)
        print(json.dumps(JOBS[options.job](options)))
        return
    if options.short:
        options.rows, options.small, options.rounds = 8_000, 2_000, 2
    jobs = [job for job in JOBS if job != "omniglot" or options.data_path]
    found = {job: in_own_process(job, options) for job in jobs}
    check(found)
    print("\n" + text(options, found))
    if not options.short:
        RESULTS.write_text(text(options, found))
        print(f"written to {RESULTS}")


if __name__ == "__main__":
    main()
