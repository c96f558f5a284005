"""What verification, identification and confusions cost beside the evaluation and the run.

    pip install "fedss[test]"
    python benchmarks/verification.py --data-path DIR     (Omniglot's archives; --short: seconds)

Two jobs, each a process of its own:

- `omniglot`: a run of a few rounds on Omniglot, then what its end does on the 10,180 test images:
  `fedss.evaluation.task.findings`, part by part, in units of a round and of one evaluation.
- `many`: 60,000 made-up embeddings, d = 64, in classes of 2 to 12: 1.8e9 pairs.

And the same rates by scikit-learn's `roc_curve` from all pairs of 10,180 embeddings, which must
agree: to 1e-12 from cosines put on our grid, and to 1e-4 from float32 cosines as they are.

Writes ``benchmarks/results/verification.txt`` (not with ``--short``).
"""

import dataclasses
import os
import tempfile
from collections.abc import Callable
from typing import Any

import common
import numpy as np
import torch
from torch.nn import functional as F

from fedss import Config, evaluate_retrieval, train
from fedss.evaluation.confusions import hardest_confusions
from fedss.evaluation.task import embed_task, find_confused, find_neighbours, score, verify
from fedss.evaluation.verification import count_pairs, identification, verification
from fedss.models import embed_pixels
from fedss.training.build import evaluation_task
from fedss.training.experiment import load_together

FARS = (0.1, 0.01, 0.001, 0.0001)


def timed(work: Callable[[], common.T]) -> tuple[common.T, dict[str, float]]:
    result, spent = common.timed(work)
    return result, {**spent._asdict(), "peak": common.peak_megabytes()}


def omniglot(data_path: str, rounds: int) -> dict[str, Any]:
    config = Config(data="omniglot", data_path=data_path, rounds=rounds, eval_every=0)
    data = load_together(config)
    with tempfile.TemporaryDirectory() as folder:
        run = train(config, folder, data=data, on_round=lambda record: None)
    task = evaluation_task(config, data)
    spent = {}
    pair, spent["embed"] = timed(
        lambda: embed_task(lambda pixels: embed_pixels(run.embedder, pixels), task)
    )
    metrics, spent["retrieval figures"] = timed(lambda: score(task, *pair))
    _, spent["panels"] = timed(lambda: find_neighbours(task, pair, 0))
    _, spent["confusions"] = timed(lambda: find_confused(task, pair))
    result, spent["verification and identification"] = timed(lambda: verify(task, pair, 0))
    phases = run.summary["seconds_by_phase"]
    spent["a round"] = {
        "wall": (run.summary["seconds"] - phases["evaluate"]) / config.rounds,
        "cpu": float("nan"),
        "peak": float("nan"),
    }
    assert result is not None
    return {"spent": spent, "map_at_10": metrics.map_at_10, "found": dataclasses.asdict(result)}


def many(count: int) -> dict[str, Any]:
    rows, labels = common.random_embeddings(count)
    small = common.random_embeddings(1000)
    count_pairs(*small), evaluate_retrieval(*small)
    spent = {}
    before = common.peak_megabytes()
    _, spent["retrieval figures"] = timed(lambda: evaluate_retrieval(rows, labels))
    pairs, spent["pairs counted"] = timed(lambda: count_pairs(rows, labels))
    rates, spent["rates of them"] = timed(lambda: verification(pairs))
    known, spent["identification, 10 draws"] = timed(lambda: identification(rows, labels))
    _, spent["confusions"] = timed(lambda: hardest_confusions(rows, labels))
    assert known is not None
    return {
        "spent": spent,
        "before": before,
        "pairs": rates.genuine + rates.impostor,
        "eer": rates.eer,
        "dir": known.dir,
    }


def ours(count: int) -> dict[str, Any]:
    rows, labels = common.random_embeddings(count)
    count_pairs(*common.random_embeddings(1000))
    rates, spent = timed(lambda: verification(count_pairs(rows, labels), FARS))
    return {"spent": spent, "tar": [point.tar for point in rates.points], "eer": rates.eer}


def theirs(count: int, on_grid: bool = False) -> dict[str, Any]:
    from sklearn.metrics import roc_curve

    rows, labels = common.random_embeddings(count)
    unit = F.normalize(rows.double(), dim=1)
    unit = (unit * 2**24).round() / 2**24 if on_grid else unit.float()

    def rates() -> tuple[np.ndarray, np.ndarray]:
        first, second = torch.triu_indices(len(rows), len(rows), 1)
        cosine = (unit @ unit.T)[first, second]
        if on_grid:
            cosine = ((cosine + 1) * 2**16).floor()
        same = labels[first] == labels[second]
        far, tar, _ = roc_curve(same.numpy(), cosine.numpy(), drop_intermediate=False)
        return far, tar

    (far, tar), spent = timed(rates)
    after = int((far >= 1 - tar).argmax())
    gap = far - (1 - tar)
    along = -gap[after - 1] / (gap[after] - gap[after - 1])
    return {
        "spent": spent,
        "tar": [float(tar[far <= limit].max()) for limit in FARS],
        "eer": float(far[after - 1] + along * (far[after] - far[after - 1])),
    }


def table(spent: dict[str, dict[str, float]], unit: str) -> list[str]:
    head = f"{'':<34} {'wall s':>7} {'CPU s':>7} {'peak MB':>8} {'/ ' + unit:>20}"
    return [head] + [
        f"{name:<34} {part['wall']:>7.2f} {part['cpu']:>7.2f} {part['peak']:>8.0f} "
        f"{part['wall'] / spent[unit]['wall']:>20.2f}".replace("    nan", "      -")
        for name, part in spent.items()
    ]


def omniglot_table(run: dict[str, Any], rounds: int) -> list[str]:
    spent = run["spent"]
    names = ("panels", "confusions", "verification and identification")
    extra = sum(spent[name]["wall"] for name in names)
    return [
        f"Omniglot, a run of {rounds} rounds with the defaults, then its end:",
        *table(spent, "a round"),
        f"all three of the end: {extra:.2f} s, "
        f"{extra / (120 * spent['a round']['wall']):.2%} of 120 such rounds",
        "",
    ]


def rates_table(sides: dict[str, dict[str, Any]]) -> list[str]:
    lines = [
        f"{'':<26} {'wall s':>7} {'CPU s':>7} {'peak MB':>8} {'EER':>12} "
        + " ".join(f"{f'TAR {far:g}':>12}" for far in FARS)
    ]
    for name, side in sides.items():
        figures = " ".join(f"{value:>12.9f}" for value in (side["eer"], *side["tar"]))
        spent = side["spent"]
        lines.append(
            f"{name:<26} {spent['wall']:>7.2f} {spent['cpu']:>7.2f} {spent['peak']:>8.0f} {figures}"
        )
    return lines


def check(results: dict[str, dict[str, Any]]) -> None:
    for side, most in (("scikit-learn on the grid", 1e-12), ("scikit-learn", 1e-4)):
        ours, theirs = ([results[name]["eer"], *results[name]["tar"]] for name in ("ours", side))
        if max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) > most:
            raise SystemExit(f"{side}: {theirs}, ours: {ours}")


def main() -> None:
    parser = common.parser(__doc__, short="few rows, no file")
    parser.add_argument("--data-path", help="folder with the Omniglot archives; none: no such job")
    parser.add_argument("--rows", type=int, default=60_000, help="random embeddings")
    parser.add_argument("--small", type=int, default=10_180, help="those for scikit-learn")
    parser.add_argument("--rounds", type=int, default=10, help="of the run on Omniglot")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each process")
    options = parser.parse_args()
    if options.short:
        options.rows, options.small, options.rounds = 8_000, 2_000, 2
    path = "" if options.data_path is None else " --data-path DIR"
    report = common.Report(
        "Verification, identification and confusions: what they cost",
        ["scikit-learn"],
        command=f"python benchmarks/verification.py{path} --threads {options.threads}",
        hardware=f"load before: {os.getloadavg()[0]:.1f}",
    )

    def run_job(job: str, *args: object) -> dict[str, Any]:
        return common.in_own_process(job, *args, threads=options.threads)

    report.add("Peak memory is that of the process so far.", "")
    if options.data_path:
        run = run_job("omniglot", options.data_path, options.rounds)
        report.add(*omniglot_table(run, options.rounds))
    run = run_job("many", options.rows)
    report.add(
        f"{options.rows:,} random embeddings, d = 64: {run['pairs']:,} pairs",
        *table(run["spent"], "retrieval figures"),
        f"peak before: {run['before']:.0f} MB",
        "",
        f"{options.small:,} random embeddings, all pairs, rates only:",
    )
    sides = {
        "ours": run_job("ours", options.small),
        "scikit-learn on the grid": run_job("theirs", options.small, True),
        "scikit-learn": run_job("theirs", options.small),
    }
    check(sides)
    report.add(*rates_table(sides))
    report.write(unless=options.short)


if __name__ == "__main__":
    common.run_script(main, omniglot=omniglot, many=many, ours=ours, theirs=theirs)
