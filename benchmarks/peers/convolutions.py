"""The floor: the job's convolutions alone, forward and backward, as often as a round has them."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from job import BATCH, BLOCKS, COHORT, IMAGES, WIDTH, finish, keep_freed_memory, read_job, turns
from torch import Tensor, nn


def one_client(_: int) -> None:
    for _ in range(IMAGES // BATCH):
        for convolution, x, gradient in LAYERS:
            wanted: list[Tensor] = [*convolution.parameters(), *([x] if x.requires_grad else [])]
            torch.autograd.grad(convolution(x), wanted, gradient)


job, threads = read_job(Path(sys.argv[1])), int(sys.argv[2])
keep_freed_memory()
torch.set_num_threads(1)
LAYERS = []
for block in range(BLOCKS):
    side, channels = 28 >> block, WIDTH if block else 1
    convolution = nn.Conv2d(channels, WIDTH, 3, padding=1)
    x = torch.rand(BATCH, side, side, channels).permute(0, 3, 1, 2).requires_grad_(block > 0)
    LAYERS.append((convolution, x, torch.rand_like(convolution(x))))
turn = turns()
with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
    for _ in job.cohorts:
        turn()
        list(pool.map(one_client, range(COHORT)))
    turn()
finish(job, job.theta, job.rows)
