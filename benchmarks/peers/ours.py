"""fedss as its users run it: a configuration, a module of their own, fedss.train."""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from job import CLIENTS, DIM, IMAGES, Job, finish, read_job, turns
from network import network

import fedss
from fedss.core.class_rows import create_class_rows, read
from fedss.runs.checkpoint import load_checkpoint


def dataset(job: Job) -> fedss.Dataset:
    """The job's images. A test set is not part of it: here it is as small as one can be."""
    images = fedss.Images(
        job.pixels.reshape(-1, 1, 28, 28),
        job.labels.reshape(-1),
        np.repeat(np.arange(CLIENTS), IMAGES),
        [str(i) for i in range(len(job.rows))],
        [str(k) for k in range(CLIENTS)],
        [str(i) for i in range(CLIENTS * IMAGES)],
    )
    # A test of one class would be refused.
    few = fedss.Images(
        images.pixels[:4],
        np.array([0, 0, 1, 1]),
        np.zeros(4, np.int64),
        ["a", "b"],
        ["?"],
        [*"1234"],
    )
    return fedss.Dataset("common job", images, fedss.RetrievalTask(few))


def main() -> None:
    job = read_job(Path(sys.argv[1]))
    data, config = dataset(job), fedss.Config(**job.settings, workers=int(sys.argv[2]))
    turn = turns()
    turn()
    with tempfile.TemporaryDirectory() as folder:
        fedss.train(
            config, folder, data=data, backbone=network(job.theta), on_round=lambda _: turn()
        )
        rows = create_class_rows(len(job.rows), DIM, (), config.seed)
        state = load_checkpoint(Path(folder) / "checkpoint", rows)
        assert state is not None
        W = read(state.class_rows, torch.arange(len(job.rows)))[0]
        finish(job, state.backbone_P.numpy(), W.numpy())


if __name__ == "__main__":
    main()
