"""An engine of one's own: where the clients of a round train, and how they are reached.

This one trains them one after the other, in this process, with nothing encoded. An engine for
another network of devices does the same at its other end: lines 2 to 4 of Algorithm 1.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

import fedss
from fedss.config import Config
from fedss.core.algorithm import Server, broadcast, run_round, select
from fedss.core.class_rows import create_class_rows
from fedss.core.client import (
    ClientUpdate,
    RoundPlan,
    Submodel,
    draw_classes,
    limit_own_classes,
    train_client,
)
from fedss.core.optimizers import ServerOptimizer
from fedss.core.state import ServerState
from fedss.data import ClientIndex, index_clients
from fedss.distributed import ALONE, Ranks
from fedss.engines.local import Replica
from fedss.models import flatten_
from fedss.settings import problem_of, resolve
from fedss.training.build import build_model, round_plan


@dataclass(frozen=True)
class OneByOne:
    """A `fedss.core.engine.Engine`."""

    clients: ClientIndex
    optimizer: ServerOptimizer
    model: Replica
    ranks: Ranks = ALONE

    def num_clients(self, round: int) -> int:
        return self.clients.num_clients

    def train(
        self, state: ServerState, cohort: np.ndarray, plan: RoundPlan
    ) -> Iterator[ClientUpdate]:
        for k in cohort.tolist():
            example_N = self.clients.examples(k)
            label_N = self.clients.images.labels[example_N]
            # Line 2: the client draws its class sample, the server gives the rows.
            sample = draw_classes(plan, k, limit_own_classes(plan, k, label_N))
            rows_SD = select(self.optimizer, state, sample.ids_S)
            submodel = Submodel(broadcast(state, plan), sample.ids_S, rows_SD)
            # Lines 3 and 4.
            yield train_client(plan, k, self.model, submodel, sample, example_N, label_N)


def main(rounds: int = 30) -> list[float]:
    """The mean loss of each round."""
    config = Config(data="glyphs", glyphs_classes=60, glyphs_clients=16, backbone="conv4-8")
    data, optimizer = fedss.load_data(config), ServerOptimizer()
    config, _ = resolve(config, problem_of(data))
    n = len(data.train.class_names)
    embedder = build_model(config, data, None)
    flat = flatten_(embedder)
    model = Replica(embedder, flat.theta_P, flat.grad_P, data.train.pixels)
    engine = OneByOne(index_clients(data.train), optimizer, model)
    rows = create_class_rows(n, embedder.spec.embedding_size, optimizer.slots, config.seed)
    theta_P = flat.theta_P.clone()
    state = ServerState(theta_P, {"momentum": 0 * theta_P}, rows, round=0)
    losses = []
    for round in range(rounds):
        plan = round_plan(config, n, round)
        state, updates, _ = run_round(Server(optimizer, cohort_size=8), engine, state, plan)
        losses.append(float(np.mean([update.loss for update in updates])))
    return losses


if __name__ == "__main__":
    for number, loss in enumerate(main(), start=1):
        print(f"round {number}  loss {loss:.3f}")
