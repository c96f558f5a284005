"""Line 2 of Algorithm 1 with its messages: what clients ask for, and what they are sent."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedss.core.algorithm import broadcast, deal_classes, select
from fedss.core.class_rows import rows_of, union
from fedss.core.client import Broadcast, ClassRequest, RoundPlan, Submodel, shared_classes
from fedss.core.optimizers import ServerOptimizer
from fedss.core.state import ServerState
from fedss.losses.softmax import ClassSample
from fedss.wire.messages import (
    Message,
    WireFormat,
    decode_answer,
    decode_dealt,
    decode_request,
    encode_answer,
    encode_broadcast,
)


@dataclass(frozen=True)
class Downlink:
    """What the clients of a cohort are sent.

    ``to_all`` is what every client gets, ``ids`` the class sample of each, ``dealt`` the same with
    probabilities, where the server has drawn it. ``ids_U``, sorted, are the classes that any client
    gets, ``rows_UD`` their class rows; ``shared``: all clients get them all, with ``to_all``.
    """

    wire: WireFormat
    to_all: Message
    ids: Mapping[int, Tensor]
    dealt: Mapping[int, ClassSample]
    ids_U: Tensor
    rows_UD: Tensor
    shared: bool

    def answer(self, client: int) -> Message:
        """What a client gets of its own: its class rows, unless these are shared. O(S D)."""
        if self.shared:
            return {}
        ids_S = self.ids[client]
        rows_SD = rows_of(self.rows_UD, self.ids_U, ids_S)
        return encode_answer(self.wire, ids_S, rows_SD, self.dealt.get(client))


def answer_requests(
    wire: WireFormat,
    optimizer: ServerOptimizer,
    state: ServerState,
    plan: RoundPlan,
    requested: Mapping[int, Tensor],
    clients: Collection[int] | None = None,
) -> Downlink:
    """Line 2, at the server: submodels for a cohort. O(sum of S D + P), whatever n is.

    ``requested`` has the ids, int64 and sorted, that each client asks for, in the cohort's order.
    Only ``clients`` of these are answered; None: all.
    """
    dealt: dict[int, ClassSample] = {}
    if plan.sampler.drawn_by == "server":
        samples = deal_classes(plan, state, [ids.numpy() for ids in requested.values()])
        dealt = dict(zip(requested, samples, strict=True))
    ids = {
        k: dealt[k].ids_S if dealt else requested[k]
        for k in (requested if clients is None else clients)
    }
    ids_U = union([*ids.values()])
    rows_UD = select(optimizer, state, ids_U)
    to_all = encode_broadcast(wire, broadcast(state, plan))
    shared = shared_classes(plan) is not None
    if shared:
        to_all = {**to_all, **encode_answer(wire, ids_U, rows_UD, None)}
    return Downlink(wire, to_all, ids, dealt, ids_U, rows_UD, shared)


def receive(
    wire: WireFormat, request: ClassRequest, sent: Broadcast, answer: Message
) -> tuple[Submodel, ClassSample]:
    """Line 2, at the client: its submodel and class sample; ``answer`` is all that it got.

    Raises:
        ValueError: there are rows of other classes than were asked for.
    """
    sample = request.sample
    if sample is None:
        sample = decode_dealt(wire, answer, request.own_P)
    elif not torch.equal(request.ids_S, decode_request(wire, answer)):
        raise ValueError("the server sent rows of other classes than were asked for")
    ids_S, rows_SD = sample.ids_S, decode_answer(wire, answer)
    if request.shared_R is not None:
        # Where class rows stay with the clients, it asks for none.
        ids_S = ids_S if len(request.shared_R) else request.shared_R
        rows_SD = rows_of(rows_SD, request.shared_R, ids_S)
    return Submodel(sent, ids_S, rows_SD), sample
