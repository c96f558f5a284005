"""Broken, hostile and unlucky sites: nothing of theirs is used, and the rest trains on as if alone.

Each fault is held against a local run in which the same clients were left out.
"""

import json
import re
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from safetensors.torch import save
from torch import Tensor

import fedss
from fedss.config import Config
from fedss.core.algorithm import draw_cohort
from fedss.core.client import ClientUpdate
from fedss.core.engine import Failure
from fedss.data import load_dataset
from fedss.engines.local import LocalEngine, Workers
from fedss.errors import ConfigError, DivergedError, QuorumError
from fedss.evaluation.baselines import data_floors
from fedss.flower import client_app as site_module
from fedss.flower.messages import buffer, pack, unpack
from fedss.flower.validation import MOST_EXAMPLES
from fedss.models import build_embedder
from fedss.runs.checkpoint import newest_round
from fedss.training import experiment
from tests.flower_grid import ProcessGrid, digests
from tests.sites import CLIENTS, SITES, federate, nodes, settings, site_of, write_photos

NAMES = sorted(name for names in CLIENTS.values() for name in names)
NODES = dict(zip(SITES, (3, 10, 17), strict=True))
HOME = {name: NODES[site] for site, names in CLIENTS.items() for name in names}
INT8 = {"rows_up": "int8", "backbone_up": "int8"}

Record = dict[str, Any]
Part = dict[str, Tensor]
Spoil = Callable[[int, Message, Message], Sequence[Message]]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder)
    return folder


def cohort(round: int, seed: int = 0) -> list[str]:
    return [NAMES[k] for k in draw_cohort(6, 4, seed, round).tolist()]


def at_site(site: str, round: int) -> list[str]:
    return [name for name in cohort(round) if name in CLIENTS[site]]


@dataclass(frozen=True)
class LeavingOut:
    """A local engine; by round, clients that do not ask, and clients whose update is refused."""

    engine: LocalEngine
    silent: Mapping[int, Sequence[str]]
    refused: Mapping[int, Sequence[str]]

    @property
    def ranks(self) -> Any:
        return self.engine.ranks

    def num_clients(self, round: int) -> int:
        return self.engine.num_clients(round)

    def train(self, state: Any, cohort: np.ndarray, plan: Any) -> Iterator[ClientUpdate | Failure]:
        silent = [NAMES.index(name) for name in self.silent.get(plan.round, ())]
        refused = [NAMES.index(name) for name in self.refused.get(plan.round, ())]
        yield from (Failure(k, "left out") for k in silent)
        for update in self.engine.train(state, np.setdiff1d(cohort, silent), plan):
            yield Failure(update.client, "left out") if update.client in refused else update


def twin(
    config: Config,
    out: Path,
    refused: Mapping[int, Sequence[str]],
    silent: Mapping[int, Sequence[str]] | None = None,
) -> list[str]:
    """Digests of a local run without the updates of some clients in some rounds."""
    open_local = experiment.local_federation  # type: ignore[attr-defined]

    @contextmanager
    def without(*arguments: Any) -> Iterator[Any]:
        with open_local(*arguments) as whole:
            engine = LeavingOut(whole.engine, silent or {}, refused)
            yield replace(whole, engine=engine, quorum=0.0)

    with patch.object(experiment, "local_federation", without):
        return digests(lambda: fedss.train(config, out, on_round=lambda record: None))


def records(out: Path) -> list[Record]:
    return [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]


def counted(record: Record) -> Counter[tuple[str, str]]:
    return Counter((f["client"], f["reason"]) for f in record.get("failures", ()))


def edit(
    reply: Message,
    message: Message,
    change: Callable[[dict[str, Any], dict[str, dict[str, Tensor]]], None],
) -> Message:
    """The reply with other facts or tensors."""
    metadata, tensors = unpack(reply)
    change(metadata, tensors)
    packed = pack(metadata, **{name: buffer(of) for name, of in tensors.items()})
    return Message(packed, reply_to=message)


Change = Callable[[Part], None]


def change_part(client: str, message: Message, reply: Message, change: Change) -> Message:
    """What came, with another update of one client."""
    prefix = f"{NAMES.index(client)}/"

    def change_it(metadata: dict[str, Any], tensors: dict[str, dict[str, Tensor]]) -> None:
        updates = tensors["updates"]
        part = {n.removeprefix(prefix): t for n, t in updates.items() if n.startswith(prefix)}
        assert part
        change(part)
        others = {n: t for n, t in updates.items() if not n.startswith(prefix)}
        tensors["updates"] = others | {prefix + n: t for n, t in part.items()}

    return edit(reply, message, change_it)


def run(photos: Path, out: Path, grid: ProcessGrid, **more: Any) -> list[str]:
    """Digests of three rounds with any quorum; figures are of no interest here."""
    deadline = {k: more.pop(k) for k in list(more) if "deadline" in k}
    deployment = {"quorum": 0.0, "aside": 0, **deadline}
    config = settings(photos, eval_every=0, **more)
    return digests(lambda: federate(grid, config, out, **deployment))


def put(name: str, value: float) -> Callable[[Part], None]:
    def change(part: Part) -> None:
        part[name] = part[name].clone()
        part[name].view(-1)[-1] = value

    return change


def as_(name: str, make: Callable[[Tensor], Tensor]) -> Callable[[Part], None]:
    return lambda part: part.update({name: make(part[name])})


def without(name: str) -> Callable[[Part], None]:
    return lambda part: part.__delitem__(name)


def moved(ids: Tensor) -> Tensor:
    """As many sorted, unique ids of classes, but others."""
    there = set(ids.tolist())
    new = next(i for i in range(10) if i not in there)
    return torch.tensor(sorted([*ids.tolist()[1:], new]), dtype=ids.dtype)


MOMENTS, FULL = {"method": "moments"}, {"method": "full"}
NAN, INF = float("nan"), float("inf")
PARTS: dict[str, tuple[dict[str, Any], Callable[[Part], None], str]] = {
    "NaN in the backbone": ({}, put("backbone.values", NAN), "not finite"),
    "infinity in the backbone": ({}, put("backbone.values", -INF), "not finite"),
    "NaN in a row": ({}, put("class_rows.values", NAN), "not finite"),
    "infinity in a row": ({}, put("class_rows.values", INF), "not finite"),
    "NaN as a scale of int8": (INT8, put("class_rows.scale", NAN), "not finite"),
    "infinity as a scale of int8": (INT8, put("backbone.scale", INF), "not finite"),
    "NaN in bfloat16": (INT8, put("backbone.small", NAN), "not finite"),
    "NaN in an own row": (MOMENTS, put("class_rows.values", NAN), "not finite"),
    "NaN as loss": ({}, put("loss", NAN), "not finite"),
    "infinity as loss": ({}, put("loss", -INF), "not finite"),
    "a loss that float32 has not": ({}, put("loss", 1e308), "not finite"),
    "a short backbone": ({}, as_("backbone.values", lambda t: t[:-1]), "shape"),
    "a long backbone": ({}, as_("backbone.values", lambda t: torch.cat([t, t[:1]])), "shape"),
    "a folded backbone": ({}, as_("backbone.values", lambda t: t[None]), "shape"),
    "one row for all": ({}, as_("class_rows.values", lambda t: t[:1]), "shape"),
    "rows in one": ({}, as_("class_rows.values", Tensor.flatten), "shape"),
    "one scale for all": (INT8, as_("class_rows.scale", lambda t: t[:1]), "shape"),
    "rows in float64": ({}, as_("class_rows.values", Tensor.double), "shape"),
    "rows of truth values": ({}, as_("class_rows.values", Tensor.bool), "shape"),
    "a whole backbone": ({}, as_("backbone.values", Tensor.long), "shape"),
    "codes as floats": (INT8, as_("class_rows.values", Tensor.float), "shape"),
    "loss in float32": ({}, as_("loss", Tensor.float), "shape"),
    "many losses": ({}, as_("loss", lambda t: t.repeat(3)), "shape"),
    "images as a float": ({}, as_("num_examples", Tensor.double), "shape"),
    "no backbone": ({}, without("backbone.values"), "damaged"),
    "no rows": ({}, without("class_rows.values"), "damaged"),
    "no scale": (INT8, without("class_rows.scale"), "damaged"),
    "no loss": ({}, without("loss"), "damaged"),
    "nothing": ({}, dict.clear, "damaged"),
    "one tensor more": ({}, lambda part: part.update(x=torch.ones(1)), "damaged"),
    "moments unasked": ({}, lambda p: p.update({"moments.shift.values": p["loss"]}), "damaged"),
    "no ids": ({}, without("ids"), "ids"),
    "ids of all": (FULL, lambda p: p.update(ids=torch.arange(10).int()), "ids"),
    "an id less": ({}, as_("ids", lambda t: t[1:]), "ids"),
    "an id more": ({}, as_("ids", lambda t: torch.cat([t, t[-1:] + 1])), "ids"),
    "unsorted ids": ({}, as_("ids", lambda t: t.flip(0)), "ids"),
    "ids not asked for": ({}, as_("ids", moved), "ids"),
    "long ids": ({}, as_("ids", Tensor.long), "ids"),
    "no images": ({}, put("num_examples", 0), "examples"),
    "fewer than no images": ({}, put("num_examples", -5), "examples"),
    "least images": ({}, put("num_examples", -(2**63)), "examples"),
    "absurdly many": ({}, put("num_examples", MOST_EXAMPLES + 1), "examples"),
    "most images": ({}, as_("num_examples", lambda t: torch.tensor(2**63 - 1)), "examples"),
}


@pytest.mark.parametrize("changes", [{}, INT8, MOMENTS, FULL], ids=str)
def test_an_update_that_is_not_one_is_refused(changes, photos, tmp_path):
    """One fault a round."""
    faults = [fault for fault, (settings_of, *_) in PARTS.items() if settings_of == changes]
    changes = {**changes, "rounds": len(faults) + 1}
    victims = {round: [cohort(round)[1]] for round in range(len(faults))}

    def spoil(node: int, message: Message, reply: Message) -> Sequence[Message]:
        round = int(message.metadata.group_id)
        if message.metadata.message_type == "train" and round in victims:
            (client,), (_, change, _) = victims[round], PARTS[faults[round]]
            if HOME[client] == node:
                return [change_part(client, message, reply, change)]
        return [reply]

    apart = run(photos, tmp_path / "run", ProcessGrid(nodes(photos), spoil), **changes)
    *found, last = records(tmp_path / "run")
    for round, (fault, record) in enumerate(zip(faults, found, strict=True)):
        assert counted(record) == {(*victims[round], PARTS[fault][2]): 1}, fault
        assert record["clients"] == 3
        assert record["attempts"] == 1
    assert "failures" not in last
    config = settings(photos, eval_every=0, **changes)
    assert apart == twin(config, tmp_path / "twin", victims)


def of_site(site: str, round: int, kind: str, answer: Callable[..., Sequence[Message]]) -> Spoil:
    """What one site says in one round instead: ``answer(message, reply)``."""

    def spoil(node: int, message: Message, reply: Message) -> Sequence[Message]:
        metadata = message.metadata
        if (node, metadata.message_type, metadata.group_id) == (NODES[site], kind, str(round)):
            return answer(message, reply)
        return [reply]

    return spoil


def said(**fields: Any) -> Callable[[Message, Message], Sequence[Message]]:
    """A reply with the given facts; of this round, if they do not say otherwise."""

    def answer(message: Message, reply: Message) -> Sequence[Message]:
        now = {"round": int(message.metadata.group_id)}
        return [Message(pack({**now, **fields}), reply_to=message)]

    return answer


def content(template: Any, tensors: Any = None) -> Callable[[Message, Message], Sequence[Message]]:
    """A reply with the given text for metadata (HERE is the round) and bytes for a buffer."""

    def answer(message: Message, reply: Message) -> Sequence[Message]:
        text = template
        if template is HERE:
            text = template.replace("HERE", message.metadata.group_id)
        told: dict[str, Any] = {"fedss": ConfigRecord({"json": text})}
        if tensors is not None:
            array = Array("uint8", (len(tensors),), "safetensors", tensors)
            told["fedss.tensors"] = ArrayRecord({"updates": array})
        return [Message(RecordDict(told), reply_to=message)]

    return answer


HERE = '{"round": HERE}'


def empty(message: Message, reply: Message) -> Sequence[Message]:
    bare = Message(RecordDict(), reply_to=message)
    bare.__dict__["_content"] = None
    return [bare]


def header(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


def renamed(name: str) -> Callable[[Message, Message], Sequence[Message]]:
    def change(metadata: dict[str, Any], tensors: dict[str, dict[str, Tensor]]) -> None:
        tensors["updates"][name] = torch.zeros(1)

    return lambda message, reply: [edit(reply, message, change)]


def not_asked(message: Message, reply: Message) -> Sequence[Message]:
    there = cohort(int(message.metadata.group_id))
    other = next(i for i, name in enumerate(NAMES) if name not in there)
    return renamed(f"{other}/x")(message, reply)


REPLIES: dict[str, tuple[Callable[..., Sequence[Message]], str]] = {
    "garbage for JSON": (content("{round", b""), "damaged"),
    "a list for JSON": (content("[1]", save({})), "damaged"),
    "deep JSON": (content("[" * 100_000, save({})), "damaged"),
    "a number too long": (content("1" * 5000, save({})), "damaged"),
    "a list for text": (content(["x"], save({})), "damaged"),
    "no tensors": (content(HERE), "damaged"),
    "garbage for tensors": (content(HERE, b"\xff" * 1000), "damaged"),
    "no bytes": (content(HERE, b""), "damaged"),
    "a header of 2^60 bytes": (content(HERE, (2**60).to_bytes(8, "little")), "damaged"),
    "tensors of 2^62 bytes": (
        content(
            HERE,
            header(b'{"0/x":{"dtype":"F32","shape":[1152921504606846976],"data_offsets":[0,4]}}')
            + b"\0" * 4,
        ),
        "damaged",
    ),
    "an empty record": (
        lambda message, reply: [Message(RecordDict(), reply_to=message)],
        "damaged",
    ),
    "neither content nor error": (empty, "damaged"),
    "only the facts": (said(), "damaged"),
    "a client's number of 5000 digits": (renamed("9" * 5000 + "/x"), "damaged"),
    "a client's number beyond 64 bits": (renamed(f"{2**63}/x"), "damaged"),
    "a client's number in other digits": (renamed("\u0663/x"), "damaged"),
    "no client's number": (renamed("/x"), "damaged"),
    "an update of a client of nobody": (renamed("77/x"), "damaged"),
    "an update of a client that was not asked": (not_asked, "damaged"),
    "a reply to the future": (said(round=99), "stale"),
    "a reply to no round": (said(round=None), "stale"),
    "a reply to a text": (said(round="1"), "stale"),
    "names of another type": (said(changed=[1]), "damaged"),
    "no names": (said(changed={}), "registered"),
    "an error without a word": (said(error=None), "raised"),
    "an error of many words": (said(error="raised", detail=["x"]), "raised"),
    "another version": (said(error="version", detail="\x1b[31mred"), "version"),
    "Flower's error": (
        lambda message, reply: [Message(Error(2, "Traceback: alice"), reply_to=message)],
        "raised",
    ),
    "an error that Flower has not": (
        lambda message, reply: [Message(Error(-77, "x"), reply_to=message)],
        "error",
    ),
    "its process died": (lambda m, r: [Message(Error(8, "x"), reply_to=m)], "died"),
    "its node is gone": (lambda m, r: [Message(Error(5, "x"), reply_to=m)], "offline"),
    "silence": (lambda message, reply: [], "deadline"),
}


def test_a_reply_that_is_not_one_is_refused_for_all_clients_of_the_site(photos, tmp_path):
    """One fault a round, at one site after another."""
    faults, victims, site = list(REPLIES), dict[int, list[str]](), dict[int, int]()
    for round in range(len(faults)):
        here = [name for name in SITES if at_site(name, round)]
        victims[round] = at_site(here[round % len(here)], round)
        site[round] = HOME[victims[round][0]]

    def spoil(node: int, message: Message, reply: Message) -> Sequence[Message]:
        round = int(message.metadata.group_id)
        if message.metadata.message_type == "train" and site.get(round) == node:
            return REPLIES[faults[round]][0](message, reply)
        return [reply]

    changes = {"rounds": len(faults) + 1}
    grid = ProcessGrid(nodes(photos), spoil)
    apart = run(photos, tmp_path / "run", grid, deadline=1.0, **changes)
    *found, last = records(tmp_path / "run")
    for round, (fault, record) in enumerate(zip(faults, found, strict=True)):
        assert counted(record) == {(name, REPLIES[fault][1]): 1 for name in victims[round]}, fault
    assert "failures" not in last
    config = settings(photos, eval_every=0, **changes)
    assert apart == twin(config, tmp_path / "twin", victims)


@pytest.mark.parametrize("sampler", ["uniform", "deck"])
@pytest.mark.parametrize("fault", ["silence", "garbage for JSON", "its node is gone"])
def test_a_site_that_cannot_ask_is_left_out_of_the_round(fault, sampler, photos, tmp_path):
    answer, reason = REPLIES[fault]
    grid = ProcessGrid(nodes(photos), of_site("south", 0, "query.classes", answer))
    apart = run(photos, tmp_path / "run", grid, deadline=1.0, sampler=sampler)
    gone = at_site("south", 0)
    assert 0 < len(gone) < 4
    config = settings(photos, eval_every=0, sampler=sampler)
    assert apart == twin(config, tmp_path / "twin", {}, {0: gone})
    assert counted(records(tmp_path / "run")[0]) == {(name, reason): 1 for name in gone}


REQUESTS: dict[str, Callable[[Part, str], None]] = {
    "too many": lambda part, key: part.update({key: torch.arange(7).int()}),
    "none": lambda part, key: part.update({key: torch.zeros(0, dtype=torch.int32)}),
    "all": lambda part, key: part.__delitem__(key),
    "unsorted": lambda part, key: part.update({key: part[key].flip(0)}),
    "one twice": lambda part, key: part.update({key: torch.tensor([3, 3]).int()}),
    "beyond the table": lambda part, key: part.update({key: torch.tensor([3, 10]).int()}),
    "below it": lambda part, key: part.update({key: torch.tensor([-1, 3]).int()}),
    "near 2^31": lambda part, key: part.update({key: torch.tensor([2**31 - 1]).int()}),
    "long": lambda part, key: part.update({key: part[key].long()}),
    "floats": lambda part, key: part.update({key: part[key].float()}),
    "one number": lambda part, key: part.update({key: torch.tensor(3).int()}),
    "and more": lambda part, key: part.update({key.replace("ids", "own"): part[key]}),
}


@pytest.mark.parametrize("ahead", [False, True])
def test_a_request_that_cannot_be(ahead, photos, tmp_path):
    """Refused; but one that came ahead with an update is just asked for again, at its time."""
    faults = list(REQUESTS)
    changes = {"rounds": len(faults) + 2}
    # Of each round's clients one that was in the round before, so that its request comes ahead.
    victims = {
        round: [next(name for name in cohort(round) if name in cohort(round - 1))]
        for round in range(1, len(faults) + 1)
    }

    def spoil(node: int, message: Message, reply: Message) -> Sequence[Message]:
        kind, round = message.metadata.message_type, int(message.metadata.group_id)

        def change_it(metadata: dict[str, Any], tensors: dict[str, dict[str, Tensor]]) -> None:
            if kind == "train" and not ahead:
                # So that all must be asked again.
                del metadata["next"]
                return
            of_round = round + 1 if kind == "train" else round
            if of_round in victims and (ahead or kind == "query.classes"):
                key = f"{NAMES.index(victims[of_round][0])}/ids"
                if key in tensors["requests"]:
                    REQUESTS[faults[of_round - 1]](tensors["requests"], key)

        wanted = ("train", "query.classes") if not ahead else ("train",)
        return [edit(reply, message, change_it) if kind in wanted else reply]

    grid = ProcessGrid(nodes(photos), spoil)
    apart = run(photos, tmp_path / "run", grid, **changes)
    config = settings(photos, eval_every=0, **changes)
    assert apart == twin(config, tmp_path / "twin", {}, {} if ahead else victims)
    for round, record in enumerate(records(tmp_path / "run")):
        refused = [] if ahead else victims.get(round, [])
        assert counted(record) == {(name, "request"): 1 for name in refused}
        if round in victims:
            assert ("query.classes", HOME[victims[round][0]], str(round)) in grid.sent


def test_an_old_reply_is_refused(photos, tmp_path):
    kept: list[RecordDict] = []

    def spoil(node: int, message: Message, reply: Message) -> Sequence[Message]:
        if node == NODES["south"] and message.metadata.message_type == "train":
            kept.append(reply.content)
            if message.metadata.group_id == "1":
                return [Message(kept[0], reply_to=message)]
        return [reply]

    apart = run(photos, tmp_path / "run", ProcessGrid(nodes(photos), spoil))
    gone = at_site("south", 1)
    assert apart == twin(settings(photos, eval_every=0), tmp_path / "twin", {1: gone})
    assert counted(records(tmp_path / "run")[1]) == {(name, "stale"): 1 for name in gone}


def test_another_sites_reply_is_refused(photos, tmp_path):
    """South sends what north has sent: updates of clients that are not its own."""
    kept: dict[int, RecordDict] = {}

    def spoil(node: int, message: Message, reply: Message) -> Sequence[Message]:
        if (message.metadata.message_type, message.metadata.group_id) == ("train", "1"):
            kept[node] = reply.content
            if node == NODES["south"]:
                return [Message(kept[NODES["north"]], reply_to=message)]
        return [reply]

    assert at_site("north", 1)
    apart = run(photos, tmp_path / "run", ProcessGrid(nodes(photos), spoil))
    gone = at_site("south", 1)
    assert apart == twin(settings(photos, eval_every=0), tmp_path / "twin", {1: gone})
    assert counted(records(tmp_path / "run")[1]) == {(name, "damaged"): 1 for name in gone}


@pytest.mark.parametrize("kind", ["query.register", "query.classes", "train"])
def test_a_second_reply_is_counted_and_not_used(kind, photos, tmp_path):
    def twice(node: int, message: Message, reply: Message) -> Sequence[Message]:
        if node == NODES["south"] and message.metadata.message_type == kind:
            return [reply, edit(reply, message, lambda metadata, tensors: None)]
        return [reply]

    config = settings(photos, eval_every=0)
    grid = ProcessGrid(nodes(photos), twice)
    # All are there, so even the strictest quorum is met.
    apart = digests(lambda: federate(grid, config, tmp_path / "run", quorum=1.0))
    assert apart == twin(config, tmp_path / "twin", {})
    first = records(tmp_path / "run")[0]
    assert first["clients"] == 4
    there = [] if kind == "query.register" else at_site("south", 0)
    assert counted(first) == {(name, "twice"): 1 for name in there}


def test_what_an_error_says_stays_at_the_site(photos, tmp_path, monkeypatch):
    """A client that fails takes nobody with it, and names the kind of error alone."""
    client, replies = cohort(1)[1], []
    train = Workers.train

    def fail(self: Workers, plan: Any, work: Any) -> Any:
        if plan.round == 1 and work[0][0] == NAMES.index(client):
            raise ValueError("/photos/alice/naked.png is broken")
        return train(self, plan, work)

    def keep(node: int, message: Message, reply: Message) -> Sequence[Message]:
        replies.append(reply)
        return [reply]

    with monkeypatch.context() as patched:
        patched.setattr(Workers, "train", fail)
        apart = run(photos, tmp_path / "run", ProcessGrid(nodes(photos), keep))
    assert apart == twin(settings(photos, eval_every=0), tmp_path / "twin", {1: [client]})
    assert counted(records(tmp_path / "run")[1]) == {(client, "raised"): 1}
    spoken = json.dumps([unpack(reply)[0] for reply in replies])
    assert "alice" not in spoken
    assert "ValueError" in spoken


def test_a_site_that_fails_as_a_whole_says_no_more(photos, tmp_path, monkeypatch):
    told: list[str] = []
    build = site_module.build_model  # type: ignore[attr-defined]

    def fail(*arguments: Any) -> Any:
        if len(told) == 1:
            raise OSError("/photos/alice is gone")
        return build(*arguments)

    def keep(node: int, message: Message, reply: Message) -> Sequence[Message]:
        if (message.metadata.message_type, message.metadata.group_id) == ("train", "0"):
            told.append(json.dumps(unpack(reply)[0]))
        return [reply]

    monkeypatch.setattr(site_module, "build_model", fail)
    run(photos, tmp_path / "run", ProcessGrid(nodes(photos), keep))
    reasons = {reason for _, reason in counted(records(tmp_path / "run")[0])}
    assert reasons == {"raised"}
    assert any("OSError" in text for text in told)
    assert not any("alice" in text for text in told)


def test_offline_and_back_under_another_number(photos, tmp_path):
    """South is away in the second round, and comes back as another node."""

    def visit(round: int) -> None:
        if round == 1:
            away.append(grid.nodes.pop(NODES["south"]))
        if round == 2:
            grid.nodes[1234] = away[0]

    away: list[dict[str, Any]] = []
    grid = ProcessGrid(nodes(photos), visit=visit)
    apart = run(photos, tmp_path / "run", grid)
    gone = at_site("south", 1)
    assert apart == twin(settings(photos, eval_every=0), tmp_path / "twin", {1: gone})
    found = records(tmp_path / "run")
    assert counted(found[1]) == {(name, "offline"): 1 for name in gone}
    assert "failures" not in found[2]
    assert at_site("south", 2)
    assert ("train", 1234, "2") in grid.sent


def test_back_before_the_old_node_is_known_to_be_gone(photos, tmp_path):
    """For a while there are two nodes with the same clients: the new one must wait, not be lost."""

    def visit(round: int) -> None:
        if round == 1:
            grid.nodes[1234] = grid.nodes[NODES["south"]]
        if round == 2:
            grid.nodes.pop(NODES["south"], None)

    grid = ProcessGrid(nodes(photos), visit=visit)
    apart = run(photos, tmp_path / "run", grid)
    assert apart == twin(settings(photos, eval_every=0), tmp_path / "twin", {})
    assert all("failures" not in record for record in records(tmp_path / "run"))
    assert ("train", 1234, "2") in grid.sent


def test_a_site_that_goes_after_the_round_began(photos, tmp_path):
    class Leaving(ProcessGrid):
        def push_messages(self, messages: Any) -> Any:
            listed = list(messages)
            away = {}
            for message in listed:
                metadata = message.metadata
                if (metadata.message_type, metadata.group_id) == ("train", "1"):
                    away = {NODES["south"]: self.nodes.pop(NODES["south"])}
            ids = super().push_messages(listed)
            self.nodes |= away
            return ids

    apart = run(photos, tmp_path / "run", Leaving(nodes(photos)))
    gone = at_site("south", 1)
    assert apart == twin(settings(photos, eval_every=0), tmp_path / "twin", {1: gone})
    assert counted(records(tmp_path / "run")[1]) == {(name, "offline"): 1 for name in gone}


@pytest.mark.parametrize("refusal", [[None], [""], []])
def test_a_message_that_flower_does_not_take(refusal, photos, tmp_path):
    class Refusing(ProcessGrid):
        def push_messages(self, messages: Any) -> Any:
            (message,) = messages
            metadata = message.metadata
            where = (metadata.message_type, metadata.group_id, metadata.dst_node_id)
            if where == ("train", "1", NODES["south"]):
                return refusal
            return super().push_messages([message])

    apart = run(photos, tmp_path / "run", Refusing(nodes(photos)))
    gone = at_site("south", 1)
    assert apart == twin(settings(photos, eval_every=0), tmp_path / "twin", {1: gone})
    assert counted(records(tmp_path / "run")[1]) == {(name, "lost"): 1 for name in gone}


def test_one_message_is_in_memory_at_a_time(photos, tmp_path):
    """Each is sent before the next but one is made: payloads of all sites need not fit."""
    made: list[weakref.ref[Message]] = []

    class Counting(ProcessGrid):
        def push_messages(self, messages: Any) -> Any:
            (message,) = messages
            made.append(weakref.ref(message))
            assert sum(earlier() is not None for earlier in made) <= 2
            return super().push_messages([message])

    run(photos, tmp_path / "run", Counting(nodes(photos)), clients_per_round=6)
    assert len(made) >= 12


def silent_until(attempt: int, round: int) -> Spoil:
    """All die in a round's training, until it is begun for that time."""
    asked: Counter[int] = Counter()

    def spoil(node: int, message: Message, reply: Message) -> Sequence[Message]:
        if (message.metadata.message_type, message.metadata.group_id) != ("train", str(round)):
            return [reply]
        asked[node] += 1
        return [reply] if asked[node] >= attempt else [Message(Error(8, "x"), reply_to=message)]

    return spoil


def test_a_round_that_all_failed_is_begun_again(photos, tmp_path):
    config, grid = settings(photos, eval_every=0), ProcessGrid(nodes(photos), silent_until(3, 1))
    deployment = {"attempts": 3, "pause": 0.25}
    apart = digests(lambda: federate(grid, config, tmp_path / "run", **deployment))
    assert apart == twin(config, tmp_path / "twin", {})
    first, second, third = records(tmp_path / "run")
    assert second["attempts"] == 3
    assert second["clients"] == 4
    assert counted(second) == {(name, "died"): 2 for name in cohort(1)}
    assert second["seconds"]["pause"] >= 2 * 0.25
    assert "attempts" not in first
    assert "attempts" not in third


@pytest.mark.parametrize("checkpoint_every", [1, 9])
def test_the_run_ends_with_a_message_and_goes_on(checkpoint_every, photos, tmp_path):
    config = settings(photos, eval_every=0, checkpoint_every=checkpoint_every)
    grid, out = ProcessGrid(nodes(photos), silent_until(4, 1)), tmp_path / "run"

    def to_the_end() -> None:
        with pytest.raises(QuorumError) as raised:
            federate(grid, config, out, attempts=3)
        text = str(raised.value)
        assert "round 2: expected updates of at least 50% of 4 clients, got 0 (4 died" in text
        assert "3 times" in text
        assert "What was learnt before is kept" in text
        assert "goes on from there" in text
        assert text.count("\n") == 0
        assert newest_round(out / "checkpoint") == 1

    before = digests(to_the_end)
    after = digests(lambda: federate(grid, config, out, attempts=3))
    assert before + after == twin(config, tmp_path / "twin", {})
    assert [record["round"] for record in records(out)] == [1, 2, 3]


def diverging(*clients: str, from_round: int) -> Spoil:
    """These clients' updates are NaN from a round (0-based) on."""

    def spoil(node: int, message: Message, reply: Message) -> Sequence[Message]:
        kind, round = message.metadata.message_type, int(message.metadata.group_id)
        if kind == "train" and round >= from_round:
            for client in {*clients} & {*cohort(round)}:
                if HOME[client] == node:
                    reply = change_part(client, message, reply, put("backbone.values", NAN))
        return [reply]

    return spoil


def test_some_that_diverge_are_not_all(photos, tmp_path):
    """With three good updates nobody may say that no client comes to finite numbers."""
    config = settings(photos, eval_every=0, checkpoint_every=9)
    out, bad = tmp_path / "run", cohort(2)[1]
    grid = ProcessGrid(nodes(photos), diverging(bad, from_round=2))
    with pytest.raises(QuorumError, match=r"got 3 \(1 not finite.*2 times") as raised:
        federate(grid, config, out, quorum=0.9, attempts=2)
    assert "What was learnt before is kept" in str(raised.value)
    assert newest_round(out / "checkpoint") == 2
    assert [record["round"] for record in records(out)] == [1, 2]


@pytest.mark.parametrize("offline_in", [0, 1, 2])
def test_all_must_diverge_in_each_attempt(offline_in, photos, tmp_path):
    """In the given attempt (of two; 2: in neither) one site is not there to diverge."""
    config = settings(photos, eval_every=0, checkpoint_every=9)
    attempts: Counter[int] = Counter()
    diverge = diverging(*NAMES, from_round=1)

    def spoil(node: int, message: Message, reply: Message) -> Sequence[Message]:
        where = (message.metadata.message_type, message.metadata.group_id)
        if where == ("train", "1") and node == NODES["south"]:
            attempts[node] += 1
            if attempts[node] - 1 == offline_in:
                return [Message(Error(8, "x"), reply_to=message)]
        return diverge(node, message, reply)

    assert at_site("south", 1)
    expected = DivergedError if offline_in == 2 else QuorumError
    with pytest.raises(expected, match=r"2 times.*What was learnt before is kept") as raised:
        federate(ProcessGrid(nodes(photos), spoil), config, tmp_path / "run", attempts=2)
    assert ("no client comes to finite numbers" in str(raised.value)) == (offline_in == 2)
    assert newest_round(tmp_path / "run" / "checkpoint") == 1


def test_too_few_for_the_quorum(photos, tmp_path):
    """South has the most clients of a round: with them away, three quarters are not reached."""
    config = settings(photos, eval_every=0)
    answer, _ = REPLIES["its process died"]
    grid = ProcessGrid(nodes(photos), of_site("south", 1, "train", answer))
    with pytest.raises(QuorumError, match=r"at least 90% of 4 clients, got \d \(\d died"):
        federate(grid, config, tmp_path / "run", quorum=0.9, attempts=1)


def test_nobody_comes(photos, tmp_path):
    with pytest.raises(QuorumError, match="expected 3 sites within 1 s, found 0") as raised:
        federate(ProcessGrid({}), settings(photos), tmp_path / "run", deadline=1.0)
    assert "submit again, or set sites" in str(raised.value)


def test_full_with_an_empty_request(photos, tmp_path):
    """Who asks for all classes says nothing: a site that says nothing else asks for all."""
    config = settings(photos, eval_every=0, method="full")
    apart = digests(lambda: federate(ProcessGrid(nodes(photos)), config, tmp_path / "run"))
    assert apart == twin(config, tmp_path / "twin", {})


@pytest.mark.parametrize("reason", ["silence", "garbage for JSON"])
def test_a_newcomer_that_does_not_register(reason, photos, tmp_path):
    """It is asked in every round; but only once if it does not answer, since all wait for it."""
    answer, _ = REPLIES[reason]

    def spoil(node: int, message: Message, reply: Message) -> Sequence[Message]:
        return answer(message, reply) if node == 99 else [reply]

    grid = ProcessGrid(nodes(photos), spoil)
    grid.visit = lambda round: grid.nodes.update({99: grid.nodes[3]}) if round else None
    apart = run(photos, tmp_path / "run", grid, deadline=1.0)
    assert apart == twin(settings(photos, eval_every=0), tmp_path / "twin", {})
    asked = [group for kind, node, group in grid.sent if node == 99]
    assert asked == (["1"] if reason == "silence" else ["1", "2"])


def test_a_deadline_near_zero_cannot_be(photos, tmp_path):
    """Flower would throw the message back as expired before it is sent, and the run would end."""
    with pytest.raises(ConfigError, match="deadline: expected 1 to 1e7 seconds"):
        federate(ProcessGrid({}), settings(photos), tmp_path / "run", deadline=1e-9)


def test_what_came_while_the_server_was_at_work_is_in_time(photos, tmp_path):
    """Replies that lie ready when the deadline is over are taken."""

    class Slow(ProcessGrid):
        """The others come while the first one is looked at."""

        def pull_messages(self, message_ids: Any) -> Any:
            found = list(super().pull_messages(message_ids))
            if len(message_ids) < 3 or found[0].metadata.group_id != "1":
                yield from found
                return
            self.replies += found[1:]
            yield found[0]
            time.sleep(1.2)

    everyone = {"clients_per_round": 6}
    apart = run(photos, tmp_path / "run", Slow(nodes(photos)), deadline=1.0, **everyone)
    assert apart == twin(settings(photos, eval_every=0, **everyone), tmp_path / "twin", {})
    assert all("failures" not in record for record in records(tmp_path / "run"))


# Evaluation at sites.


def metrics_at(site: str, photos: Path, run: fedss.Run | None, manifest: str = "{}.csv") -> Any:
    config = settings(photos)
    data = load_dataset(
        "csv",
        str(photos / manifest.format(site)),
        image_size=config.image_size,
        channels=config.channels,
        test_classes=config.test_classes,
        skip_broken=config.skip_broken,
        seed=config.data_seed,
        at_site=True,
    )
    task = data.test or data.validation
    return task if run is None or task is None else fedss.evaluate(run.embedder, task)


def weighted(found: Sequence[Any]) -> dict[str, float]:
    total = sum(metrics.queries for metrics in found)
    means = {
        name: sum(getattr(metrics, name) * metrics.queries for metrics in found) / total
        for name in ("recall_at_1", "recall_at_5", "map_at_10", "map_at_r")
    }
    counts = {
        name: sum(getattr(metrics, name) for metrics in found)
        for name in ("queries", "classes", "skipped")
    }
    means["map_at_10_by_class"] = (
        sum(metrics.map_at_10_by_class * metrics.classes for metrics in found) / counts["classes"]
    )
    return {**means, **counts, "sites": len(found)}


@pytest.mark.parametrize("backbone_down", ["float32", "int4"])
def test_sites_judge_the_model_together(backbone_down, photos, tmp_path):
    grid, config = ProcessGrid(nodes(photos)), settings(photos, backbone_down=backbone_down)
    done = federate(grid, config, tmp_path / "run", **{"evaluate-at": "sites"})
    found = [metrics_at(site, photos, done) for site in SITES]
    assert all(metrics is not None for metrics in found)
    assert records(tmp_path / "run")[-1]["metrics"] == pytest.approx(weighted(found))
    assert len({metrics.queries for metrics in found}) > 1
    assert done.summary["map_at_10"] == pytest.approx(weighted(found)["map_at_10"])
    assert done.summary["gallery"] == "each site's own"
    assert done.summary["map_at_10_interval"] is None
    floors = [data_floors(metrics_at(site, photos, None)).map_at_10 for site in SITES]
    shares = [metrics.queries / sum(m.queries for m in found) for metrics in found]
    for name in ("chance", "pixels"):
        expected = sum(s * f[name] for s, f in zip(shares, floors, strict=True))
        assert done.summary["floors"][name] == pytest.approx(expected)
    first = build_embedder(
        config.backbone,
        channels=config.channels,
        image_size=config.image_size,
        embedding_size=config.embedding_size,
        seed=config.seed,
    )
    before = weighted([fedss.evaluate(first, metrics_at(site, photos, None)) for site in SITES])
    assert done.summary["floors"]["untrained"] == pytest.approx(before["map_at_10"], abs=1e-6)
    # No image leaves its site.
    assert not (done.folder / "retrieval.npz").exists()
    assert not (done.folder / "tensorboard" / "projector_config.pbtxt").exists()


def test_sites_judge_by_the_images_that_the_configuration_names(photos, tmp_path):
    """Settings are chosen on validation images; the test must not be touched meanwhile."""
    found = nodes(photos)
    for site, number in NODES.items():
        text = (photos / f"{site}.csv").read_text().replace(",test\n", ",validation\n")
        text = text.replace(",test\r\n", ",validation\r\n")
        (photos / f"{site}-validation.csv").write_text(text)
        found[number] = site_of(photos, f"{site}-validation.csv")
    config, at_sites = settings(photos, eval_split="validation"), {"evaluate-at": "sites"}
    done = federate(ProcessGrid(found), config, tmp_path / "run", **at_sites)
    there = [metrics_at(site, photos, done, "{}-validation.csv") for site in SITES]
    assert records(tmp_path / "run")[-1]["metrics"] == pytest.approx(weighted(there))


def test_a_validation_task_of_training_classes_is_the_same_at_all_sites(photos, tmp_path):
    """A simulation and a federation hold out the same classes, so they have the same figures."""
    for site in (*SITES, "all"):
        lines = (photos / f"{site}.csv").read_text().splitlines()
        rows = [line.rpartition(",")[0] for line in lines]
        rows = [re.sub("^(.*?)/.*,test$", r"\g<0> at \1", row) for row in rows]
        (photos / f"{site}-unsplit.csv").write_text("".join(f"{row}\n" for row in rows))
    config = settings(
        photos,
        data_path=str(photos / "all-unsplit.csv"),
        data_seed=4,
        eval_split="validation",
        patience=1,
        sample_size=5,
    )
    found = {number: site_of(photos, f"{site}-unsplit.csv") for site, number in NODES.items()}
    done = federate(ProcessGrid(found), config, tmp_path / "run")
    local = fedss.train(config, tmp_path / "local")
    figures = [[r["metrics"] for r in records(run.folder)] for run in (done, local)]
    assert figures[0] == figures[1]
    trained = set(json.loads((tmp_path / "run" / "registry.json").read_text())["classes"])
    held_out = set(fedss.load_data(config).validation.query.class_names)
    assert held_out
    assert trained
    assert not trained & held_out


@pytest.fixture
def untested(photos, tmp_path):
    """Nodes of which those of the given sites have no images to test with."""

    def without_tests(*sites: str) -> dict[int, dict[str, Any]]:
        found = nodes(photos)
        for site in sites:
            lines = (photos / f"{site}.csv").read_text().splitlines(keepends=True)
            manifest = photos / f"{site}-untested.csv"
            manifest.write_text("".join(line for line in lines if ",test" not in line))
            found[NODES[site]] = site_of(photos, manifest)
        return found

    return without_tests


def test_a_site_without_tests_and_one_that_fails(photos, tmp_path, untested):
    answer, _ = REPLIES["garbage for JSON"]
    spoils = [of_site("south", round, "evaluate", answer) for round in (1, 2, 3)]

    def spoil(node: int, message: Message, reply: Message) -> Sequence[Message]:
        for each in spoils:
            (reply,) = each(node, message, reply)
        return [reply]

    grid = ProcessGrid(untested("west"), spoil)
    done = federate(grid, settings(photos), tmp_path / "run", **{"evaluate-at": "sites"})
    of_north = weighted([metrics_at("north", photos, done)])
    assert records(tmp_path / "run")[-1]["metrics"] == pytest.approx(of_north)


def test_a_site_whose_test_is_of_one_class_tells_nothing(photos, tmp_path):
    found = nodes(photos)
    lines = (photos / "west.csv").read_text().splitlines()
    tested = [line for line in lines if line.endswith(",test")]
    label = tested[0].split(",")[1]
    others = [line for line in tested if line.split(",")[1] != label]
    assert others
    manifest = photos / "west-one.csv"
    manifest.write_text("".join(f"{line}\n" for line in lines if line not in others))
    found[NODES["west"]] = site_of(photos, manifest)
    done = federate(
        ProcessGrid(found), settings(photos), tmp_path / "run", **{"evaluate-at": "sites"}
    )
    rest = [metrics_at(site, photos, done) for site in SITES if site != "west"]
    assert records(tmp_path / "run")[-1]["metrics"] == pytest.approx(weighted(rest))


@pytest.mark.report
def test_nobody_can_judge(photos, tmp_path, untested):
    grid, out = ProcessGrid(untested(*SITES)), tmp_path / "run"
    done = federate(grid, settings(photos), out, **{"evaluate-at": "sites"})
    assert [record["metrics"] for record in records(out)] == [None] * 3
    assert done.summary["map_at_10"] is None
    assert done.summary["floors"] == {}
    assert json.loads((out / "summary.json").read_text())[0]["recall_at_1"] is None
    assert (out / "model" / "model.safetensors").exists()
    assert (out / "report.html").exists()
