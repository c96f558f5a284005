"""Which negatives, and what correction: retrieval and identification at equal bytes of class rows.

    python benchmarks/samplers.py --omniglot DIR --hanzi hanzi.csv --photos photos-20.csv

DIR holds the two Omniglot archives; the others are manifests (image,label,client,split): Chinese
characters (``benchmarks/hanzi_glyphs.py`` draws them), photographs. What is left out is not run;
the glyphs of ``make demo`` are.
Settings are ``auto``; test classes and seeds from 101 on are those that no choice was made on.
Differences are from ``fedss`` with its defaults (sampler ``uniform``), paired, 95 % intervals over
test classes and seeds. DIR is the share of known images that identification finds and names at FPIR
1 %, with Student's 95 % interval of the difference over seeds. Bytes are per client and round;
``rows`` are those of class rows, of what goes down.

Runs that are complete in ``--out`` are not run again. Writes ``results/samplers.txt``: an hour on
two cores.
"""

import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import common

from fedss.evaluation.intervals import ClassScores, Interval, difference, student_t
from fedss.runs.findings import read_scores, read_verification

Settings = Mapping[str, Any]

VARIANTS: Mapping[str, Settings] = {
    "fedss": {},
    "published": {"method": "fedss-published"},
    "published, a = 0.75": {"method": "fedss-published", "correction": 0.75},
    "deck": {"sampler": "deck"},
    "sticky": {"sampler": "sticky"},
    "uncorrected": {"method": "fedss-uncorrected"},
    "pos-only": {"method": "pos-only"},
    "full": {"method": "full"},
    "moments": {"method": "moments"},
}
ALL = tuple(VARIANTS)
FEW = ("fedss", "published", "full", "moments")


@dataclass(frozen=True)
class Task:
    """What all variants are trained on, with which seeds."""

    settings: Settings
    seeds: range
    variants: Sequence[str]


TASKS: Mapping[str, Task] = {
    "omniglot": Task({"data": "omniglot"}, range(101, 106), ALL),
    "hanzi": Task(
        {"data": "csv", "image_size": 28, "clients_per_round": 40, "rounds": 60},
        range(101, 104),
        [name for name in ALL if name not in ("uncorrected", "pos-only")],
    ),
    "photos": Task({"data": "csv", "image_size": 32}, range(101, 104), FEW),
    # That of `make demo`.
    "glyphs": Task({"data": "glyphs", "rounds": 110}, range(101, 106), FEW),
}


def over_seeds(differences: Sequence[float]) -> Interval:
    """The mean of paired differences, with Student's interval."""
    mean, count = fmean(differences), len(differences)
    half = student_t(0.975, count - 1) * stdev(differences) / sqrt(count)
    return Interval(mean, mean - half, mean + half, count)


def shown(change: Interval | None) -> str:
    """A difference with the ends of its interval."""
    return f"{change.value:+.3f} ({change.low:+.3f} to {change.high:+.3f})" if change else "–"


def table(task: str, folders: Mapping[str, Sequence[Path]]) -> list[str]:
    """A line for each variant that was run."""
    scores: dict[str, list[ClassScores]] = {}
    found: dict[str, list[float]] = {}
    sizes: dict[str, dict[str, float]] = {}
    for name, runs in folders.items():
        for run in runs:
            trained = read_scores(run / "by_class.json").by_class["trained"]
            scores.setdefault(name, []).append(trained)
            verified = read_verification(run)
            assert verified is not None
            assert verified.identification is not None
            found.setdefault(name, []).append(verified.identification.dir)
        (sizes[name],) = json.loads((runs[0] / "summary.json").read_text())
    lines = [
        f"{'':<20}{'MAP@10':>8}{'less fedss':>28}{'DIR':>8}{'less fedss':>28}"
        f"{'kB down':>9}{'rows':>7}{'kB up':>8}"
    ]
    for name in folders:
        retrieval = difference(scores[name], scores["fedss"], paired=True)
        pairs = zip(found[name], found["fedss"], strict=True)
        named = over_seeds([ours - theirs for ours, theirs in pairs])
        mean = fmean(score.map_at_10 for score in scores[name])
        lines.append(
            f"{name:<20}{mean:>8.3f}{shown(retrieval) if name != 'fedss' else '':>28}"
            f"{fmean(found[name]):>8.3f}{shown(named) if name != 'fedss' else '':>28}"
            f"{sizes[name]['bytes_down_per_client_round'] / 1e3:>9.0f}"
            f"{sizes[name]['class_row_bytes_down_per_client_round'] / 1e3:>7.0f}"
            f"{sizes[name]['bytes_up_per_client_round'] / 1e3:>8.0f}"
        )
    seeds = TASKS[task].seeds
    return [f"{task}: seeds {seeds[0]} to {seeds[-1]}", "", *lines, ""]


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--omniglot", type=Path, help="folder with the Omniglot archives")
    parser.add_argument("--hanzi", type=Path, help="manifest of the Chinese characters")
    parser.add_argument("--photos", type=Path, help="manifest of photographs")
    parser.add_argument("--out", type=Path, default=Path("runs/samplers"), help="run folders")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs side by side")
    options = parser.parse_args()
    report = common.Report(
        "Choices of negatives and correction: MAP@10 and identification on unseen classes",
        command="python benchmarks/samplers.py --omniglot DIR --hanzi CSV --photos CSV",
    )
    with ThreadPoolExecutor(options.jobs) as pool:
        for name, task in TASKS.items():
            path = getattr(options, name, None)
            if name != "glyphs" and path is None:
                continue
            folders = {
                variant: [
                    options.out / f"{name}-{variant.replace(' ', '-')}-{seed}"
                    for seed in task.seeds
                ]
                for variant in task.variants
            }
            shared = {**task.settings, "data_path": path, "workers": 1, "eval_every": 0}
            # A seed of all variants, then the next one: what is stopped has whole seeds.
            work = [
                (folders[variant][number], {**shared, **VARIANTS[variant], "seed": seed})
                for number, seed in enumerate(task.seeds)
                for variant in task.variants
            ]
            list(pool.map(lambda job: common.train(*job), work))
            report.add(*table(name, folders))
    report.write()


if __name__ == "__main__":
    main()
