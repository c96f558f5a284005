"""fedss as its users run it: a configuration, a module of their own, fedss.train."""

import sys
import tempfile
from pathlib import Path

import numpy as np
from job import CLIENTS, PICTURES, finish, read_job, turns
from network import network

import fedss
from fedss.checkpoint import load_checkpoint

job = read_job(Path(sys.argv[1]))
names = [str(i) for i in range(len(job.rows))]
images = fedss.Images(
    job.pixels.reshape(-1, 1, 28, 28),
    job.labels.reshape(-1),
    np.repeat(np.arange(CLIENTS), PICTURES),
    names,
    [str(k) for k in range(CLIENTS)],
    [str(i) for i in range(CLIENTS * PICTURES)],
)
# The test set is not part of the job: as small as one can be.
few = fedss.Images(
    images.pixels[:2], images.labels[:2] * 0, images.clients[:2] * 0, ["?"], ["?"], ["a", "b"]
)
data = fedss.Dataset("common job", images, fedss.RetrievalTask(few))
turn = turns()
turn()
with tempfile.TemporaryDirectory() as folder:
    config = fedss.Config(**job.settings["config"], workers=int(sys.argv[2]))
    run = fedss.train(
        config, folder, data=data, backbone=network(job.theta), on_round=lambda _: turn()
    )
    state = load_checkpoint(Path(folder) / "checkpoint")
    finish(job, state.backbone_P.numpy(), state.class_rows.weight_ND.numpy())
