"""A round of the local engine against loops written by hand, and against other simulators.

    python benchmarks/engine.py                          (all jobs, the loops alone)
    python benchmarks/engine.py --jobs full-964 --peer pfl=PYTHON --peer fedjax=PYTHON \
        --peer flower=PYTHON                             (PYTHON of an environment with that extra)
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent / "peers"))
from job import BATCH, CLIENTS, COHORT, DIM, LR, PICTURES, SCALE, shapes  # noqa: E402
from network import network  # noqa: E402

from fedss.algorithm import batches, draw_classes, draw_cohort, own_classes  # noqa: E402
from fedss.build import round_plan  # noqa: E402
from fedss.class_rows import create_class_rows  # noqa: E402
from fedss.config import Config  # noqa: E402
from fedss.seeds import generator  # noqa: E402

PEERS = Path(__file__).parent / "peers"
JOBS = {
    "full-964": ("full", 964),
    "fedss-964": ("fedss", 964),
    "fedss-100k": ("fedss", 100_000),
    "fedss-1M": ("fedss", 1_000_000),
    "full-1M": ("full", 1_000_000),
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


def write_job(folder: Path, method: str, num_classes: int, rounds: int) -> None:
    rng = np.random.default_rng(0)
    values = settings(method, rounds)
    config = Config(**values)
    pixels = rng.integers(0, 256, (CLIENTS, PICTURES, 1, 28, 28), dtype=np.uint8)
    own = [rng.choice(num_classes, PICTURES // 2, replace=False) for _ in range(CLIENTS)]
    labels = np.repeat(np.stack(own), 2, axis=1)
    torch.manual_seed(0)
    theta = np.concatenate([p.detach().numpy().ravel() for p in network(None).parameters()])
    rows = create_class_rows(num_classes, DIM, (), generator(config.seed, "class rows"))
    cohorts = [draw_cohort(CLIENTS, COHORT, config.seed, r) for r in range(rounds)]
    orders, samples, log_q = [], [], []
    for r, cohort in enumerate(cohorts):
        plan = round_plan(config, num_classes, min(64, num_classes), r)
        for k in cohort.tolist():
            rng_k = generator(config.seed, "batches", r, k)
            orders.append(np.concatenate(list(batches(PICTURES, plan.local, rng_k))))
            if method != "full":
                sample = draw_classes(plan, k, own_classes(plan, k, labels[k]))
                samples.append(sample.ids_S.numpy())
                log_q.append(sample.log_q_S.numpy())
    arrays = {"pixels": pixels, "labels": labels, "theta": theta, "rows": rows.weight_ND.numpy()}
    arrays["cohorts"], arrays["orders"] = np.stack(cohorts), np.stack(orders).reshape(rounds, COHORT, -1)
    if samples:
        arrays["samples"] = np.stack(samples).reshape(rounds, COHORT, -1)
        arrays["log_q"] = np.stack(log_q).reshape(rounds, COHORT, -1)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    (folder / "job.json").write_text(json.dumps({"config": values}))


@dataclass
class Participant:
    name: str
    process: subprocess.Popen[str]

    def turn(self) -> dict[str, float]:
        """Let it run a round; how long it took."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, float]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with {self.process.wait()}")
        return json.loads(line)


def run_job(
    folder: Path, names: list[str], pythons: Mapping[str, str], workers: int, rounds: int
) -> dict[str, list[dict[str, float]]]:
    participants = []
    for name in names:
        words = [pythons.get(name, sys.executable), str(PEERS / f"{name}.py"), str(folder), str(workers)]
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        participants.append(Participant(name, process))
        participants[-1].answer()
    times: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for r in range(rounds):
        for participant in participants[r % len(names):] + participants[: r % len(names)]:
            times[participant.name].append(participant.turn())
    for participant in participants:
        participant.process.stdin.write("\n")
        participant.process.stdin.flush()
        participant.process.wait()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", nargs="+", default=["full-964", "fedss-964", "fedss-100k"], choices=JOBS)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--names", nargs="+", default=["ours", "loop", "plain"])
    options = parser.parse_args()
    for name in options.jobs:
        with tempfile.TemporaryDirectory() as folder:
            write_job(Path(folder), *JOBS[name], options.rounds + 3)
            times = run_job(Path(folder), options.names, {}, options.workers, options.rounds + 3)
            ends = {n: np.load(Path(folder) / f"{n}.npz") for n in options.names}
            for n in options.names:
                t = times[n][2:-1]
                d = max(abs(ends[n][k] - ends["loop"][k]).max() for k in ("theta", "rows"))
                r = {k: statistics.median(a[k] / b[k] for a, b in zip(t, times["loop"][2:-1])) for k in ("wall", "cpu")}
                print(f"{name:<12}{n:<8} wall {statistics.median(x['wall'] for x in t):.3f} cpu {statistics.median(x['cpu'] for x in t):.3f}"
                      f" / loop: wall {r['wall']:.3f} cpu {r['cpu']:.3f}  diff {d:.1e}  peak", (Path(folder) / f"{n}.json").read_text(), flush=True)


if __name__ == "__main__":
    main()
