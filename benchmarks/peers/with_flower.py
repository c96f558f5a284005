"""The common job in Flower's simulation: 600 virtual nodes, a Ray worker on each core, FedAvg.

``tuned``: with what fedss does to memory, which is no part of Flower, in its clients.
"""

import os
import sys
from collections.abc import Iterable
from pathlib import Path

for name in ("FLWR_TELEMETRY_ENABLED", "FLWR_DISABLE_UPDATE_CHECK", "RAY_USAGE_STATS_ENABLED"):
    os.environ[name] = str(int(name == "FLWR_DISABLE_UPDATE_CHECK"))
# Ray's workers import what they need from here.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
)

import torch  # noqa: E402
from flower_client import client  # noqa: E402
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict  # noqa: E402
from flwr.serverapp import Grid, ServerApp  # noqa: E402
from flwr.serverapp.strategy import FedAvg  # noqa: E402
from flwr.simulation import run_simulation  # noqa: E402
from job import CLIENTS, COHORT, finish, read_job, turns  # noqa: E402
from network import network  # noqa: E402

job = read_job(Path(sys.argv[1]))
turn = turns()
server = ServerApp()


class InTurn(FedAvg):
    """FedAvg that waits for its turn, and tells each node whose images to train on."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        turn()
        nodes = [
            m.metadata.dst_node_id
            for m in super().configure_train(server_round, arrays, config, grid)
        ]
        for slot, node in enumerate(nodes):
            told = ConfigRecord({"round": server_round - 1, "slot": slot, "job": str(job.folder)})
            told["tuned"] = sys.argv[3].endswith("-tuned")
            content = RecordDict({self.arrayrecord_key: arrays, self.configrecord_key: told})
            yield Message(content, dst_node_id=node, message_type=MessageType.TRAIN)


@server.main()
def main(grid: Grid, context: Context) -> None:
    state = {**network(job.theta).state_dict(), "rows": torch.from_numpy(job.rows)}
    # The first round takes its fraction of the nodes connected by then, which may be fewer.
    strategy = InTurn(
        fraction_train=COHORT / CLIENTS,
        min_train_nodes=COHORT,
        fraction_evaluate=0.0,
        min_available_nodes=CLIENTS,
    )
    result = strategy.start(grid, ArrayRecord(state), num_rounds=len(job.cohorts))
    turn()
    state = result.arrays.to_torch_state_dict()
    rows = state.pop("rows").numpy()
    model = network(job.theta)
    model.load_state_dict(state)
    theta = torch.nn.utils.parameters_to_vector(model.parameters())
    finish(job, theta.detach().numpy(), rows, processes=2)


if __name__ == "__main__":
    run_simulation(
        server,
        client,
        num_supernodes=CLIENTS,
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
    )
