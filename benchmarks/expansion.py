"""What query expansion adds at search time: MAP@10 and R@1 of finished runs, plain and expanded.

    python benchmarks/expansion.py RUN ...     (a minute each)

Each RUN is a folder of ``fedss train`` whose images are there; it is judged on the images that it
was tested with, each searched among the others. ``expand k``: each query is moved towards the k
images that it finds first (``fedss search --expand k``). Below the gain over plain stands its 95 %
interval over test classes. No run was trained or chosen for this.

Writes ``benchmarks/results/expansion.txt``.
"""

import argparse
import json
from pathlib import Path

import common
import numpy as np
import torch
from torch import Tensor

import fedss
from fedss.config import config_from_dict
from fedss.evaluation.expansion import expand_queries
from fedss.evaluation.intervals import ClassScores, difference
from fedss.models import embed_pixels
from fedss.training.build import evaluation_task, load_data

COUNTS, DEPTH = (0, 1, 2, 3, 5), 10


def scores(query_QD: Tensor, gallery_ND: Tensor, labels_N: np.ndarray) -> tuple[ClassScores, float]:
    """AP@10 by class, and R@1, of queries that are the gallery's images, moved or not."""
    _, found_QK = fedss.nearest(query_QD, gallery_ND, DEPTH + 1)
    other_QK = found_QK.numpy() != np.arange(len(labels_N))[:, None]
    # A query that did not find itself has one too many.
    other_QK &= other_QK.cumsum(1) <= DEPTH
    right_QK = (labels_N[found_QK.numpy()] == labels_N[:, None]) & other_QK
    rank_QK = other_QK.cumsum(1)
    classes, place_N, counts_C = np.unique(labels_N, return_inverse=True, return_counts=True)
    relevant_N = np.minimum(counts_C[place_N] - 1, DEPTH)
    precision_QK = right_QK.cumsum(1) / np.maximum(rank_QK, 1)
    average_N = (precision_QK * right_QK).sum(1) / np.maximum(relevant_N, 1)
    used_N = relevant_N > 0
    queries_C = np.bincount(place_N[used_N], minlength=len(classes))
    sums_C = np.bincount(place_N[used_N], average_N[used_N], minlength=len(classes))
    kept_C = queries_C > 0
    names = tuple(str(c) for c in classes[kept_C])
    first = float((right_QK & (rank_QK == 1)).any(1)[used_N].mean())
    return ClassScores(names, queries_C[kept_C], sums_C[kept_C] / queries_C[kept_C]), first


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder")
    options = parser.parse_args()
    report = common.Report(
        "Query expansion at search time", command="python benchmarks/expansion.py RUN ..."
    )
    heads = "".join(f"{f'expand {count}' if count else 'plain':>22}" for count in COUNTS)
    report.add(f"{'MAP@10 / R@1':<24}{heads}")
    torch.set_num_threads(2)
    for run in options.runs:
        told = json.loads((run / "config.json").read_text())
        config = config_from_dict({**told["config"], **told["resolved"]})
        task = evaluation_task(config, load_data(config))
        assert task.gallery is None
        gallery_ND = embed_pixels(fedss.load(run), task.query.pixels)
        labels_N = np.asarray(task.query.labels)
        found = [
            scores(expand_queries(gallery_ND, gallery_ND, count), gallery_ND, labels_N)
            if count
            else scores(gallery_ND, gallery_ND, labels_N)
            for count in COUNTS
        ]
        cells = "".join(f"{f'{s.map_at_10:.3f} / {first:.3f}':>22}" for s, first in found)
        gains = [difference([s], [found[0][0]], paired=True) for s, _ in found[1:]]
        ends = "".join(f"{f'{g.low:+.3f} to {g.high:+.3f}':>22}" for g in gains if g)
        name = f"{told['data']['name'][:9]}, {told['data']['test_classes']:,} classes"
        report.add(f"{name:<24}{cells}", f"{'':<24}{'':>22}{ends}")
    report.write()


if __name__ == "__main__":
    main()
