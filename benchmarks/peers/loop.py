"""The best loop that we could write by hand for this one job: the ceiling for a library.

Threads of one torch thread and one model each; channels_last, with one channel too; pooling before
ReLU; one call for all gradients, no ``.grad``; freed memory is kept; images are scaled once.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import torch
from job import BATCH, LR, SCALE, finish, keep_freed_memory, read_job, turns
from network import channels_last, loss, network, scaled
from torch import Tensor, nn

Change = tuple[list[Tensor], Tensor | slice, Tensor]


def pools_first(model: nn.Sequential) -> nn.Sequential:
    layers = list(model)
    for i in range(2, 16, 4):
        layers[i : i + 2] = [layers[i + 1], nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def main() -> None:
    job, threads = read_job(Path(sys.argv[1])), int(sys.argv[2])
    keep_freed_memory()
    torch.set_num_threads(1)
    models: SimpleQueue[nn.Sequential] = SimpleQueue()
    for _ in range(threads):
        models.put(pools_first(network(job.theta)))
    theta = [p.detach() for p in network(job.theta).parameters()]
    W, images = torch.from_numpy(job.rows), scaled(job.pixels)

    def train(round: int, k: int, client: int) -> Change:
        labels, log_q = job.labels[client], torch.zeros(1)
        ids: Tensor | slice = slice(None)
        if job.samples is not None and job.log_q is not None:
            labels = np.searchsorted(job.samples[round, k], labels)
            ids, log_q = map(torch.from_numpy, (job.samples[round, k], job.log_q[round, k]))
        order = torch.from_numpy(job.orders[round, k])
        x, target, start = images[client][order], torch.from_numpy(labels)[order], W[ids]
        rows = start.clone().requires_grad_()
        model = models.get()
        parameters: list[Tensor] = list(model.parameters())
        with torch.no_grad():
            torch._foreach_copy_(parameters, theta)
        for i in range(0, len(x), BATCH):
            h = model(channels_last(x[i : i + BATCH]))
            value = loss(h, rows, target[i : i + BATCH], log_q, SCALE)
            gradients = torch.autograd.grad(value, [*parameters, rows])
            with torch.no_grad():
                torch._foreach_add_([*parameters, rows], gradients, alpha=-LR)
        with torch.no_grad():
            changes = torch._foreach_sub(parameters, theta)
        models.put(model)
        return list(changes), ids, rows.detach().sub_(start)

    turn = turns()
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for round, cohort in enumerate(job.cohorts.tolist()):
            turn()
            numbers = range(len(cohort))
            for changes, ids, change in list(
                pool.map(train, [round] * len(cohort), numbers, cohort)
            ):
                torch._foreach_add_(theta, changes, alpha=1 / len(cohort))
                if isinstance(ids, slice):
                    W.add_(change, alpha=1 / len(cohort))
                else:
                    W.index_add_(0, ids, change, alpha=1 / len(cohort))
        turn()
    finish(job, torch.cat([p.reshape(-1) for p in theta]).numpy(), W.numpy())


main()
