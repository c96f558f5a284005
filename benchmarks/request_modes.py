"""What it costs that requests tell nothing: ``--requests own``, ``all`` and ``common``.

    python benchmarks/request_modes.py --omniglot DIR --hanzi hanzi.csv

DIR holds the two Omniglot archives, the other is the manifest that ``hanzi_glyphs.py`` draws. What
is left out is not run. All variants train on as many images: in ``common`` a client trains on half
of its own in a round, so there are twice the rounds, or twice the clients in each. Settings are
``auto``; test classes and seeds from 101 on are those that no choice was made on. Differences are
from ``own``, paired, 95 % intervals over test classes and seeds. Megabytes are those of all
messages of a run, per client of the data set.

Runs that are complete in ``--out`` are not run again. Writes ``results/request_modes.txt``.
(Python would take a script named requests.py for the package of that name, which Flower needs.)
"""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any

import common

from fedss.evaluation.intervals import difference
from fedss.runs.findings import read_scores

Settings = Mapping[str, Any]

TASKS: Mapping[str, Settings] = {
    "omniglot": {"data": "omniglot", "rounds": 120, "clients_per_round": 20},
    "hanzi": {"data": "csv", "image_size": 28, "rounds": 60, "clients_per_round": 40},
}
INT8 = {"rows_down": "int8", "rows_up": "int8"}
VARIANTS: Mapping[str, Settings] = {
    "own": {},
    "all, int8": {"requests": "all", **INT8},
    "common, more rounds": {"requests": "common", "rounds": 2},
    "common, more clients": {"requests": "common", "clients_per_round": 2},
    "own, int8": INT8,
    "full": {"method": "full"},
}
TIMES = ("rounds", "clients_per_round")
"""Of these a variant has so many times as many as the task."""


def settings_of(task: str, variant: str, short: bool) -> dict[str, Any]:
    """Those of a run, but for its data and seed."""
    told, changes = dict(TASKS[task]), dict(VARIANTS[variant])
    if short:
        told |= {"rounds": 3, "image_size": 14, "backbone": "conv4-8"}
    return {**told, **changes, **{n: told[n] * changes[n] for n in TIMES if n in changes}}


def table(folders: Mapping[str, Sequence[Path]]) -> list[str]:
    """A line for each variant."""
    scores, lines = (
        {},
        [f"{'':<22}{'MAP@10':>8}{'less own':>28}{'of own':>8}{'MB down':>9}{'up':>7}"],
    )
    for name, runs in folders.items():
        scores[name] = [read_scores(run / "by_class.json").by_class["trained"] for run in runs]
        mean = fmean(score.map_at_10 for score in scores[name])
        change = difference(scores[name], scores["own"], paired=True)
        interval = (
            f"{change.value:+.3f} ({change.low:+.3f} to {change.high:+.3f})" if change else "–"
        )
        share = mean / fmean(score.map_at_10 for score in scores["own"])
        down, up = map(fmean, zip(*map(megabytes, runs), strict=True))
        told = f"{interval:>28}{share:>8.3f}" if name != "own" else " " * 36
        lines.append(f"{name:<22}{mean:>8.3f}{told}{down:>9.2f}{up:>7.2f}")
    return lines


def megabytes(run: Path) -> tuple[float, float]:
    """Down and up, of all rounds, per client of the data set."""
    records = [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]
    clients = records[-1]["num_clients"] * 1e6
    return tuple(sum(r[f"bytes_{way}"] for r in records) / clients for way in ("down", "up"))


def main() -> None:
    parser = common.parser(__doc__, "three rounds of a small network, one seed")
    parser.add_argument("--omniglot", type=Path, help="folder with the Omniglot archives")
    parser.add_argument("--hanzi", type=Path, help="manifest of the Chinese characters")
    parser.add_argument("--out", type=Path, default=Path("runs/request_modes"), help="run folders")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--variants", nargs="+", default=[*VARIANTS], choices=[*VARIANTS])
    options = parser.parse_args()
    if "own" not in options.variants:
        parser.error("--variants: expected own among them, which others are compared with")
    report = common.Report(
        "Requests that tell nothing: MAP@10 on unseen classes at equal picture passes",
        command="python benchmarks/request_modes.py --omniglot DIR --hanzi CSV",
    )
    seeds = [101] if options.short else [101, 102, 103]
    with ThreadPoolExecutor(options.jobs) as pool:
        for task in TASKS:
            path = getattr(options, task)
            if path is None:
                continue
            folders = {
                name: [
                    options.out / f"{task}-{name.replace(', ', '-').replace(' ', '-')}-{seed}"
                    for seed in seeds
                ]
                for name in options.variants
            }
            shared = {"data_path": path, "workers": 1, "eval_every": 0}
            # A seed of all variants, then the next one: what is stopped has whole seeds.
            work = [
                (
                    folders[name][number],
                    {**settings_of(task, name, options.short), **shared, "seed": seed},
                )
                for number, seed in enumerate(seeds)
                for name in options.variants
            ]
            list(pool.map(lambda job: common.train(*job), work))
            report.add(f"{task}: seeds {', '.join(map(str, seeds))}", "", *table(folders), "")
    report.write(unless=options.short or options.variants != [*VARIANTS])


if __name__ == "__main__":
    main()
