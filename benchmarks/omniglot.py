"""FedSS against its baselines on Omniglot: does it retrieve as well as the full softmax?

    python benchmarks/omniglot.py --data-path DIR      (DIR holds the two Omniglot archives)

Each run is a ``fedss train`` in a folder of its own, so that the command goes on where it
was interrupted. Stages:

1. tune: a grid of settings for every method (``full`` and ``fedss`` the same), 120 rounds, seed
   100, judged by MAP@10 on the validation alphabets (the first 6 of the 20 evaluation alphabets).
2. report: each method with its best setting, seeds 0, 1, 2, judged on the other 14 alphabets.

Then an ablation: what becomes of ``full`` and ``fedss`` if class rows are not normalised.

Writes ``benchmarks/results/omniglot.txt``, the picture of the README, and a report page for each
number of rounds. Takes about 40 minutes on two cores.
"""

import argparse
import datetime
import itertools
import json
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import fedss
from fedss.report import bytes_picture

RESULTS = Path(__file__).parent / "results" / "omniglot.txt"
PICTURE = Path(__file__).parent.parent / "docs" / "images" / "accuracy-against-bytes.png"
SEEDS, TUNING_SEED, SAMPLE_SIZE = (0, 1, 2), 100, 64
ROUNDS = {
    120: ("full", "fedss", "fedss-uncorrected", "pos-only", "neg-only", "fedaws", "central"),
    300: ("full", "fedss"),
}

Settings = dict[str, Any]


def grid(method: str) -> list[Settings]:
    """The settings tried for a method: six, or fewer where a method has no class-row softmax."""
    if method == "fedaws":
        # Its loss is in cosines, not in logits: gradients are smaller, learning rates larger.
        return [
            {
                "client_lr": lr,
                "class_row_lr": 0.5,
                "spread_out_weight": weight,
                "spread_out_margin": margin,
            }
            for lr in (0.1, 0.5)
            for weight, margin in ((0.05, 0.7), (0.5, 1.0))
        ]
    if method == "central":
        # No server momentum here, which makes a step ten times as long elsewhere.
        return [{"client_lr": lr, "class_row_lr": 1.0} for lr in (0.1, 0.2, 0.4)]
    return [
        {"client_lr": lr, "class_row_lr": row_lr}
        for lr, row_lr in itertools.product((0.05, 0.1), (1.0, 2.0, 4.0))
    ]


def train(folder: Path, **settings: Any) -> dict[str, Any]:
    """One ``fedss train``; its summary."""
    words = [sys.executable, "-m", "fedss", "train", "--data", "omniglot", "--out", str(folder)]
    for name, value in {
        "sampler": "uniform",
        "sample_size": SAMPLE_SIZE,
        "workers": 1,
        **settings,
    }.items():
        flag = "--" + name.replace("_", "-")
        words += [flag.replace("--", "--no-")] if value is False else [flag, str(value)]
    done = subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}\n{done.stderr}")
    (summary,) = json.loads((folder / "summary.json").read_text())
    print(f"{folder.name:<60} MAP@10 {summary['map_at_10']:.3f}", flush=True)
    return {**summary, **settings}


def name_of(method: str, settings: Settings) -> str:
    return "-".join([method, *(f"{k}={v}" for k, v in settings.items())])


def on_validation(data_path: str) -> Settings:
    return {
        "data_path": data_path,
        "eval_split": "validation",
        "seed": TUNING_SEED,
        "rounds": 120,
        "eval_every": 0,
    }


def tune(pool: ThreadPoolExecutor, data_path: str, out: Path) -> dict[str, list[dict[str, Any]]]:
    jobs = [(method, settings) for method in ROUNDS[120] for settings in grid(method)]
    runs = pool.map(
        lambda job: train(
            out / "tune" / name_of(*job), method=job[0], **job[1], **on_validation(data_path)
        ),
        jobs,
    )
    found: dict[str, list[dict[str, Any]]] = {method: [] for method in ROUNDS[120]}
    for (method, settings), run in zip(jobs, runs, strict=True):
        found[method].append({"settings": settings, "map_at_10": run["map_at_10"]})
    return found


def ablate(
    pool: ThreadPoolExecutor, data_path: str, out: Path, best: dict[str, Settings]
) -> list[dict[str, Any]]:
    """Class rows that are left to grow, with row learning rates that might make up for it."""
    jobs = [
        (method, {**best[method], "class_row_lr": factor * best[method]["class_row_lr"]})
        for method in ("full", "fedss")
        for factor in (1, 2, 4)
    ]

    def run(job: tuple[str, Settings]) -> dict[str, Any]:
        method, settings = job
        folder = out / "ablate" / name_of(method, settings)
        options = {"method": method, "normalize_rows": False, **settings}
        summary = train(folder, **options, **on_validation(data_path))
        return {"method": method, "settings": settings, "map_at_10": summary["map_at_10"]}

    return list(pool.map(run, jobs))


def report(
    pool: ThreadPoolExecutor, data_path: str, out: Path, best: dict[str, Settings]
) -> list[dict[str, Any]]:
    jobs = [
        (rounds, method, seed)
        for rounds, methods in sorted(ROUNDS.items(), reverse=True)
        for method in methods
        for seed in SEEDS
    ]

    def run(job: tuple[int, str, int]) -> dict[str, Any]:
        rounds, method, seed = job
        settings = {"method": method, "rounds": rounds, "seed": seed, "data_path": data_path}
        folder = out / f"rounds{rounds}" / f"{method}-seed{seed}"
        return train(folder, **settings, **best[method])

    return list(pool.map(run, jobs))


def write_reports(out: Path, runs: list[dict[str, Any]]) -> None:
    """A report page for each number of rounds, over all its methods and seeds."""
    for rounds in ROUNDS:
        found = [
            {**run, "folder": f"{run['method']}-seed{run['seed']}"}
            for run in runs
            if run["rounds"] == rounds
        ]
        folder = out / f"rounds{rounds}"
        (folder / "summary.json").write_text(json.dumps(found, indent=2))
        print(f"report  {fedss.write_report(folder)}")
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_bytes(bytes_picture(out / "rounds120"))


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def text(
    tuning: dict[str, list[dict[str, Any]]],
    ablation: list[dict[str, Any]],
    runs: list[dict[str, Any]],
) -> str:
    lines = [
        "FedSS and its baselines on Omniglot",
        f"command   python benchmarks/omniglot.py --data-path DIR ({len(runs)} reported runs)",
        f"date      {datetime.date.today().isoformat()}",
        f"hardware  {processor()}, {os.cpu_count()} cores, no GPU",
        f"software  fedss {version('fedss')}, torch {version('torch')}, "
        f"numpy {version('numpy')}, Python {platform.python_version()}",
        "",
        "Train: 964 background characters, 600 clients (alphabet, drawer). Test: 509 characters of",
        "14 evaluation alphabets that neither training nor tuning saw, 10,180 pictures, each",
        f"searched among all the others. |S| = {SAMPLE_SIZE}, 20 clients a round, 1 local epoch,",
        "conv4-32, d = 64; all other settings are the defaults of `fedss train`.",
    ]
    for rounds, methods in ROUNDS.items():
        of_round = [run for run in runs if run["rounds"] == rounds]
        full = {r["seed"]: r["map_at_10"] for r in of_round if r["method"] == "full"}
        lines += [
            "",
            f"{rounds} rounds, seeds {', '.join(map(str, SEEDS))}",
            f"{'method':<18} {'MAP@10':>7}  {'per seed':<21} {'/ full':>6}  {'worst':>6}"
            f" {'R@1':>6} {'rows':>6} {'kB down':>8} {'kB rows':>8} {'kB up':>7} {'seconds':>8}",
        ]
        for method in methods:
            found = [run for run in of_round if run["method"] == method]
            maps = [run["map_at_10"] for run in found]
            ratios = [run["map_at_10"] / full[run["seed"]] for run in found]
            sizes = [
                "-" if found[0][key] is None else f"{mean([r[key] for r in found]) / 1000:.1f}"
                for key in (
                    "bytes_down_per_client_round",
                    "class_row_bytes_down_per_client_round",
                    "bytes_up_per_client_round",
                )
            ]
            rows = found[0]["class_rows_per_client"]
            lines.append(
                f"{method:<18} {mean(maps):>7.3f}  {' '.join(f'{m:.3f}' for m in maps):<21}"
                f" {mean(maps) / mean(list(full.values())):>6.3f}  {min(ratios):>6.3f}"
                f" {mean([r['recall_at_1'] for r in found]):>6.3f}"
                f" {'-' if rows is None else f'{rows:.0f}':>6} {sizes[0]:>8} {sizes[1]:>8}"
                f" {sizes[2]:>7} {mean([r['seconds'] for r in found]):>8.0f}"
            )
    lines += [
        "",
        "'/ full' is the ratio of the means, 'worst' the lowest ratio to full of one seed; bytes",
        "are per client and round as serialised; seconds: one worker, two runs side by side.",
        "",
        f"Tuning: MAP@10 on the validation alphabets, 120 rounds, one seed ({TUNING_SEED}); * is",
        "chosen, and used for 300 rounds as well",
    ]
    for method, trials in tuning.items():
        top = max(trial["map_at_10"] for trial in trials)
        lines += ["", method]
        lines += [
            f"  {'*' if t['map_at_10'] == top else ' '} {t['map_at_10']:.3f}  "
            + "  ".join(f"{name} {value}" for name, value in t["settings"].items())
            for t in trials
        ]
    lines += ["", "Without normalising class rows (--no-normalize-rows), otherwise as above"]
    lines += [
        f"  {a['map_at_10']:.3f}  {a['method']}  "
        + "  ".join(f"{name} {value}" for name, value in a["settings"].items())
        for a in ablation
    ]
    return "\n".join(lines) + "\n"


def processor() -> str:
    """The processor's name, where the system tells."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-path", required=True, help="folder with the Omniglot archives")
    parser.add_argument("--out", type=Path, default=Path("runs/omniglot"), help="run folders")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs side by side")
    options = parser.parse_args()
    with ThreadPoolExecutor(options.jobs) as pool:
        tuning = tune(pool, options.data_path, options.out)
        best = {
            method: max(trials, key=lambda trial: trial["map_at_10"])["settings"]
            for method, trials in tuning.items()
        }
        runs = report(pool, options.data_path, options.out, best)
        ablation = ablate(pool, options.data_path, options.out, best)
    write_reports(options.out, runs)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(text(tuning, ablation, runs))
    print(f"\n{RESULTS.read_text()}\nwritten to {RESULTS}")


if __name__ == "__main__":
    main()
