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
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from omniglot import processor
from torch import Tensor

import fedss

RESULTS = Path(__file__).parent / "results" / "retrieval.txt"
ROWS, CLASSES, DIMENSIONS, SEED = 60_502, 11_316, 64, 0
PEERS = "'fedss[peer-retrieval]'"
SHARED = ("recall_at_1", "map_at_r")


def made_up(rows: int) -> tuple[Tensor, Tensor]:
    """Embeddings [rows, 64] and labels: classes of 2 to 12 pictures, 5.35 on average."""
    generator = torch.Generator().manual_seed(SEED)
    classes = max(1, rows * CLASSES // ROWS)
    more = torch.randperm(10 * classes, generator=generator)[: rows - 2 * classes]
    labels = torch.cat([torch.arange(2 * classes), more]) % classes
    labels = labels[torch.randperm(rows, generator=generator)]
    centres = torch.randn(classes, DIMENSIONS, generator=generator)
    return centres[labels] + torch.randn(rows, DIMENSIONS, generator=generator), labels


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
    found = calculator.get_accuracy(torch.nn.functional.normalize(rows), labels)
    return {
        "recall_at_1": found["precision_at_1"],
        "map_at_r": found["mean_average_precision_at_r"],
    }


def loop(rows: Tensor, labels: Tensor) -> dict[str, float]:
    """Every metric by its definition, one query after another."""
    import faiss

    unit = torch.nn.functional.normalize(rows).numpy()
    index = faiss.IndexFlatIP(DIMENSIONS)
    index.add(unit)
    sizes = labels.bincount().tolist()
    _, found = index.search(unit, max(*sizes, 11))
    label_of = labels.tolist()
    sums = dict.fromkeys(("recall_at_1", "recall_at_5", "map_at_10", "map_at_r"), 0.0)
    for query, (label, neighbours) in enumerate(zip(label_of, found.tolist(), strict=True)):
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
    embeddings, labels = (t.to(device) for t in made_up(rows))
    SIDES[side](*(t.to(device) for t in made_up(1000)))
    before = peak_megabytes()
    wall, cpu = time.perf_counter(), time.process_time()
    metrics = SIDES[side](embeddings, labels)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {
        "metrics": metrics,
        "wall": wall,
        "cpu": cpu,
        "before": before,
        "peak": peak_megabytes(),
        "device_peak": torch.cuda.max_memory_allocated() / 1e6 if device == "cuda" else 0.0,
        "device_name": torch.cuda.get_device_name() if device == "cuda" else "",
    }


def peak_megabytes() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def in_own_process(side: str, options: argparse.Namespace) -> dict[str, Any]:
    device = options.device if side == "fedss" else "cpu"
    words = [sys.executable, __file__, "--rows", str(options.rows), "--side", side]
    threads = str(options.threads)
    done = subprocess.run(
        [*words, "--device", device, "--threads", threads],
        env={**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{side} failed")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(
        f"{side:<12} wall {found['wall']:6.2f} s  CPU {found['cpu']:6.2f} s  "
        f"peak {found['peak']:5.0f} MB",
        flush=True,
    )
    return found


def text(options: argparse.Namespace, runs: dict[str, list[dict[str, Any]]]) -> str:
    device = runs["fedss"][0]["device_name"] or "no GPU"
    lines = [
        "Retrieval: our evaluation against faiss-cpu and pytorch-metric-learning",
        f"command   python benchmarks/retrieval.py --rows {options.rows} --threads "
        f"{options.threads} --repeats {options.repeats} --device {options.device}",
        f"date      {datetime.date.today().isoformat()}",
        f"hardware  {processor()}, {os.cpu_count()} cores, {device}",
        f"software  fedss {version('fedss')}, torch {version('torch')}, faiss-cpu "
        f"{version('faiss-cpu')}, pytorch-metric-learning {version('pytorch-metric-learning')},",
        f"          numpy {version('numpy')}, Python {platform.python_version()}",
        "",
        f"{options.rows:,} made-up embeddings, d = {DIMENSIONS}, in classes of 2 to 12, each",
        "searched among all the others. (The test set of Stanford Online Products has "
        f"{ROWS:,} in {CLASSES:,}.)",
        "Theirs: IndexFlatIP under AccuracyCalculator (precision_at_1,",
        "mean_average_precision_at_r). Ours: R@1, R@5, MAP@10, MAP@R. Runs in turn,",
        f"{options.repeats} of each, every run a process; threads: {options.threads}. Medians, and",
        "the span of wall times.",
        "",
        f"{'':<12} {'wall s':>7} {'from':>6} {'to':>6} {'CPU s':>7} {'peak MB':>8} {'before':>7}",
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
    ratios = [
        statistics.median(
            there[key] / here[key]
            for here, there in zip(runs["fedss"], runs["faiss + pml"], strict=True)
        )
        for key in ("wall", "cpu", "peak")
    ]
    lines += [
        f"theirs/ours  wall {ratios[0]:.2f}   CPU {ratios[1]:.2f}   peak memory {ratios[2]:.2f}"
        "   (medians of the pairs)",
        "'before' is the peak of the process before the evaluation: torch, the data, a warm-up.",
    ]
    if options.device == "cuda":
        lines.append(f"device memory of ours: {runs['fedss'][0]['device_peak']:.0f} MB at most")
    lines += ["", f"{'metric':<12} {'fedss':>12} {'faiss + pml':>12} {'faiss + loop':>12}"]
    for name, value in runs["loop"][0]["metrics"].items():
        there = runs["faiss + pml"][0]["metrics"].get(name)
        lines.append(
            f"{name:<12} {runs['fedss'][0]['metrics'][name]:>12.8f} "
            f"{'-' if there is None else f'{there:.8f}':>12} {value:>12.8f}"
        )
    return "\n".join(lines) + "\n"


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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=ROWS, help="embeddings, at least 1000")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each process")
    parser.add_argument("--repeats", type=int, default=3, help="runs of either side")
    parser.add_argument("--short", action="store_true", help="10,000 rows, one run, no file")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="of our side")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        torch.set_num_threads(options.threads)
        print(json.dumps(measure(options.side, options.rows, options.device)))
        return
    if options.short:
        options.rows, options.repeats = 10_000, 1
    try:
        version("faiss-cpu"), version("pytorch-metric-learning")
    except PackageNotFoundError as error:
        raise SystemExit(f"{error.name} is missing: pip install {PEERS}") from None
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for _ in range(options.repeats):
        for side in ("fedss", "faiss + pml"):
            runs[side].append(in_own_process(side, options))
    runs["loop"].append(in_own_process("loop", options))
    check(runs)
    print("\n" + text(options, runs))
    if options.rows == ROWS:
        RESULTS.write_text(text(options, runs))
        print(f"written to {RESULTS}")


if __name__ == "__main__":
    main()
