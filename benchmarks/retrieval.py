"""Retrieval at the size of Stanford Online Products' test set, against the peers its users take.

    pip install "fedss[peer-retrieval]"
    python benchmarks/retrieval.py                    (full size, minutes; --short: seconds)

Ours: `fedss.evaluate_retrieval`. Theirs: faiss-cpu's IndexFlatIP under pytorch-metric-learning's
AccuracyCalculator. Each run is a process of its own, ours and theirs in turn, on the same made-up
embeddings; it is measured after a small warm-up, without imports and the making of the data. Peak
memory is that of the whole process. The metrics of all three (the third is a plain loop over
neighbours that faiss found) must agree to 1e-6.

Writes ``benchmarks/results/retrieval.txt`` (not with fewer rows).
"""

import argparse
import os
import statistics
from collections.abc import Callable
from typing import Any

import common
import torch
from torch import Tensor

import fedss

ROWS, CLASSES = 60_502, 11_316
SHARED = ("recall_at_1", "map_at_r")


def ours(rows: Tensor, labels: Tensor) -> dict[str, float]:
    return vars(fedss.evaluate_retrieval(rows, labels))


def theirs(rows: Tensor, labels: Tensor) -> dict[str, float]:
    import faiss
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
    from pytorch_metric_learning.utils.inference import FaissKNN

    calculator = AccuracyCalculator(
        include=("precision_at_1", "mean_average_precision_at_r"),
        k="max_bin_count",
        device=torch.device("cpu"),
        knn_func=FaissKNN(index_init_fn=faiss.IndexFlatIP),
    )
    metrics = calculator.get_accuracy(torch.nn.functional.normalize(rows), labels)
    return {
        "recall_at_1": metrics["precision_at_1"],
        "map_at_r": metrics["mean_average_precision_at_r"],
    }


def loop(rows: Tensor, labels: Tensor) -> dict[str, float]:
    """Every metric by its definition, one query after another."""
    import faiss

    unit = torch.nn.functional.normalize(rows).numpy()
    index = faiss.IndexFlatIP(common.DIM)
    index.add(unit)
    sizes = labels.bincount().tolist()
    _, nearest = index.search(unit, max(*sizes, 11))
    label_of = labels.tolist()
    sums = dict.fromkeys(("recall_at_1", "recall_at_5", "map_at_10", "map_at_r"), 0.0)
    for query, (label, neighbours) in enumerate(zip(label_of, nearest.tolist(), strict=True)):
        others = [item for item in neighbours if item != query][: len(neighbours) - 1]
        right = [label_of[item] == label for item in others]
        total = sizes[label] - 1
        at_10 = at_r = 0.0
        hits = 0
        for place, is_right in enumerate(right, 1):
            hits += is_right
            if is_right and place <= 10:
                at_10 += hits / place
            if is_right and place <= total:
                at_r += hits / place
        sums["recall_at_1"] += right[0]
        sums["recall_at_5"] += any(right[:5])
        sums["map_at_10"] += at_10 / min(total, 10)
        sums["map_at_r"] += at_r / total
    return {name: value / len(rows) for name, value in sums.items()}


SIDES: dict[str, Callable[[Tensor, Tensor], dict[str, float]]] = {
    "fedss": ours,
    "faiss + pml": theirs,
    "loop": loop,
}


def measure(side: str, rows: int, device: str) -> dict[str, Any]:
    embeddings, labels = (t.to(device) for t in common.random_embeddings(rows))
    SIDES[side](*(t.to(device) for t in common.random_embeddings(1000)))
    before = common.peak_megabytes()
    metrics, spent = common.timed(lambda: SIDES[side](embeddings, labels))
    return {
        "metrics": metrics,
        "wall": spent.wall,
        "cpu": spent.cpu,
        "before": before,
        "peak": common.peak_megabytes(),
        "device_peak": torch.cuda.max_memory_allocated() / 1e6 if device == "cuda" else 0.0,
    }


def run_side(side: str, options: argparse.Namespace) -> dict[str, Any]:
    device = options.device if side == "fedss" else "cpu"
    result = common.in_own_process("measure", side, options.rows, device, threads=options.threads)
    print(
        f"{side:<12} wall {result['wall']:6.2f} s  CPU {result['cpu']:6.2f} s  "
        f"peak {result['peak']:5.0f} MB",
        flush=True,
    )
    return result


def table(runs: dict[str, list[dict[str, Any]]]) -> list[str]:
    lines = [
        f"{'':<12} {'wall s':>7} {'from':>6} {'to':>6} {'CPU s':>7} {'peak MB':>8} {'before':>7}"
    ]
    for side in ("fedss", "faiss + pml"):
        wall = [run["wall"] for run in runs[side]]
        cpu, peak, before = (
            statistics.median(run[key] for run in runs[side]) for key in ("cpu", "peak", "before")
        )
        lines.append(
            f"{side:<12} {statistics.median(wall):>7.2f} {min(wall):>6.2f} {max(wall):>6.2f} "
            f"{cpu:>7.2f} {peak:>8.0f} {before:>7.0f}"
        )
    ours, theirs = runs["fedss"], runs["faiss + pml"]
    ratios = [
        common.median_ratio([run[key] for run in theirs], [run[key] for run in ours])
        for key in ("wall", "cpu", "peak")
    ]
    lines += [
        f"theirs/ours  wall {ratios[0]:.2f}   CPU {ratios[1]:.2f}   peak memory {ratios[2]:.2f}"
        "   (medians of the pairs)",
        "'before' is the peak of the process before the evaluation: torch, the data, a warm-up.",
    ]
    if device_peak := ours[0]["device_peak"]:
        lines.append(f"device memory of ours: {device_peak:.0f} MB at most")
    lines += ["", f"{'metric':<12} {'fedss':>12} {'faiss + pml':>12} {'faiss + loop':>12}"]
    for name, value in runs["loop"][0]["metrics"].items():
        shared = theirs[0]["metrics"].get(name)
        lines.append(
            f"{name:<12} {ours[0]['metrics'][name]:>12.8f} "
            f"{'-' if shared is None else f'{shared:.8f}':>12} {value:>12.8f}"
        )
    return lines


def check(runs: dict[str, list[dict[str, Any]]]) -> None:
    """All agree to 1e-6, and each with itself exactly."""
    expected = runs["loop"][0]["metrics"]
    for side, names in (("fedss", tuple(expected)), ("faiss + pml", SHARED)):
        for run in runs[side]:
            if run["metrics"] != runs[side][0]["metrics"]:
                raise SystemExit(f"{side} gave different metrics in two runs: {runs[side]}")
            for name in names:
                if abs(run["metrics"][name] - expected[name]) > 1e-6:
                    raise SystemExit(f"{name}: {side} {run['metrics'][name]}, {expected[name]}")


def main() -> None:
    parser = common.parser(__doc__, short="10,000 rows, one run, no file")
    parser.add_argument("--rows", type=int, default=ROWS, help="embeddings, at least 1000")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each process")
    parser.add_argument("--repeats", type=int, default=3, help="runs of either side")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="of our side")
    options = parser.parse_args()
    if options.short:
        options.rows, options.repeats = 10_000, 1
    report = common.Report(
        "Retrieval: our evaluation against faiss-cpu and pytorch-metric-learning",
        ["faiss-cpu", "pytorch-metric-learning"],
        hardware=torch.cuda.get_device_name() if options.device == "cuda" else "no GPU",
    )
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for _ in range(options.repeats):
        for side in ("fedss", "faiss + pml"):
            runs[side].append(run_side(side, options))
    runs["loop"].append(run_side("loop", options))
    check(runs)
    report.add(
        f"{options.rows:,} random embeddings, d = {common.DIM}, in classes of 2 to 12, each",
        "searched among all the others. (The test set of Stanford Online Products has "
        f"{ROWS:,} in {CLASSES:,}.)",
        "Theirs: IndexFlatIP under AccuracyCalculator (precision_at_1,",
        "mean_average_precision_at_r). Ours: R@1, R@5, MAP@10, MAP@R. Runs in turn,",
        f"{options.repeats} of each, every run a process; threads: {options.threads}. Medians, and",
        "the span of wall times.",
        "",
        *table(runs),
    )
    report.write(unless=options.rows != ROWS)


if __name__ == "__main__":
    common.run_script(main, measure=measure)
