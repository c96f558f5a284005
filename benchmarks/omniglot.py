"""FedSS against its baselines on Omniglot: does it retrieve as well as the full softmax?

    python benchmarks/omniglot.py --data-path DIR      (DIR holds the two Omniglot archives)
    python benchmarks/omniglot.py --data-path DIR --one-class   (each client has a single class)

Each run is a ``fedss train`` in a folder of its own, so that the command goes on where it
was interrupted. Stages:

1. tune: each method by itself, 120 rounds, seed 100, judged by MAP@10 on the validation alphabets
   (the first 6 of the 20 evaluation alphabets). One setting after the other is multiplied or
   divided by a step while that helps, until no single step of any setting does: so each setting
   of the winner was tried higher and lower, and the optimum lies inside what was tried.
2. report: each method with its best setting, seeds 0, 1, 2, judged on the other 14 alphabets.

Then an ablation: what becomes of ``full`` and ``fedss`` if class rows are not normalized.

Writes ``benchmarks/results/omniglot.txt``, the chart of ``docs/results.md``, and a report page for
each number of rounds: about 70 minutes on two cores. With ``--one-class``, which FedAwS is for:
``omniglot-one-class.txt``, about 40 minutes. ``--methods`` takes some methods, and writes nothing.
"""

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import common

import fedss
from fedss.report import bytes_figure

CHART = common.ROOT / "docs" / "images" / "accuracy-against-bytes.png"
SEEDS, TUNING_SEED, SAMPLE_SIZE = (0, 1, 2), 100, 64
SHARED = {"data": "omniglot", "sampler": "uniform", "sample_size": SAMPLE_SIZE, "workers": 1}

Settings = dict[str, Any]

# Steps of the search: a setting is multiplied or divided by this.
STEPS = dict(client_lr=2.0, class_row_lr=2.0, spread_out_weight=4.0, spread_out_margin=2**0.5)


@dataclass(frozen=True)
class Regime:
    """Who the clients are, which methods are compared there, and where each one's search starts."""

    file: str
    clients: str
    settings: Settings
    rounds: dict[int, tuple[str, ...]]
    start: dict[str, Settings]


SOFTMAX = {"client_lr": 0.05, "class_row_lr": 2.0}
# FedAwS's loss is in cosines, not in logits: gradients are smaller, learning rates larger.
FEDAWS = dict(client_lr=0.5, class_row_lr=0.5, spread_out_weight=0.05, spread_out_margin=0.7)
DRAWERS = Regime(
    "omniglot.txt",
    "600 clients (alphabet, drawer), 20 a round",
    {},
    {
        120: (
            "full",
            "fedss-published",
            "fedss-uncorrected",
            "pos-only",
            "neg-only",
            "fedaws",
            "central",
        ),
        300: ("full", "fedss-published"),
    },
    {
        **dict.fromkeys(
            ("full", "fedss-published", "fedss-uncorrected", "pos-only", "neg-only"), SOFTMAX
        ),
        "fedaws": FEDAWS,
        # No server momentum here, which makes a step ten times as long elsewhere.
        "central": {"client_lr": 0.1, "class_row_lr": 1.0},
    },
)
# As in FedAwS's paper each client has all of its class. (With --client-classes 1 it would have a
# single image.) `pos-only` has nothing to learn from here: the softmax over one class is 1.
ONE_CLASS = Regime(
    "omniglot-one-class.txt",
    "964 clients of one character and its 20 images each, 40 a round, batches of 20",
    {"partition": "class", "clients_per_round": 40, "batch_size": 20},
    {120: ("full", "fedss-published", "fedaws")},
    {
        "full": {"client_lr": 0.02, "class_row_lr": 0.25},
        "fedss-published": {"client_lr": 0.02, "class_row_lr": 0.25},
        "fedaws": FEDAWS,
    },
)


def train_one(folder: Path, **settings: Any) -> dict[str, Any]:
    return {**common.train(folder, {**SHARED, **settings}), **settings}


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


def tune(
    pool: ThreadPoolExecutor, regime: Regime, methods: Sequence[str], data_path: str, out: Path
) -> dict[str, list[dict[str, Any]]]:
    """All trials of each method. Methods run side by side."""

    def of(method: str) -> list[dict[str, Any]]:
        def judge(settings: Settings) -> float:
            folder = out / "tune" / name_of(method, settings)
            options = {**regime.settings, **settings, **on_validation(data_path)}
            return float(train_one(folder, method=method, **options)["map_at_10"])

        return common.search(regime.start[method], judge, STEPS)

    return dict(zip(methods, pool.map(of, methods), strict=True))


def ablate(
    pool: ThreadPoolExecutor, data_path: str, out: Path, best: dict[str, Settings]
) -> list[dict[str, Any]]:
    """Class rows that are left to grow, with row learning rates that might make up for it."""

    def run(job: tuple[str, int]) -> dict[str, Any]:
        method, factor = job
        settings = {**best[method], "class_row_lr": factor * best[method]["class_row_lr"]}
        options = {"method": method, "normalize_rows": False, **settings}
        folder = out / "ablate" / name_of(method, settings)
        summary = train_one(folder, **options, **on_validation(data_path))
        return {"method": method, "settings": settings, "map_at_10": summary["map_at_10"]}

    return list(pool.map(run, product(("full", "fedss-published"), (1, 2, 4))))


def final_runs(
    pool: ThreadPoolExecutor, regime: Regime, data_path: str, out: Path, best: dict[str, Settings]
) -> list[dict[str, Any]]:
    def run(job: tuple[int, str, int]) -> dict[str, Any]:
        rounds, method, seed = job
        settings = {"method": method, "rounds": rounds, "seed": seed, "data_path": data_path}
        folder = out / f"rounds{rounds}" / f"{method}-seed{seed}"
        return train_one(folder, **regime.settings, **settings, **best[method])

    # The longest first.
    counts = sorted(regime.rounds, reverse=True)
    return list(
        pool.map(run, ((n, *job) for n in counts for job in product(regime.rounds[n], SEEDS)))
    )


def write_reports(out: Path, regime: Regime, runs: list[dict[str, Any]]) -> None:
    """A report page for each number of rounds, over all its methods and seeds."""
    for rounds in regime.rounds:
        results = [
            {**run, "folder": f"{run['method']}-seed{run['seed']}"}
            for run in runs
            if run["rounds"] == rounds
        ]
        folder = out / f"rounds{rounds}"
        (folder / "summary.json").write_text(json.dumps(results, indent=2))
        print(f"report  {fedss.write_report(folder)}")


def table(regime: Regime, rounds: int, runs: list[dict[str, Any]]) -> list[str]:
    """The methods that were trained for so many rounds."""
    of_round = [run for run in runs if run["rounds"] == rounds]
    full = {r["seed"]: r["map_at_10"] for r in of_round if r["method"] == "full"}
    lines = [
        "",
        f"{rounds} rounds, seeds {', '.join(map(str, SEEDS))}",
        f"{'method':<18} {'MAP@10':>7}  {'per seed':<21} {'/ full':>6}  {'worst':>6}"
        f" {'R@1':>6} {'rows':>6} {'kB down':>8} {'kB rows':>8} {'kB up':>7} {'seconds':>8}",
    ]
    for method in regime.rounds[rounds]:
        of_method = [run for run in of_round if run["method"] == method]
        maps = [run["map_at_10"] for run in of_method]
        ratios = [run["map_at_10"] / full[run["seed"]] for run in of_method]
        sizes = [
            "-" if of_method[0][key] is None else f"{fmean([r[key] for r in of_method]) / 1000:.1f}"
            for key in (
                "bytes_down_per_client_round",
                "class_row_bytes_down_per_client_round",
                "bytes_up_per_client_round",
            )
        ]
        rows = of_method[0]["class_rows_per_client"]
        lines.append(
            f"{method:<18} {fmean(maps):>7.3f}  {' '.join(f'{m:.3f}' for m in maps):<21}"
            f" {fmean(maps) / fmean(full.values()):>6.3f}  {min(ratios):>6.3f}"
            f" {fmean([r['recall_at_1'] for r in of_method]):>6.3f}"
            f" {'-' if rows is None else f'{rows:.0f}':>6} {sizes[0]:>8} {sizes[1]:>8}"
            f" {sizes[2]:>7} {fmean([r['seconds'] for r in of_method]):>8.0f}"
        )
    return lines


def write_table(
    regime: Regime,
    tuning: dict[str, list[dict[str, Any]]],
    ablation: list[dict[str, Any]],
    runs: list[dict[str, Any]],
) -> None:
    words = f"--data-path DIR{' --one-class' * (regime is ONE_CLASS)} ({len(runs)} reported runs)"
    report = common.Report(
        "FedSS and its baselines on Omniglot",
        name=Path(regime.file).stem,
        command=f"python benchmarks/omniglot.py {words}",
    )
    report.add(
        f"Train: 964 background characters, {regime.clients}.",
        "Test: 509 characters of 14 evaluation alphabets that neither training nor tuning saw,",
        f"10,180 images, each searched among all the others. |S| = {SAMPLE_SIZE}, 1 local epoch,",
        "conv4-32, d = 64; all other settings are the defaults of `fedss train`.",
    )
    for rounds in regime.rounds:
        report.add(*table(regime, rounds, runs))
    report.add(
        "",
        "'/ full' is the ratio of the means, 'worst' the lowest ratio to full of one seed; bytes",
        "are per client and round as serialized; seconds: one worker, two runs side by side.",
        "",
        f"Tuning: MAP@10 on the validation alphabets, 120 rounds, one seed ({TUNING_SEED}); * is",
        "chosen, for all numbers of rounds: no single step of a setting, up or down, was better",
        *trials_text(tuning),
    )
    if ablation:
        report.add("", "Without normalizing class rows (--no-normalize-rows), otherwise as above")
    for run in ablation:
        settings = "  ".join(f"{name} {value}" for name, value in run["settings"].items())
        report.add(f"  {run['map_at_10']:.3f}  {run['method']}  {settings}")
    report.write()


def trials_text(tuning: dict[str, list[dict[str, Any]]]) -> list[str]:
    lines = []
    for method, trials in tuning.items():
        top = max(trial["map_at_10"] for trial in trials)
        lines += ["", method]
        lines += [
            f"  {'*' if t['map_at_10'] == top else ' '} {t['map_at_10']:.3f}  "
            + "  ".join(f"{name} {value}" for name, value in t["settings"].items())
            for t in trials
        ]
    return lines


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--data-path", required=True, help="folder with the Omniglot archives")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="where run folders go")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs side by side")
    parser.add_argument("--one-class", action="store_true", help="clients of a single class")
    parser.add_argument("--methods", nargs="+", help="tune these alone, and print it")
    options = parser.parse_args()
    regime = ONE_CLASS if options.one_class else DRAWERS
    out = options.out / Path(regime.file).stem
    methods = options.methods or regime.rounds[120]
    with ThreadPoolExecutor(options.jobs) as pool:
        tuning = tune(pool, regime, methods, options.data_path, out)
        if options.methods:
            print("\n".join(trials_text(tuning)))
            return
        best = {
            method: max(trials, key=lambda trial: trial["map_at_10"])["settings"]
            for method, trials in tuning.items()
        }
        runs = final_runs(pool, regime, options.data_path, out, best)
        ablation = ablate(pool, options.data_path, out, best) if regime is DRAWERS else []
    write_reports(out, regime, runs)
    if regime is DRAWERS:
        CHART.write_bytes(bytes_figure(out / "rounds120"))
    write_table(regime, tuning, ablation, runs)


if __name__ == "__main__":
    main()
