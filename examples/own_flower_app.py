"""The corrected sampled softmax in a Flower app of your own; fedss gives the sample and the loss.

`query`: a site draws a class sample and asks for its rows. `train`: it gets them with the network,
here a matrix, and returns their gradients. The server takes a step for each of them.

    python examples/own_flower_app.py        # four simulated sites; needs flwr[simulation]
"""

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation
from torch.nn import functional as F

from fedss.losses import ClassSample, Scoring, sampled_softmax
from fedss.sampling import class_sample, draw_uniform

CLASSES, OWN, SIZE, ROUNDS = 10_000, 20, 32, 50
CENTRES_ND = torch.randn(CLASSES, SIZE, generator=torch.Generator().manual_seed(0))
client, server = ClientApp(), ServerApp()


def pack(*tensors: torch.Tensor) -> RecordDict:
    return RecordDict({"": ArrayRecord([tensor.numpy() for tensor in tensors])})


def unpack(content: RecordDict) -> list[torch.Tensor]:
    return [torch.from_numpy(array) for array in content.array_records[""].to_numpy_ndarrays()]


@client.query()
def ask(message: Message, context: Context) -> Message:
    own_P = int(context.node_config["partition-id"]) * OWN + np.arange(OWN)
    sample = class_sample(own_P, *draw_uniform(own_P, CLASSES, 200, np.random.default_rng()))
    # Flower keeps it at the site for `train`; the server does not hear which ids are own.
    context.state = pack(sample.ids_S, sample.log_q_S, sample.own_S)
    return Message(pack(sample.ids_S), reply_to=message)


@client.train()
def train(message: Message, context: Context) -> Message:
    sample = ClassSample(*unpack(context.state))
    network_DD, rows_SD = (tensor.requires_grad_() for tensor in unpack(message.content))
    target_B = sample.own_S.nonzero()[torch.randint(OWN, (32,)), 0]
    image_BD = CENTRES_ND[sample.ids_S[target_B]] + 0.1 * torch.randn(32, SIZE)
    h_BD = F.normalize(image_BD @ network_DD, dim=1)
    loss = sampled_softmax(h_BD, rows_SD, target_B, sample, Scoring(scale=10.0)).mean()
    gradients = torch.autograd.grad(loss, (network_DD, rows_SD))
    return Message(pack(*gradients, loss.detach()), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    network_DD, rows_ND = torch.eye(SIZE), F.normalize(torch.randn(CLASSES, SIZE), dim=1)
    for number in range(1, ROUNDS + 1):
        queries = [Message(RecordDict(), site, "query") for site in grid.get_node_ids()]
        ids = {r.metadata.src_node_id: unpack(r.content)[0] for r in grid.send_and_receive(queries)}
        tasks = [Message(pack(network_DD, rows_ND[ids[site]]), site, "train") for site in ids]
        for reply in grid.send_and_receive(tasks):
            network_step, rows_step, loss = unpack(reply.content)
            network_DD -= network_step / len(ids)
            rows_ND.index_add_(0, ids[reply.metadata.src_node_id], -2 * rows_step / len(ids))
        print(f"round {number:2d}  loss at a site {loss:.3f}")


if __name__ == "__main__":
    run_simulation(server, client, num_supernodes=4)
