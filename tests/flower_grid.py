"""Flower without its network: messages are really serialized, sites run in this process.

Replies come back in an order of their own; a test may spoil them on the way, and let nodes come and
go.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from unittest.mock import patch

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity

from fedss.flower.client_app import app as site_app
from fedss.training import loop
from tests.ranks import digest

Spoil = Callable[[int, Message, Message], Sequence[Message]]


def digests(call: Callable[[], Any]) -> list[str]:
    """Of the server's state after each round of what is called."""
    found, run_round = [], loop.run_round  # type: ignore[attr-defined]

    def watch(*arguments: Any) -> Any:
        result = run_round(*arguments)
        found.append(digest(result[0]))
        return result

    with patch.object(loop, "run_round", watch):
        call()
    return found


def serialized(message: Message) -> dict[str, bytes]:
    """What Flower sends for a message, by its hash."""
    return {key: thing.deflate() for key, thing in get_all_nested_objects(message).items()}


def through_the_wire(message: Message) -> Message:
    """The message as it arrives elsewhere: bytes, and back."""
    contents = serialized(message)
    arrived = inflate_object_from_contents(message.object_id, contents)
    assert isinstance(arrived, Message)
    return arrived


class ProcessGrid:
    """Sites in this process, by node id, each with its node-config."""

    def __init__(
        self,
        nodes: dict[int, dict[str, Any]],
        spoil: Spoil = lambda node, message, reply: [reply],
        seed: int = 0,
        visit: Callable[[int], None] = lambda round: None,
        app: ClientApp = site_app,
    ) -> None:
        self.nodes, self.spoil, self.visit, self.app = nodes, spoil, visit, app
        self.states: dict[int, RecordDict] = {}
        self.order = random.Random(seed)
        self.replies: list[Message] = []
        self.sent: list[tuple[str, int, str]] = []
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            # As Flower does: a number of its own, even for equal messages.
            message_id = f"message {len(self.sent)}"
            node = message.metadata.dst_node_id
            self.sent.append((message.metadata.message_type, node, message.metadata.group_id))
            arrived = through_the_wire(message)
            arrived.metadata.__dict__["_message_id"] = message_id
            ids.append(message_id)
            if node not in self.nodes:
                error = Message(Error(5, "Node Unavailable"), reply_to=arrived)
                self.replies.append(error)
                continue
            state = self.states.get(node, RecordDict())
            context = Context(1, node, self.nodes[node], state, {})
            try:
                reply = through_the_wire(self.app(arrived, context))
                self.states[node] = context.state
            except Exception as failure:
                reply = Message(Error(2, f"raised {failure}"), reply_to=arrived)
            self.replies.extend(self.spoil(node, arrived, reply))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        wanted = set(message_ids)
        found = [r for r in self.replies if r.metadata.reply_to_message_id in wanted]
        self.replies = [r for r in self.replies if r not in found]
        self.order.shuffle(found)
        return found

    def send_and_receive(self, messages: Iterable[Message]) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))

    def get_node_ids(self) -> Iterable[int]:
        """Those online; first ``visit`` is told how many rounds have been trained in."""
        self.visit(len({group for kind, _, group in self.sent if kind == "train"}))
        return list(self.nodes)
