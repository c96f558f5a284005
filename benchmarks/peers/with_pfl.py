"""The common job in pfl-research (Apple), as its tutorials train a PyTorch model.

In one process, or in those that torchrun starts, as its documentation distributes a simulation;
``tuned``: with what fedss does to memory, which is no part of pfl-research.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from job import BATCH, COHORT, LR, SCALE, finish, keep_freed_memory, read_job, turns
from network import channels_last, loss, network, scaled
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn

RANK, RANKS = (int(os.environ.get(name, alone)) for name, alone in (("RANK", 0), ("WORLD_SIZE", 1)))
TUNED = sys.argv[3].endswith("-tuned")


class Model(nn.Module):
    def __init__(self, theta: Any, rows: Any) -> None:
        super().__init__()
        self.network, self.rows = network(theta), nn.Parameter(torch.from_numpy(rows))

    def loss(self, images: Tensor, labels: Tensor, eval: bool = False) -> Tensor:
        self.eval() if eval else self.train()
        images = channels_last(images) if TUNED else images
        return loss(self.network(images), self.rows, labels, torch.zeros(1), SCALE)

    def metrics(self, images: Tensor, labels: Tensor, eval: bool = False) -> dict[str, Any]:
        return {}


class Turns(TrainingProcessCallback):  # type: ignore[misc]
    """The first rank speaks and listens for all; the others wait until it goes on."""

    def __init__(self) -> None:
        self._turn = turns() if RANK == 0 else None

    def _wait(self) -> None:
        if self._turn:
            self._turn()
        if RANKS > 1:
            torch.distributed.barrier()

    def on_train_begin(self, *, model: Any) -> Metrics:
        self._wait()
        return Metrics()

    def after_central_iteration(self, *_: Any, **__: Any) -> tuple[bool, Metrics]:
        self._wait()
        return False, Metrics()


def main() -> None:
    if TUNED:
        keep_freed_memory()
    job = read_job(Path(sys.argv[1]))
    images, labels = scaled(job.pixels), torch.from_numpy(job.labels)
    clients, orders = job.cohorts.ravel(), job.orders.reshape(-1, job.orders.shape[2])

    def dataset(slot: int) -> Dataset:
        client, order = clients[slot], orders[slot]
        return Dataset([images[client, order], labels[client, order]], user_id=str(slot))

    slots = iter(range(len(clients)))
    model = Model(job.theta, job.rows)
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=len(job.cohorts),
            evaluation_frequency=10**9,
            train_cohort_size=COHORT,
            val_cohort_size=0,
        ),
        SimulatedBackend(FederatedDataset(dataset, lambda: next(slots)), None),
        PyTorchModel(
            model,
            local_optimizer_create=torch.optim.SGD,
            central_optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        ),
        NNTrainHyperParams(local_num_epochs=1, local_learning_rate=LR, local_batch_size=BATCH),
        NNEvalHyperParams(local_batch_size=BATCH),
        callbacks=[Turns()],
    )
    theta = nn.utils.parameters_to_vector(model.network.parameters())
    if RANK == 0:
        finish(job, theta.detach().numpy(), model.rows.detach().numpy(), RANKS)


main()
