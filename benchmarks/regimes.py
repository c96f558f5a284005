"""Do settings that nobody chose do as well as a search, whatever the problem is?

    python benchmarks/regimes.py --omniglot DIR --hanzi hanzi.csv --photos photos-20.csv
    python benchmarks/regimes.py --check        (two of glyphs, 6 minutes; 1 if a bar is missed)
    python benchmarks/regimes.py --short        (the smaller of these two, 2 minutes)

In each regime every method runs with what ``auto`` gives, on seeds 101 to 103 (long runs: 101),
judged on classes that training never saw. Beside them stand `full` and `fedss` at their best:
client_lr, server_row_lr and 1 - server_momentum, one after another, are doubled and halved (rows:
times and by 3) while that helps MAP@10 on the validation classes, seed 100, and the winner is run
on the same seeds. In long runs the rates alone are searched.

DIR holds the two Omniglot archives; the others are manifests (image,label,client,split): glyphs of
16,000 Chinese characters (``benchmarks/hanzi.py`` draws them), photographs. What is left out is
not run. Each run is kept in ``--out``, its figures in ``results/regimes.json``: the command goes on
where it was stopped, ``--only TEXT`` takes the regimes whose names have the text. Writes
``results/regimes.txt``: all of it takes about two days on two cores, the default runs 8 hours.
"""

import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import fmean, median
from threading import Lock
from typing import Any

import common

SEEDS, TUNING_SEED = (101, 102, 103), 100
METHODS = ("full", "fedss", "moments", "pos-only", "fedaws")
SEARCHED = ("full", "fedss")
# Of a run's settings, what the search and the bars read: no folder of the machine that ran it.
KEPT = ("client_lr", "class_row_lr", "server_row_lr", "server_momentum", "sample_size")
STEPS = {"client_lr": 2.0, "server_row_lr": 3.0, "loss_of_momentum": 2.0}

Settings = Mapping[str, Any]
OMNIGLOT: Settings = {"data": "omniglot"}
GLYPHS: Settings = {"data": "glyphs", "client_classes": 8, "clients_per_round": 4, "rounds": 60}
HANZI: Settings = {"data": "hanzi", "image_size": 28, "clients_per_round": 40, "rounds": 60}
PHOTOS: Settings = {"data": "photos", "image_size": 32}

REGIMES: Mapping[str, Settings] = {
    "Omniglot: 20 clients a round, 120 rounds": OMNIGLOT,
    "Omniglot, 8 classes a client, 80 a round": dict(
        OMNIGLOT, client_classes=8, clients_per_round=80
    ),
    "Omniglot, 5 classes a client, 40 a round": dict(
        OMNIGLOT, partition="classes:5", clients_per_round=40
    ),
    "Omniglot, one class a client, 40 a round": dict(
        OMNIGLOT, partition="class", clients_per_round=40
    ),
    "Omniglot, one class a client, 1,000 rounds": dict(
        OMNIGLOT, partition="class", clients_per_round=40, rounds=1000
    ),
    "Omniglot, 4 a round, 400 rounds": dict(OMNIGLOT, clients_per_round=4, rounds=400),
    "Omniglot, 100 a round": dict(OMNIGLOT, clients_per_round=100),
    "Omniglot, 30 rounds": dict(OMNIGLOT, rounds=30),
    "Omniglot, 300 rounds": dict(OMNIGLOT, rounds=300),
    "Omniglot, 1,000 rounds": dict(OMNIGLOT, rounds=1000),
    "Omniglot, 1 local step": dict(OMNIGLOT, local_steps=1),
    "Omniglot, 50 local steps": dict(OMNIGLOT, local_steps=50),
    "Omniglot, clients of very unequal size": dict(
        OMNIGLOT, partition="dirichlet:0.05", partition_clients=200
    ),
    "Omniglot, four rotations": dict(OMNIGLOT, rotations=True),
    "glyphs, n = 40, 8 own": dict(GLYPHS, glyphs_classes=50, glyphs_clients=16, rounds=30),
    "glyphs, n = 960, 8 own": dict(GLYPHS, glyphs_classes=1200),
    "glyphs, n = 960, 8 own, 300 rounds": dict(GLYPHS, glyphs_classes=1200, rounds=300),
    "glyphs, n = 240, 8 own, 32 a round": dict(GLYPHS, glyphs_classes=300, clients_per_round=32),
    "glyphs, n = 240, one class a client, 32 a round": dict(
        GLYPHS, glyphs_classes=300, client_classes=None, partition="class", clients_per_round=32
    ),
    "glyphs, n = 20,000": dict(
        GLYPHS, glyphs_classes=25_000, glyphs_clients=2000, client_classes=40, clients_per_round=40
    ),
    "hanzi, n = 11,187, 60 rounds": HANZI,
    "hanzi, 300 rounds": dict(HANZI, rounds=300),
    "hanzi, 1,000 characters": dict(HANZI, data="hanzi of 1,000"),
    "hanzi, pages of 5": dict(HANZI, client_classes=5),
    "hanzi, pages of 200": dict(HANZI, partition="classes:200"),
    "photos, conv4": PHOTOS,
}
# A run takes minutes.
LONG = [
    "Omniglot, one class a client, 1,000 rounds",
    "Omniglot, 100 a round",
    "Omniglot, 300 rounds",
    "Omniglot, 1,000 rounds",
    "Omniglot, 50 local steps",
    "hanzi, 300 rounds",
    "hanzi, pages of 200",
    "photos, conv4",
]
# Of these every run takes seconds.
CHECKED = [
    "glyphs, n = 40, 8 own",
    "glyphs, n = 960, 8 own",
]


def fewer_classes(manifest: Path, count: int, out: Path) -> Path:
    """A manifest of the training images of the first classes, and of all others."""
    with manifest.open(newline="") as file:
        rows = list(csv.DictReader(file))
    kept = set(sorted({row["label"] for row in rows if row["split"] == "train"})[:count])
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in rows:
            if row["split"] != "train" or row["label"] in kept:
                place = (manifest.parent / row["image"]).resolve()
                writer.writerow({**row, "image": os.path.relpath(place, out.parent.resolve())})
    return out


class Runs:
    """Runs of a regime, each once, whatever was stopped in between."""

    def __init__(self, out: Path, paths: Mapping[str, Path | None], keep: Path | None) -> None:
        self.out, self.paths, self.keep = out, paths, keep
        self.known: dict[str, dict[str, Any]] = {}
        self.lock = Lock()
        if keep and keep.exists():
            self.known = json.loads(keep.read_text())

    def __call__(self, regime: str, method: str, seed: int, **settings: Any) -> dict[str, Any]:
        """What is kept of a run: figures, and the settings that it had."""
        told = {**REGIMES[regime], "method": method, "seed": seed, **settings}
        key = json.dumps([regime, told])
        if key not in self.known:
            path, plain = self.paths.get(told["data"]), {**told, "workers": 1, "stack": 8}
            plain["eval_every"] = 0
            if told["data"] in ("hanzi", "photos") or told["data"].startswith("hanzi"):
                plain["data"] = "csv"
            name = "-".join(
                [
                    method,
                    str(seed),
                    *(f"{k}={v:g}" for k, v in settings.items() if not isinstance(v, str)),
                ]
            )
            split = "-validation" * ("eval_split" in settings)
            folder = self.out / str(list(REGIMES).index(regime)) / f"{name}{split}"
            summary = common.train(folder, {**plain, "data_path": path})
            config = json.loads((folder / "config.json").read_text())
            used = {**config["config"], **config["resolved"]}
            self.known[key] = {
                **{name: summary[name] for name in ("map_at_10", "map_at_10_interval", "seconds")},
                "classes": config["data"]["train_classes"],
                "settings": {name: used[name] for name in KEPT},
            }
            if self.keep:
                with self.lock:
                    self.keep.write_text(json.dumps(dict(sorted(self.known.items())), indent=1))
        return self.known[key]


def at_best(runs: Runs, regime: str, method: str) -> dict[str, float]:
    """The settings that the search ends with."""
    usual = runs(regime, method, TUNING_SEED, eval_split="validation")["settings"]

    def told(settings: Mapping[str, float]) -> dict[str, float]:
        told = {name: settings[name] for name in ("client_lr", "server_row_lr")}
        if "loss_of_momentum" in settings:
            told["server_momentum"] = round(max(0.0, 1 - settings["loss_of_momentum"]), 4)
        return told

    def judge(settings: dict[str, float]) -> float:
        changed = {} if settings == start else told(settings)
        run = runs(regime, method, TUNING_SEED, eval_split="validation", **changed)
        return float(run["map_at_10"])

    start = {name: usual[name] for name in ("client_lr", "server_row_lr")}
    if regime not in LONG:
        start["loss_of_momentum"] = round(1 - usual["server_momentum"], 4)
    trials = common.search(start, judge, STEPS, again=False)
    best = max(trials, key=lambda trial: trial["map_at_10"])["settings"]
    return {} if best == start else told(best)


def measure(runs: Runs, searched: bool, regime: str) -> dict[str, list[dict[str, Any]]]:
    """Runs over the seeds by column: methods, and `full` and `fedss` at their best."""
    seeds = SEEDS[:1] if regime in LONG else SEEDS
    columns = {m: [runs(regime, m, seed) for seed in seeds] for m in METHODS}
    for method in SEARCHED if searched else ():
        best = at_best(runs, regime, method)
        columns[f"best {method}"] = [runs(regime, method, seed, **best) for seed in seeds]
    return columns


def mean(runs: Sequence[Mapping[str, Any]]) -> float:
    """MAP@10, over seeds."""
    return fmean(run["map_at_10"] for run in runs)


def bars(results: Mapping[str, Mapping[str, list[dict[str, Any]]]]) -> Iterator[str]:
    """A line for each bar that is missed, among the regimes that were searched."""
    of: dict[str, list[float]] = {"full": [], "fedss": [], "moments": []}
    least = {"full": 0.92, "fedss": 0.93, "moments": 0.85}
    middle = {"full": 0.97, "fedss": 0.97, "moments": 0.95}
    for regime, columns in results.items():
        if "best full" not in columns:
            continue
        best = mean(columns["best full"])
        for method in of:
            run = columns[method][0]
            share = run["settings"]["sample_size"] / run["classes"]
            if method == "fedss" and share > 0.25:
                continue
            of[method].append(ratio := mean(columns[method]) / best)
            if ratio < least[method]:
                yield f"{regime}: {method} at {ratio:.2f} of the best full, bar {least[method]}"
    for method, ratios in of.items():
        if ratios and median(ratios) < middle[method]:
            found = f"{median(ratios):.3f} of the best full in the median"
            yield f"{method}: {found}, bar {middle[method]}"


HEADINGS = (*METHODS, *(f"best {method}" for method in SEARCHED))


def line(regime: str, columns: Mapping[str, list[dict[str, Any]]]) -> str:
    """A row of the table."""
    cells = "".join(
        f"{mean(columns[name]):>12.3f}" if name in columns else f"{'':>12}" for name in HEADINGS
    )
    width = fmean(b - a for run in columns["full"] for a, b in [run["map_at_10_interval"]]) / 2
    row = f"{regime:<48}{cells}{width:>8.3f}"
    if "best full" in columns:
        best = mean(columns["best full"])
        row += "".join(f"{mean(columns[m]) / best:>8.2f}" for m in ("full", "fedss", "moments"))
    return row


def main() -> int:
    parser = common.parser(__doc__, short="one regime")
    parser.add_argument("--omniglot", type=Path, help="folder with the Omniglot archives")
    parser.add_argument("--hanzi", type=Path, help="manifest of the Chinese characters")
    parser.add_argument("--photos", type=Path, help="manifest of photographs")
    parser.add_argument("--out", type=Path, default=Path("runs/regimes"), help="run folders")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="regimes side by side")
    parser.add_argument("--only", default="", help="regimes whose names have this text")
    parser.add_argument("--defaults", action="store_true", help="no search")
    parser.add_argument("--check", action="store_true", help="two regimes; 1 if a bar is missed")
    options = parser.parse_args()
    paths = {"omniglot": options.omniglot, "hanzi": options.hanzi, "photos": options.photos}
    if options.hanzi:
        few = options.out / "hanzi-1000.csv"
        paths["hanzi of 1,000"] = fewer_classes(options.hanzi, 1000, few)
    chosen = [
        name
        for name, settings in REGIMES.items()
        if options.only in name
        and (
            name in CHECKED[: 1 if options.short else None]
            if options.check or options.short
            else settings["data"] == "glyphs" or paths.get(settings["data"])
        )
    ]
    part = options.check or options.short
    # What is short comes first.
    chosen.sort(key=LONG.__contains__)
    keep = None if part else common.RESULTS / "regimes.json"
    runs = Runs(options.out, paths, keep)
    report = common.Report(
        "What auto gives against a search, in many regimes: MAP@10 on unseen classes",
        command="python benchmarks/regimes.py --omniglot DIR --hanzi hanzi.csv --photos photos.csv",
    )
    report.add(
        f"Means of seeds {', '.join(map(str, SEEDS))}. '±': half of full's 95 % interval over test",
        "classes, mean of seeds. The last columns: full, fedss, moments against the best full.",
        "",
        f"{'':<48}{''.join(f'{name:>12}' for name in HEADINGS)}{'±':>8}"
        f"{'full':>8}{'fedss':>8}{'moments':>8}",
    )
    results = {}
    with ThreadPoolExecutor(options.jobs) as pool:
        work = partial(measure, runs, not options.defaults)
        for name, columns in zip(chosen, pool.map(work, chosen), strict=True):
            results[name] = columns
            report.add(line(name, columns))
    missed = list(bars(results))
    report.add("", *(missed or ["every bar is met"]))
    report.write(unless=part or options.only)
    return int(bool(options.check and missed))


if __name__ == "__main__":
    raise SystemExit(main())
