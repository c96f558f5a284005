"""Accuracy against epsilon: what differential privacy for clients costs.

    python benchmarks/privacy.py --omniglot DIR      (DIR holds the two Omniglot archives)

Noise of the mean falls with the size of the cohort, and with as many clients as these data sets
have it drowns everything. So cohorts are scaled, as is usual (McMahan et al. 2018, arXiv
1710.06963): what is trained is K of N clients a round, with the noise that a mean of S K clients
out of S N would have (multiplier z / S in place of z), and epsilon is that of z, S K and S N. It
stands for S times as many clients of the same kind. Epsilon is at delta (S N)^-1.1, for one client
added or removed. The search for a norm is not counted, as if it were done on other clients.

Norms are searched on validation classes with seed 100 at a scale of 100; then seeds 0, 1, 2 are
judged on the test. ``--short`` is a few rounds on glyphs, and writes nothing. Runs that are
complete in ``--out`` are not run again. Writes ``results/privacy.txt``.
"""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import common

from fedss.privacy import default_delta, epsilon_spent, sampling_rate

Settings = Mapping[str, Any]
SEEDS, TUNING_SEED, TUNING_SCALE, STEP = (0, 1, 2), 100, 100, 3.0
# Methods whose clients all send changes of the same rows, and norms where their search starts.
VARIANTS: Mapping[str, tuple[Settings, Settings]] = {
    "full": ({"method": "full"}, {"clip": 1.0}),
    "full, rows apart": ({"method": "full"}, {"clip": 0.3, "row_clip": 1.0}),
    "fedss, common": ({"method": "fedss", "requests": "common"}, {"clip": 1.0}),
    "full, adaptive": ({"method": "full", "clip": "adaptive:1"}, {}),
}


@dataclass(frozen=True)
class Task:
    """What is trained: N clients, K of them a round; and which noise, for how much larger ones."""

    settings: Settings
    clients: int
    cohort: int
    rounds: int
    noises: Sequence[float] = (0.6, 1.0, 2.0)
    scales: Sequence[int] = (1, 10, 100, 1000)


TASKS = {
    "glyphs": Task({"data": "glyphs"}, 256, 20, 110),
    "omniglot": Task({"data": "omniglot"}, 600, 40, 120),
}
SHORT = Task(
    {"data": "glyphs", "glyphs_classes": 60, "glyphs_clients": 20, "backbone": "conv4-8"},
    clients=20,
    cohort=5,
    rounds=3,
    noises=(1.0,),
    scales=(1, 100),
)


def epsilon(task: Task, noise: float, scale: int) -> float:
    """Of the larger federation that a run stands for."""
    rate = sampling_rate(task.cohort, task.clients)
    return epsilon_spent(noise, [rate] * task.rounds, default_delta(scale * task.clients))


@dataclass(frozen=True)
class Bench:
    """A task, where its runs lie, and what they have in common."""

    name: str
    task: Task
    out: Path
    shared: Settings

    def score(self, variant: str, seed: int, **changes: Any) -> float:
        """MAP@10 of a run."""
        settings = {**self.shared, **VARIANTS[variant][0], "seed": seed, **changes}
        words = "-".join(f"{name}={value}" for name, value in changes.items())
        folder = f"{self.name}-{variant.replace(', ', '-').replace(' ', '-')}-{seed}-{words}"
        return float(common.train(self.out / folder.replace("/", "_"), settings)["map_at_10"])

    def norms(self, variant: str) -> Settings:
        """Those that do best on validation classes."""
        start = VARIANTS[variant][1]
        if not start:
            return {}

        def judge(norms: dict[str, float]) -> float:
            noise = self.task.noises[len(self.task.noises) // 2] / TUNING_SCALE
            return self.score(variant, TUNING_SEED, eval_split="validation", noise=noise, **norms)

        tried = common.search(start, judge, dict.fromkeys(start, STEP), again=False)
        best: Settings = max(tried, key=lambda trial: trial["map_at_10"])["settings"]
        return best


def table(bench: Bench, pool: ThreadPoolExecutor, seeds: Sequence[int]) -> list[str]:
    """A line for each noise and scale, a column for each variant."""
    task, names = bench.task, list(VARIANTS)
    norms = dict(zip(names, pool.map(bench.norms, names), strict=True))

    def mean(job: tuple[str, dict[str, Any]]) -> float:
        variant, changes = job
        return fmean(bench.score(variant, seed, **norms[variant], **changes) for seed in seeds)

    rows: list[tuple[float | None, int]] = [(None, 1)]
    rows += [(noise, scale) for noise in task.noises for scale in task.scales]
    jobs = [
        (variant, {} if noise is None else {"noise": noise / scale})
        for noise, scale in rows
        for variant in names
    ]
    scores = iter(pool.map(mean, jobs))
    of = f"{task.cohort} of {task.clients} clients a round, {task.rounds} rounds"
    lines = [f"{bench.name}: {of}, seeds {', '.join(map(str, seeds))}"]
    lines += [f"  norms of {name}: {dict(norms[name]) or 'adaptive'}" for name in names]
    plain = fmean(bench.score("full", seed, clip=None) for seed in seeds)
    lines += [f"  full, without a norm: MAP@10 {plain:.3f}", ""]
    lines += [f"{'z':>6}{'cohort':>9}{'clients':>10}{'epsilon':>9}" + _cells(names)]
    for noise, scale in rows:
        sizes = f"{scale * task.cohort:>9,}{scale * task.clients:>10,}"
        spent = "none" if noise is None else f"{epsilon(task, noise, scale):.2f}"
        told = f"{noise or 0:>6g}{sizes}{spent:>9}"
        lines.append(told + _cells([f"{next(scores):.3f}" for _ in names]))
    return [*lines, ""]


def _cells(texts: Sequence[str]) -> str:
    return "".join(f"{text:>20}" for text in texts)


def main() -> None:
    parser = common.parser(__doc__, short="a few rounds on glyphs, write no file")
    parser.add_argument("--omniglot", type=Path, help="folder with the Omniglot archives")
    parser.add_argument("--out", type=Path, default=Path("runs/privacy"), help="run folders")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs side by side")
    options = parser.parse_args()
    report = common.Report(
        "Differential privacy of clients: MAP@10 on unseen classes against epsilon",
        ["dp-accounting"],
        command="python benchmarks/privacy.py --omniglot DIR",
    )
    tasks, seeds = ({"short": SHORT}, (0,)) if options.short else (TASKS, SEEDS)
    with ThreadPoolExecutor(options.jobs) as pool:
        for name, task in tasks.items():
            if name == "omniglot" and options.omniglot is None:
                continue
            path = options.omniglot if name == "omniglot" else None
            shared = {
                **task.settings,
                "data_path": path,
                "clients_per_round": task.cohort,
                "rounds": task.rounds,
                "workers": 1,
                "eval_every": 0,
            }
            report.add(*table(Bench(name, task, options.out, shared), pool, seeds))
    report.write(unless=options.short)


if __name__ == "__main__":
    main()
