"""One set of defaults in many regimes: full, fedss and moments where few or many classes, few or
many own classes, small or large cohorts meet.

    python benchmarks/regimes.py --omniglot DIR --hanzi hanzi.csv

Every run has the defaults of ``fedss train``. The step of moments was chosen on seeds 0 to 11;
lower rates of it were also looked at on seed 101. DIR holds the two Omniglot archives; hanzi.csv
is a manifest of 127,691 glyphs of 16,000 Chinese characters, drawn from free fonts, a client being
a page of 40 characters in one design (``--hanzi`` may be left out). A run that is done is not run
again. Writes ``benchmarks/results/regimes.txt``; takes about 50 minutes on two cores.
"""

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any

import common

SEEDS, METHODS = (101, 102, 103), ("full", "fedss", "moments")

OMNIGLOT: Mapping[str, Any] = {"data": "omniglot"}
GLYPHS: Mapping[str, Any] = {"data": "glyphs", "client_classes": 8, "clients_per_round": 4}

REGIMES: Mapping[str, Mapping[str, Any]] = {
    "Omniglot, 20 clients a round, 120 rounds": OMNIGLOT,
    "the same, 8 classes a client, 80 a round": dict(
        OMNIGLOT, client_classes=8, clients_per_round=80
    ),
    "the same, 4 a round, 400 rounds": dict(OMNIGLOT, clients_per_round=4, rounds=400),
    "glyphs, n = 40, 8 own, 4 a round, 30 rounds": dict(
        GLYPHS, glyphs_classes=50, glyphs_clients=16, rounds=30
    ),
    "glyphs, n = 960, 8 own, 4 a round, 60 rounds": dict(GLYPHS, glyphs_classes=1200, rounds=60),
    "hanzi, n = 11,187, 40 own, 40 a round, 60 rounds": dict(
        data="csv", image_size=28, clients_per_round=40, rounds=60
    ),
}


def row_bytes(summary: Mapping[str, Any]) -> float:
    """Class rows and moments that a client moves in a round, both ways."""
    ways = ("down", "up")
    rows = sum(summary[f"class_row_bytes_{way}_per_client_round"] for way in ways)
    return float(rows + sum(summary[f"moment_bytes_{way}_per_client_round"] for way in ways))


def line(name: str, summaries: Mapping[str, list[dict[str, Any]]]) -> str:
    maps = {method: fmean([s["map_at_10"] for s in summaries[method]]) for method in METHODS}
    share = fmean(map(row_bytes, summaries["moments"])) / fmean(map(row_bytes, summaries["full"]))
    seeds = " ".join(f"{s['map_at_10']:.3f}" for s in summaries["moments"])
    return (
        f"{name:<49}{maps['full']:>6.3f}{maps['fedss']:>7.3f}{maps['moments']:>9.3f}"
        f"{maps['moments'] / maps['fedss']:>9.2f}{maps['moments'] / maps['full']:>8.2f}"
        f"{share:>8.1%}  {seeds}"
    )


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--omniglot", required=True, help="folder with the Omniglot archives")
    parser.add_argument("--hanzi", help="manifest of the Chinese characters")
    parser.add_argument("--out", type=Path, default=Path("runs/regimes"), help="run folders")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs side by side")
    options = parser.parse_args()
    paths = {"omniglot": options.omniglot, "csv": options.hanzi, "glyphs": None}
    regimes = {
        name: {**settings, "data_path": paths[settings["data"]], "workers": 1, "eval_every": 0}
        for name, settings in REGIMES.items()
        if settings["data"] != "csv" or options.hanzi
    }
    report = common.Report(
        "One set of defaults in many regimes: MAP@10 on classes that training never saw",
        command="python benchmarks/regimes.py --omniglot DIR --hanzi hanzi.csv",
    )
    report.add(
        f"Means of seeds {', '.join(map(str, SEEDS))}, defaults of every method. '% of W': bytes",
        "of class rows and moments that a client of moments moves, both ways, against full's.",
        "",
        f"{'':<49}{'full':>6}{'fedss':>7}{'moments':>9}{'/ fedss':>9}{'/ full':>8}{'% of W':>8}"
        "  moments, seed by seed",
    )
    with ThreadPoolExecutor(options.jobs) as pool:
        jobs = [
            {
                method: [
                    pool.submit(
                        common.train,
                        options.out / f"{number}-{method}-{seed}",
                        {**settings, "method": method, "seed": seed},
                    )
                    for seed in SEEDS
                ]
                for method in METHODS
            }
            for number, settings in enumerate(regimes.values())
        ]
        for name, of_method in zip(regimes, jobs, strict=True):
            summaries = {m: [job.result() for job in runs] for m, runs in of_method.items()}
            report.add(line(name, summaries))
    report.write()


if __name__ == "__main__":
    main()
