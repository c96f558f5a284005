"""The client of the common job in Flower: what its quickstart does, on the images it is told."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from job import BATCH, LR, SCALE, Job, keep_freed_memory, read_job
from network import channels_last, loss, network, scaled

client = ClientApp()
job_of, keep_once = cache(read_job), cache(keep_freed_memory)


@client.train()
def train(message: Message, context: Context) -> Message:
    told: Any = message.content["config"]
    sent: Any = message.content["arrays"]
    job: Job = job_of(Path(told["job"]))
    if told["tuned"]:
        keep_once()
    number = job.cohorts[told["round"], told["slot"]]
    state = sent.to_torch_state_dict()
    rows = torch.nn.Parameter(state.pop("rows"))
    model = network()
    model.load_state_dict(state)
    optimizer = torch.optim.SGD([*model.parameters(), rows], lr=LR)
    for batch in job.orders[told["round"], told["slot"]].reshape(-1, BATCH):
        optimizer.zero_grad()
        labels = torch.from_numpy(job.labels[number, batch])
        images = scaled(job.pixels[number, batch])
        h = model(channels_last(images) if told["tuned"] else images)
        loss(h, rows, labels, torch.zeros(1), SCALE).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    arrays = ArrayRecord({**model.state_dict(), "rows": rows.detach()})
    metrics = MetricRecord({"num-examples": job.orders.shape[2]})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)
