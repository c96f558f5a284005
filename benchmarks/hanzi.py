"""FedSS with very many classes: thousands of Chinese characters in many designs.

    python benchmarks/hanzi.py --data-path DIR [--all-characters DIR]
    python benchmarks/hanzi.py --data-path DIR --check    (60 rounds alone; 1 if a bar is missed)

DIR holds ``hanzi.csv`` and its images, which ``benchmarks/hanzi_glyphs.py`` draws from Debian's
fonts: 11,187 training characters, and 20,000 or so with ``--all-characters`` (``--characters 0``
there). A client is a page of 40 characters in one design, 40 take part in a round. All settings
are ``auto``. Test characters and seeds 101 to 103 are those that no choice was made on.

Bytes are of all messages of the whole run. A client's memory is computed: backbone and class rows,
and a gradient of each. Memory of a run is what its process held at most: server, images, one
client at a time. Seconds are of one core. Runs that are complete in ``--out`` are not run again.
Writes ``results/hanzi.txt``. ``--check`` takes minutes, all of it hours.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import common

import fedss
from fedss.evaluation.intervals import FLOORS, interval
from fedss.files import write_file
from fedss.runs.findings import read_scores

SHARED = {
    "data": "csv",
    "image_size": 28,
    "clients_per_round": 40,
    "workers": 1,
    "eval_every": 0,
}
# Means over seeds at 60 rounds, with 11,187 classes, and how many class rows `fedss` may take.
BARS = {"full": 0.52, "fedss": 0.50, "moments": 0.52}
MOST_ROWS = 256


@dataclass(frozen=True)
class Stage:
    """Runs that make up a part of the table."""

    title: str
    data: str
    rounds: int
    methods: tuple[str, ...]
    seeds: tuple[int, ...]


STAGES = (
    Stage("60 rounds", "usual", 60, ("full", "fedss", "moments", "pos-only"), (101, 102, 103)),
    Stage("300 rounds", "usual", 300, ("full", "fedss", "moments"), (101,)),
    Stage("all characters, 60 rounds", "all", 60, ("fedss", "moments"), (101,)),
)


def run(folder: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Train in this process; what is to be known of it."""
    place = Path(folder)
    done = fedss.train(fedss.Config(**settings), place)
    if not done.already_done:
        write_file(place / "peak.json", json.dumps(common.peak_megabytes()).encode())
    told = json.loads((place / "config.json").read_text())
    return {
        "summary": done.summary,
        "memory": json.loads((place / "peak.json").read_text()),
        "classes": told["data"]["train_classes"],
        "embedding_size": told["resolved"]["embedding_size"],
    }


def line(method: str, runs: Sequence[Mapping[str, Any]], folders: Sequence[Path]) -> str:
    """A row of the table."""
    first = runs[0]["summary"]
    ends = interval(
        [read_scores(folder / "by_class.json").by_class["trained"] for folder in folders]
    )
    assert ends is not None
    both = first["bytes_down_per_client_round"] + first["bytes_up_per_client_round"]
    total = both * SHARED["clients_per_round"] * first["rounds"] / 1e9
    rows = first["class_rows_per_client"]
    numbers = first["backbone_bytes_down_per_client_round"] + rows * 4 * runs[0]["embedding_size"]
    return (
        f"{method:<10}{ends.value:>8.3f}{f'{ends.low:.3f}-{ends.high:.3f}':>14}{rows:>9,.0f}"
        f"{total:>9.2f}{2 * numbers / 1e6:>11.2f}{fmean(r['memory'] for r in runs):>9.0f}"
        f"{fmean(r['summary']['seconds'] for r in runs):>9.0f}"
    )


def missed(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[str]:
    """A line for each bar that is missed, of runs of 60 rounds by method."""
    for method, bar in BARS.items():
        score = fmean(run["summary"]["map_at_10"] for run in results[method])
        if score < bar:
            yield f"{method}: MAP@10 {score:.4f}, bar {bar}"
    rows = results["fedss"][0]["summary"]["sample_size"]
    if rows > MOST_ROWS:
        yield f"fedss: |S| = {rows}, bar {MOST_ROWS}"


def main() -> int:
    parser = common.parser(__doc__)
    parser.add_argument("--data-path", type=Path, required=True, help="folder with hanzi.csv")
    parser.add_argument("--all-characters", type=Path, help="folder with all characters' hanzi.csv")
    parser.add_argument("--out", type=Path, default=Path("runs/hanzi"), help="run folders")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs side by side")
    parser.add_argument("--check", action="store_true", help="60 rounds; 1 if a bar is missed")
    options = parser.parse_args()
    paths = {"usual": options.data_path, "all": options.all_characters}
    for path in filter(None, paths.values()):
        if not (path / "hanzi.csv").is_file():
            parser.error(f"{path}: expected a folder with hanzi.csv")
    report = common.Report(
        "Very many classes: Chinese characters, settings auto, unseen classes",
        command="python benchmarks/hanzi.py --data-path DIR --all-characters DIR",
    )
    bars: list[str] = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for stage in STAGES[:1] if options.check else STAGES:
            if paths[stage.data] is None:
                continue
            methods = [m for m in stage.methods if m in BARS or not options.check]
            folders = {
                method: [
                    options.out / f"{method}-{stage.data}-{stage.rounds}-{seed}"
                    for seed in stage.seeds
                ]
                for method in methods
            }
            shared = {**SHARED, "data_path": paths[stage.data] / "hanzi.csv"}
            told = {**shared, "rounds": stage.rounds}
            pending = {
                (method, seed): pool.submit(
                    partial(common.in_own_process, threads=1),
                    *("run", folder, {**told, "method": method, "seed": seed}),
                )
                for method in methods
                for seed, folder in zip(stage.seeds, folders[method], strict=True)
            }
            results = {
                method: [pending[method, seed].result() for seed in stage.seeds]
                for method in methods
            }
            report.add(
                f"{stage.title}, n = {results['fedss'][0]['classes']:,}, seeds "
                f"{', '.join(map(str, stage.seeds))}",
                "",
                f"{'':<10}{'MAP@10':>8}{'95 %':>14}{'rows':>9}{'GB':>9}{'client MB':>11}"
                f"{'run MB':>9}{'s':>9}",
                *(line(method, results[method], folders[method]) for method in methods),
            )
            floors = results["fedss"][0]["summary"]["floors"]
            report.add(
                "floors: " + ", ".join(f"{FLOORS[n]} {v:.3f}" for n, v in floors.items()), ""
            )
            if stage is STAGES[0]:
                bars = list(missed(results))
    report.add(*(bars or ["every bar is met"]))
    report.write(unless=options.check)
    return int(bool(options.check and bars))


def script() -> None:
    raise SystemExit(main())


if __name__ == "__main__":
    common.run_script(script, run=run)
