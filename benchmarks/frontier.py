"""Accuracy against bytes: samplers, moments and wire formats beside the full softmax.

    python benchmarks/frontier.py --data-path DIR      (DIR holds the two Omniglot archives)

Settings were chosen with seeds 0 to 2, 100 and 101 (see ``benchmarks/results/omniglot.txt`` for
learning rates); here seeds 10 to 14 are used, once. Cohorts depend on the seed alone, so that the
variants of one seed see the same clients. All variants of a stage have the same settings, those
of `fedss train`, but for what their label says. (The groups of 32 values in int4 were chosen on
the validation alphabets, after a first run of "standard" with a scale for each channel had given
0.958 of full; "small-messages" therefore has seeds of its own, 15 to 19.) Each run is a ``fedss
train`` in a folder of its own, so that the command goes on where it was interrupted; ``--stages``
picks some of the stages and ``--only`` some of their variants; the results of others stay.

Writes ``benchmarks/results/frontier.txt`` and ``.json``, a report page for each stage, and
``docs/images/frontier.png``. Takes about two and a half hours on two cores.
"""

import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import common

import fedss
from fedss.report import frontier_figure

TABLE, STORED = common.RESULTS / "frontier.txt", common.RESULTS / "frontier.json"
CHART = common.ROOT / "docs" / "images" / "frontier.png"
FRESH = (10, 11, 12, 13, 14)

Settings = Mapping[str, Any]

FULL: Settings = {"method": "full"}
UNIFORM: Settings = {"method": "fedss-published", "sampler": "uniform"}
DECK: Settings = {"method": "fedss-published", "sampler": "deck"}
MOMENTS: Settings = {"method": "moments"}


def wire(rows: str, backbone: str) -> dict[str, str]:
    ways = ("down", "up")
    return {f"rows_{w}": rows for w in ways} | {f"backbone_{w}": backbone for w in ways}


SMALL = wire("int8", "int4")


@dataclass(frozen=True)
class Stage:
    """One table: variants by label, under settings that they share."""

    title: str
    shared: Settings
    variants: Mapping[str, Settings]
    seeds: tuple[int, ...] = FRESH


STEP10 = {"local_steps": 10, "client_lr": 0.05, "class_row_lr": 2.0}
STEP50 = {**STEP10, "local_steps": 50, "rounds": 60, "clients_per_round": 10}
RATES = {"client_lr": 0.07, "class_row_lr": 0.35}
ONE_BY_ONE = {"clients_per_round": 1, "rounds": 2400, "server_momentum": 0.0, "batch_size": 4}

STAGES = {
    "standard": Stage(
        "Omniglot, n = 964, about 32 own classes, 20 clients a round, 120 rounds",
        {"rounds": 120},
        {
            "full": FULL,
            "fedss uniform": UNIFORM,
            "fedss deck": DECK,
            "moments": MOMENTS,
            "deck int8/int4": {**DECK, **SMALL},
            "moments int8/int4": {**MOMENTS, **SMALL},
        },
    ),
    "small-clients": Stage(
        "Omniglot, n = 964, clients of 8 classes, 80 clients a round, 120 rounds",
        {"rounds": 120, "client_classes": 8, "clients_per_round": 80},
        {
            "full": FULL,
            "uniform 32": {**UNIFORM, "sample_size": 32},
            "deck 32": {**DECK, "sample_size": 32},
            "moments": MOMENTS,
            "moments rank 28": {**MOMENTS, "moments_rank": 28},
            "rank 28 int8/int4": {**MOMENTS, "moments_rank": 28, **SMALL},
        },
    ),
    "rotations": Stage(
        "Omniglot, quarter turns as classes, n = 3,856, 20 clients a round, 120 rounds",
        {"rounds": 120, "rotations": True, "sample_size": 77},
        {"full": FULL, "uniform 77": UNIFORM, "deck 77": DECK, "moments": MOMENTS},
    ),
    "small-messages": Stage(
        "Omniglot, n = 964, 20 clients a round, 120 rounds: small messages on seeds of their own",
        {"rounds": 120},
        {
            "full": FULL,
            "uniform int8/int4": {**UNIFORM, **SMALL},
            "deck int8/int4": {**DECK, **SMALL},
            "moments int8/int4": {**MOMENTS, **SMALL},
        },
        (15, 16, 17, 18, 19),
    ),
    "300-rounds": Stage(
        "Omniglot, n = 964, 20 clients a round, 300 rounds",
        {"rounds": 300},
        {"full": FULL, "fedss uniform": UNIFORM, "fedss deck": DECK, "moments": MOMENTS},
    ),
    "pooled": Stage(
        "Omniglot, n = 964, 1 client a round for 2,400 rounds: as many image passes as pooled "
        "training",
        {**ONE_BY_ONE, **RATES},
        {
            "full": FULL,
            "fedss deck": DECK,
            "central": {"method": "central", "rounds": 120, "clients_per_round": 20},
        },
    ),
    "glyphs": Stage(
        "glyphs, n = 20,000 classes at 5,000 clients, 20 clients a round, 120 rounds",
        {
            "data": "glyphs",
            "glyphs_classes": 20_512,
            "glyphs_clients": 5_000,
            "test_classes": 0.02496,
            "scale": 16.0,
            "rounds": 120,
        },
        {"full": FULL, "fedss uniform": UNIFORM, "fedss deck": DECK, "moments": MOMENTS},
    ),
    "10-steps": Stage(
        "Omniglot, n = 964, 10 local steps a client, 20 clients a round, 120 rounds",
        {"rounds": 120, **STEP10},
        {"full": FULL, "fedss deck": DECK, "moments": {**MOMENTS, "class_row_lr": 1.0}},
        FRESH[:2],
    ),
    "50-steps": Stage(
        "Omniglot, n = 964, 50 local steps a client, 10 clients a round, 60 rounds",
        STEP50,
        {"full": FULL, "fedss deck": DECK, "moments": {**MOMENTS, "class_row_lr": 1.0}},
        FRESH[:1],
    ),
    "1000-rounds": Stage(
        "Omniglot, n = 964, 20 clients a round, 1,000 rounds",
        {"rounds": 1000, "eval_every": 200},
        {"full": FULL, "fedss deck": DECK, "moments": MOMENTS},
        FRESH[:1],
    ),
    "all-choices": Stage(
        "Omniglot, n = 964, 20 clients a round, 120 rounds: every sampler and format",
        {"rounds": 120},
        {
            "full": FULL,
            "fedss sticky": {**DECK, "sampler": "sticky"},
            "deck tempered 0.5": {**DECK, "correction": 0.5},
            "moments rank 16": {**MOMENTS, "moments_rank": 16},
            "deck int4": {**DECK, **wire("int4", "int4")},
            "full int4": {**FULL, **wire("int4", "int4")},
        },
        FRESH[:2],
    ),
}
# Not those where `full` is undertrained: they would say that a sample beats it.
IMAGED = {"n = 964": "standard", "clients of 8 classes": "small-clients"}


def run_stage(
    pool: ThreadPoolExecutor, name: str, data_path: str, out: Path, only: str
) -> list[dict[str, Any]]:
    """The runs of a stage whose label has ``only`` in it; of all of them, a report page too."""
    stage = STAGES[name]
    labels = [label for label in stage.variants if only in label]
    jobs = [(label, seed) for seed in stage.seeds for label in labels]

    def run(job: tuple[str, int]) -> dict[str, Any]:
        label, seed = job
        data = {"data": "omniglot", "data_path": data_path}
        if stage.shared.get("data") == "glyphs":
            data = {}
        settings = {
            "workers": 1,
            "eval_every": 20,
            **data,
            "seed": seed,
            **stage.shared,
            **stage.variants[label],
        }
        folder = f"{label.replace(' ', '-').replace('/', '+')}-seed{seed}"
        return {**common.train(out / name / folder, settings), "label": label, "folder": folder}

    results = list(pool.map(run, jobs))
    if len(labels) < len(stage.variants):
        return results
    (out / name / "summary.json").write_text(json.dumps(results, indent=2))
    print(f"report  {fedss.write_report(out / name)}", flush=True)
    return results


def table(name: str, runs: list[dict[str, Any]]) -> list[str]:
    """A line per variant: score and its ratio to full of the same seed, bytes, rows."""
    stage = STAGES[name]
    full = {run["seed"]: run for run in runs if run["label"] == "full"}
    central = [run["map_at_10"] for run in runs if run["label"] == "central"]
    row_bytes = fmean([r["class_row_bytes_down_per_client_round"] for r in full.values()])
    total = fmean([both_ways(r) for r in full.values()])
    lines = [
        "",
        stage.title,
        f"seeds {', '.join(map(str, stage.seeds))}",
        f"{'variant':<18} {'MAP@10':>7} {'per seed':<30} {'/ full':>6} {'worst':>6} {'best':>6}"
        + (f" {'/ pooled':>8}" if central else "")
        + f" {'rows':>5} {'% of W':>6} {'kB down':>8} {'kB up':>7} {'less':>6} {'seconds':>7}",
    ]
    for label in stage.variants:
        of_label = [run for run in runs if run["label"] == label]
        if not of_label:  # a variant that is newer than the results at hand
            continue
        maps = [run["map_at_10"] for run in of_label]
        ratios = [run["map_at_10"] / full[run["seed"]]["map_at_10"] for run in of_label]
        line = (
            f"{label:<18} {fmean(maps):>7.3f} {' '.join(f'{m:.3f}' for m in maps):<30}"
            f" {fmean(maps) / fmean([r['map_at_10'] for r in full.values()]):>6.3f}"
            f" {min(ratios):>6.3f} {max(ratios):>6.3f}"
        )
        if central:
            line += f" {fmean(maps) / fmean(central):>8.3f}"
        if of_label[0]["bytes_down_per_client_round"] is not None:
            summed = [
                r["class_row_bytes_down_per_client_round"] + r["moment_bytes_down_per_client_round"]
                for r in of_label
            ]
            line += (
                f" {fmean([r['class_rows_per_client'] for r in of_label]):>5.0f}"
                f" {fmean(summed) / row_bytes:>6.1%}"
                f" {fmean([r['bytes_down_per_client_round'] for r in of_label]) / 1000:>8.1f}"
                f" {fmean([r['bytes_up_per_client_round'] for r in of_label]) / 1000:>7.1f}"
                f" {total / fmean([both_ways(r) for r in of_label]):>6.1f}"
            )
        else:
            line += " " * 37
        lines.append(line + f" {fmean([r['seconds'] for r in of_label]):>7.0f}")
    return lines


def both_ways(run: Mapping[str, Any]) -> float:
    return float(run["bytes_down_per_client_round"] + run["bytes_up_per_client_round"])


def text(results: Mapping[str, list[dict[str, Any]]]) -> str:
    lines = [
        *common.head(
            "The frontier of accuracy against bytes",
            command="python benchmarks/frontier.py --data-path DIR",
        ),
        "MAP@10 on classes that neither training nor tuning saw. '/ full' is the ratio of the",
        "means, 'worst' and 'best' that of one seed; '% of W': class rows and moments down, as",
        "bytes; 'less': how many times fewer bytes than full, both ways, backbone included.",
        "|S| = 64 unless the label says otherwise; 'int8/int4': class rows in int8, backbone in",
        "int4, both ways.",
    ]
    for name in STAGES:
        if name in results:
            lines += table(name, results[name])
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--data-path", required=True, help="folder with the Omniglot archives")
    parser.add_argument("--out", type=Path, default=Path("runs/frontier"), help="run folders")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs side by side")
    parser.add_argument("--only", default="", help="text in the labels of the variants to run")
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    options = parser.parse_args()
    results = json.loads(STORED.read_text()) if STORED.exists() else {}
    with ThreadPoolExecutor(options.jobs) as pool:
        for name in options.stages:
            ran = run_stage(pool, name, options.data_path, options.out, options.only)
            labels = {run["label"] for run in ran}
            results[name] = ran + [r for r in results.get(name, []) if r["label"] not in labels]
            STORED.write_text(json.dumps(results, indent=1) + "\n")
            TABLE.write_text(text(results))
    shown = {title: options.out / name for title, name in IMAGED.items()}
    shown = {title: folder for title, folder in shown.items() if (folder / "summary.json").exists()}
    if shown:
        CHART.write_bytes(frontier_figure(shown))
    print(f"\n{TABLE.read_text()}")


if __name__ == "__main__":
    main()
