"""The server's part of a federation when the SuperLink fails it, and how it ends when it must."""

import sys

import httpx
import pytest
from flwr.app import Context, Message, RecordDict

from fedss.errors import ConfigError
from fedss.flower.exchange import exchange
from fedss.flower.messages import REGISTER, pack
from fedss.flower.server_app import app
from tests.flower_grid import ProcessGrid


class Cut(ProcessGrid):
    """A grid whose SuperLink dies in the TLS handshake of some of its calls, by number."""

    def __init__(self, cut, **named):
        super().__init__(**named)
        self.cut, self.calls = cut, 0

    def _call(self, call, *arguments):
        self.calls += 1
        if self.calls in self.cut:
            raise httpx.ConnectError("[SSL: UNEXPECTED_EOF_WHILE_READING] EOF occurred")
        return call(*arguments)

    def push_messages(self, messages):
        return self._call(super().push_messages, messages)

    def pull_messages(self, message_ids):
        return self._call(super().pull_messages, message_ids)


@pytest.mark.parametrize("cut", [{1}, {2}, {1, 3}])
def test_a_superlink_that_dies_in_a_handshake_is_asked_again(cut, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    grid = Cut(cut, nodes={})
    messages = {n: Message(pack({"round": 0}), n, REGISTER, ttl=5.0) for n in (3, 7)}
    replies = dict(exchange(grid, messages.items(), 5.0))
    assert replies.keys() == {3, 7}
    # There are no such nodes; but that is what the SuperLink says of them.
    assert {reply.error.code for reply in replies.values()} == {5}


def test_one_that_never_comes_back_is_not_asked_for_ever(monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    grid = Cut(range(100), nodes={})
    messages = {3: Message(pack({"round": 0}), 3, REGISTER, ttl=5.0)}
    with pytest.raises(httpx.ConnectError):
        list(exchange(grid, messages.items(), 5.0))


def test_a_run_that_cannot_go_on_tells_flower_why(monkeypatch, capsys):
    # Flower makes the exception's text the reason of the failure, and sees no exit.
    monkeypatch.setattr(sys, "tracebacklimit", 1000, raising=False)
    context = Context(1, 0, {}, RecordDict(), {"out": "somewhere"})
    with pytest.raises(ConfigError, match="out: expected a full path") as caught:
        app(ProcessGrid({}), context)
    assert sys.tracebacklimit == 0
    assert caught.value.__suppress_context__
    assert capsys.readouterr().err == f"fedss: {caught.value}\n"
