"""A plain loop: a module, torch.optim.SGD and a mean, as a first version would be written."""

import sys
from pathlib import Path

import numpy as np
import torch
from job import BATCH, LR, SCALE, finish, read_job, turns
from network import loss, network, scaled

job = read_job(Path(sys.argv[1]))
torch.set_num_threads(1)
model, turn = network(job.theta), turns()
state = {name: value.clone() for name, value in model.state_dict().items()}
W = torch.from_numpy(job.rows)
for round, cohort in enumerate(job.cohorts.tolist()):
    turn()
    mean = {name: torch.zeros_like(value) for name, value in state.items()}
    changes = []
    for k, client in enumerate(cohort):
        labels, log_q, ids = job.labels[client], torch.zeros(1), torch.arange(len(W))
        if job.samples is not None and job.log_q is not None:
            labels = np.searchsorted(job.samples[round, k], labels)
            ids, log_q = map(torch.from_numpy, (job.samples[round, k], job.log_q[round, k]))
        model.load_state_dict(state)
        rows = W[ids].requires_grad_()
        optimizer = torch.optim.SGD([*model.parameters(), rows], lr=LR)
        for batch in job.orders[round, k].reshape(-1, BATCH):
            optimizer.zero_grad()
            h = model(scaled(job.pixels[client, batch]))
            loss(h, rows, torch.from_numpy(labels[batch]), log_q, SCALE).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        for name, value in model.state_dict().items():
            mean[name] += value / len(cohort)
        changes.append((ids, (rows.detach() - W[ids]) / len(cohort)))
    state = mean
    for ids, change in changes:
        W.index_add_(0, ids, change)
turn()
model.load_state_dict(state)
theta = torch.nn.utils.parameters_to_vector(model.parameters())
finish(job, theta.detach().numpy(), W.numpy())
