"""Messages to nodes and their replies, over Flower's grid."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import httpx
from flwr.app import Message

from fedss.flower.messages import Nodes, log_line
from fedss.flower.validation import RefusedError

T = TypeVar("T")


def exchange(
    grid: Nodes,
    messages: Iterable[tuple[int, Message]],
    deadline: float,
    enough: Callable[[], bool] = lambda: False,
    grace: float = 0.0,
    unanswered: dict[str, int] | None = None,
) -> Iterator[tuple[int, "Message | RefusedError"]]:
    """Send a message to each node, and give their replies as they come.

    Args:
        grid: Flower's way to the nodes.
        messages: with the node of each; made and sent one by one, so that one is in memory at a
            time, and it is known which one Flower does not take.
        deadline: seconds after which missing replies are given as refused.
        enough: whether the others have only the grace left: as long as it took so far, and
            ``grace`` seconds at least, within the deadline.
        grace: seconds.
        unanswered: gets the ids of messages that were not answered in time, with their nodes.
    """
    waiting, answered = dict[str, int](), dict[str, int]()
    for node, message in messages:
        # None, or nothing at all: Flower could not take it.
        message_id = next(iter(once_more(grid.push_messages, [message])), None)
        if message_id:
            waiting[message_id] = node
        else:
            yield node, RefusedError("lost", "Flower did not take the message")
    began, pause, missing = time.monotonic(), 0.05, "deadline"
    end = began + deadline
    while waiting:
        # What came while the last replies were processed is in time.
        late = time.monotonic() >= end
        for reply in once_more(grid.pull_messages, list(waiting)):
            message_id = reply.metadata.reply_to_message_id
            if message_id in waiting:
                answered[message_id] = waiting.pop(message_id)
                yield answered[message_id], reply
            elif message_id in answered:
                yield answered[message_id], RefusedError("twice", "a second reply to one message")
        if late or not waiting:
            break
        now = time.monotonic()
        if missing == "deadline" and enough() and now + max(grace, now - began) < end:
            end, missing = now + max(grace, now - began), "late"
        time.sleep(pause)
        pause = min(2 * pause, 1.0)
    if unanswered is not None:
        unanswered.update(waiting)
    yield from ((node, RefusedError(missing)) for node in waiting.values())


def once_more(ask: Callable[..., Iterable[T]], *arguments: Any) -> list[T]:
    """What Flower's grid gives; asked a second time where the SuperLink died in a TLS handshake.

    Flower waits for a SuperLink that is away, but raises then, as for a wrong certificate.
    """
    try:
        return list(ask(*arguments))
    except httpx.TransportError as error:
        log_line(f"lost the SuperLink, trying again ({error})")
        time.sleep(1)
        return list(ask(*arguments))
