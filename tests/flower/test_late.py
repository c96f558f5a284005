"""A site that lets the others wait: the round goes on without it, and so do the next ones.

What was left out is in the records, and the run is held against a local one without exactly that.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Error, Message, RecordDict

from fedss.flower import exchange as exchange_module
from fedss.flower.exchange import exchange
from fedss.flower.messages import EVALUATE, REGISTER, REQUEST, TRAIN, pack
from fedss.flower.validation import RefusedError
from tests.flower.test_faults import NODES, at_site, counted, records, twin
from tests.flower_grid import ProcessGrid, digests
from tests.sites import federate, nodes, settings, write_photos

SOUTH = NODES["south"]
ROUNDS = 6
# Nobody is waited for once a quarter has answered: in this grid who answers does so at once.
AT_ONCE = {"share": 0.25, "grace": 0, "deadline": 1000.0, "quorum": 0.0}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder)
    return folder


class HoldingGrid(ProcessGrid):
    """Replies that ``holds(kind, node, round)`` are kept back until ``release`` is called."""

    def __init__(self, photos: Path, holds: Callable[[str, int, int], bool], **named: Any) -> None:
        super().__init__(nodes(photos), self._hold, **named)
        self.holds, self.held = holds, list[Message]()

    def _hold(self, node: int, message: Message, reply: Message) -> list[Message]:
        metadata = message.metadata
        if self.holds(metadata.message_type, node, int(metadata.group_id)):
            self.held.append(reply)
            return []
        return [reply]

    def release(self) -> None:
        self.replies += self.held
        self.held.clear()

    def asked(self, node: int, kind: str = TRAIN) -> list[int]:
        """Rounds in which a node was sent such a message."""
        return [int(round) for sent, to, round in self.sent if (sent, to) == (kind, node)]


def south_in(*rounds: int, kind: str = TRAIN) -> Callable[[str, int, int], bool]:
    return lambda of, node, round: (of, node) == (kind, SOUTH) and round in rounds


def run(photos: Path, out: Path, grid: ProcessGrid, **deployment: Any) -> list[str]:
    config = settings(photos, eval_every=0, rounds=ROUNDS)
    return digests(lambda: federate(grid, config, out, **{**AT_ONCE, **deployment}))


def alone(photos: Path, out: Path, *rounds: int) -> list[str]:
    """The same without south's clients in some rounds."""
    config = settings(photos, eval_every=0, rounds=ROUNDS)
    return twin(config, out, {round: at_site("south", round) for round in rounds})


def told(out: Path) -> list[set[str]]:
    """Reasons, by round; south's clients have them, all of them and nobody else."""
    found = records(out)
    for round, record in enumerate(found):
        if "failures" in record:
            assert {name for name, _ in counted(record)} == {*at_site("south", round)}
    return [{reason for _, reason in counted(record)} for record in found]


def test_south_has_clients_in_each_of_these_rounds():
    assert all(0 < len(at_site("south", round)) < 4 for round in range(ROUNDS))


@pytest.mark.parametrize(
    ("aside", "left_out", "hangs"),
    [
        (0, [{"late"}, set(), set(), set(), set(), set()], (0,)),
        (2, [{"late"}, {"aside"}, {"aside"}, set(), set(), set()], (0,)),
        (2, [{"late"}, {"aside"}, {"aside"}, {"late"}, {"aside"}, {"aside"}], range(ROUNDS)),
        (10, [{"late"}, *[{"aside"}] * 5], (0,)),
    ],
)
def test_a_site_that_hangs_is_left_out_and_put_aside(aside, left_out, hangs, photos, tmp_path):
    grid = HoldingGrid(photos, south_in(*hangs))
    apart = run(photos, tmp_path / "run", grid, aside=aside)
    assert told(tmp_path / "run") == left_out
    out = [round for round, reasons in enumerate(left_out) if reasons]
    assert apart == alone(photos, tmp_path / "twin", *out)
    asked = [round for round, reasons in enumerate(left_out) if "aside" not in reasons]
    assert grid.asked(SOUTH) == asked


def test_a_reply_that_comes_too_late_is_not_used_but_brings_its_site_back(photos, tmp_path):
    """It comes while round 2 (0-based) is under way."""
    grid = HoldingGrid(photos, south_in(0))
    grid.visit = lambda round: grid.release() if round == 3 else None
    apart = run(photos, tmp_path / "run", grid)
    assert told(tmp_path / "run") == [{"late"}, {"aside"}, {"aside"}, set(), set(), set()]
    assert apart == alone(photos, tmp_path / "twin", 0, 1, 2)


def test_late_replies_of_a_round_are_never_those_of_the_next(photos, tmp_path):
    """All of them come just before the replies to the next messages, and nobody is put aside."""
    grid = HoldingGrid(photos, south_in(0, 1, 2))
    grid.visit = lambda round: grid.release()
    apart = run(photos, tmp_path / "run", grid, aside=0)
    assert told(tmp_path / "run") == [{"late"}] * 3 + [set()] * 3
    assert apart == alone(photos, tmp_path / "twin", 0, 1, 2)


def test_a_site_that_starts_anew_is_back_at_once(photos, tmp_path):
    def visit(round: int) -> None:
        if round == 1 and SOUTH in grid.nodes:
            away.append(grid.nodes.pop(SOUTH))
        elif round == 2:
            grid.nodes[SOUTH] = away[0]

    away: list[dict[str, Any]] = []
    grid = HoldingGrid(photos, south_in(0), visit=visit)
    apart = run(photos, tmp_path / "run", grid)
    assert told(tmp_path / "run") == [{"late"}, {"offline"}, set(), set(), set(), set()]
    assert apart == alone(photos, tmp_path / "twin", 0, 1)


def test_an_error_instead_of_a_late_reply_brings_nobody_back(photos, tmp_path):
    """Flower says of a message that has outlived its time that there is none."""
    grid = HoldingGrid(photos, south_in(0))

    def visit(round: int) -> None:
        if round == 1 and grid.held:
            reply = grid.held.pop()
            gone = Message(Error(3, "gone"), reply_to=reply)
            gone.metadata.__dict__["_reply_to_message_id"] = reply.metadata.reply_to_message_id
            grid.replies.append(gone)

    grid.visit = visit
    run(photos, tmp_path / "run", grid, aside=3)
    assert told(tmp_path / "run") == [{"late"}, *[{"aside"}] * 3, set(), set()]


def test_who_is_needed_for_the_quorum_is_waited_for_and_asked_again(photos, tmp_path):
    """Without south there is none: so in round 1 it has its deadline, and another attempt."""
    calls = []

    def first_time(kind: str, node: int, round: int) -> bool:
        if (kind, node, round) == (TRAIN, SOUTH, 1):
            calls.append(round)
            return len(calls) == 1
        return False

    assert at_site("south", 1)
    grid = HoldingGrid(photos, first_time)
    more = {"quorum": 1.0, "attempts": 2, "deadline": 1.0}
    apart = run(photos, tmp_path / "run", grid, **more)
    assert told(tmp_path / "run") == [set(), {"deadline"}, *[set()] * 4]
    assert [record.get("attempts") for record in records(tmp_path / "run")][1] == 2
    assert apart == alone(photos, tmp_path / "twin")


def test_all_of_the_share_are_waited_for(photos, tmp_path):
    grid = HoldingGrid(photos, south_in(0))
    run(photos, tmp_path / "run", grid, share=1.0, deadline=1.0, aside=1)
    assert told(tmp_path / "run") == [{"deadline"}, {"aside"}, *[set()] * 4]


def test_a_site_that_hangs_when_asked_for_its_classes(photos, tmp_path):
    grid = HoldingGrid(photos, south_in(0, kind=REQUEST))
    apart = run(photos, tmp_path / "run", grid, aside=1)
    assert told(tmp_path / "run") == [{"late"}, {"aside"}, *[set()] * 4]
    assert grid.asked(SOUTH, REQUEST) == [0, 2]
    assert apart == alone(photos, tmp_path / "twin", 0, 1)


def test_requests_that_came_ahead_count_among_the_answers(photos, tmp_path):
    """In round 1 south alone must be asked for classes; the others have sent theirs ahead."""
    hold = south_in(1, kind=REQUEST)
    grid = HoldingGrid(photos, lambda *where: south_in(0)(*where) or hold(*where))
    run(photos, tmp_path / "run", grid, aside=0)
    assert told(tmp_path / "run") == [{"late"}, {"late"}, *[set()] * 4]


def test_evaluations_are_not_kept_waiting_twice(photos, tmp_path):
    """All sites are waited for, since figures are of those that answer; who did not is aside."""
    config = settings(photos, rounds=4)
    grid = HoldingGrid(photos, south_in(1, kind=EVALUATE))
    more = {**AT_ONCE, "deadline": 1.0, "evaluate-at": "sites", "aside": 2}
    federate(grid, config, tmp_path / "run", **more)
    assert told(tmp_path / "run") == [set(), {"aside"}, {"aside"}, set()]
    sites = [record["metrics"]["sites"] for record in records(tmp_path / "run")]
    assert sites == [2, 2, 2, 3]
    assert grid.asked(SOUTH, EVALUATE) == [0, 1, 4]


def test_if_all_hang_all_are_asked_again(photos, tmp_path):
    hangs = [True]
    grid = HoldingGrid(photos, lambda kind, node, round: kind == TRAIN and round == 1 and hangs[0])
    grid.visit = lambda round: hangs.clear() or hangs.append(len(grid.held) < 2)
    more = {"deadline": 1.0, "attempts": 3}
    apart = run(photos, tmp_path / "run", grid, **more)
    assert [{reason for _, reason in counted(r)} for r in records(tmp_path / "run")][1:] == [
        {"deadline"},
        *[set()] * 4,
    ]
    assert apart == alone(photos, tmp_path / "twin")


def test_the_log_says_who_was_put_aside_and_who_is_back(photos, tmp_path, capsys):
    grid = HoldingGrid(photos, south_in(0))
    grid.visit = lambda round: grid.release() if round == 3 else None
    run(photos, tmp_path / "run", grid)
    said = capsys.readouterr().err
    assert f"site {SOUTH} let the others wait (late): it is not asked before round 12" in said
    assert f"site {SOUTH} has answered at last: it is asked again" in said


# The clock of one exchange.


@dataclass
class Clock:
    now: float = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@dataclass
class TimedGrid:
    """Nodes answer when the clock says so."""

    clock: Clock
    seconds: dict[int, float]
    waiting: dict[str, Message] = field(default_factory=dict)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        (message,) = messages
        message_id = f"{message.metadata.dst_node_id}"
        message.metadata.__dict__["_message_id"] = message_id
        self.waiting[message_id] = message
        return [message_id]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        ready = [i for i in message_ids if self.seconds[int(i)] <= self.clock.now]
        return [Message(RecordDict(), reply_to=self.waiting.pop(i)) for i in ready]

    def get_node_ids(self) -> list[int]:
        return list(self.seconds)


NEVER = 1e9


@pytest.mark.parametrize(
    ("seconds", "enough", "grace", "late", "ended"),
    [
        # All are there: no grace is needed.
        ([10, 20, 30, 40], 3, 60, [], 40),
        # The share is there after 30 s: the others have as long again ...
        ([10, 20, 30, 55], 3, 5, [], 55),
        ([10, 20, 30, 65], 3, 5, [4], 60),
        # ... or the grace, if that is more,
        ([10, 20, 30, 85], 3, 60, [], 85),
        ([10, 20, 30, 95], 3, 60, [4], 90),
        # but never longer than the deadline, which is then what is said.
        ([10, 20, 290, NEVER], 3, 60, ["deadline"], 300),
        ([10, NEVER, NEVER, NEVER], 3, 0, ["deadline"] * 3, 300),
        # Nobody need answer: all have the grace.
        ([10, 20, 65, 75], 0, 60, [3, 4], 60),
    ],
)
def test_how_long_others_are_waited_for(seconds, enough, grace, late, ended, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(exchange_module, "time", clock)
    grid = TimedGrid(clock, dict(enumerate(seconds, start=1)))
    messages = [(n, Message(pack({"round": 0}), n, REGISTER, ttl=500.0)) for n in grid.seconds]
    done, reasons, unanswered = [], [], dict[str, int]()
    for node, reply in exchange(
        grid, messages, 300.0, lambda: len(done) >= enough, grace, unanswered
    ):
        if isinstance(reply, RefusedError):
            reasons.append("deadline" if reply.reason == "deadline" else node)
        else:
            done.append(node)
    assert reasons == late
    assert len(unanswered) == len(late)
    # It looks once a second, also for the share, after which it takes as long again.
    assert ended <= clock.now <= ended + 2
