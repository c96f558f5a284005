"""Whatever a site sends, the server does not fall: it is refused, or it is an update after all."""

import json
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from fedss.config import Config
from fedss.core.class_rows import create_class_rows, with_sums
from fedss.core.client import ClientUpdate, shared_classes
from fedss.core.engine import Failure
from fedss.core.optimizers import ServerOptimizer
from fedss.core.state import ServerState
from fedss.evaluation.intervals import floor_order
from fedss.evaluation.retrieval import RetrievalMetrics
from fedss.flower.engine import FlowerEngine
from fedss.flower.registry import Growth, Registry
from fedss.flower.settings import Deployment
from fedss.flower.sites import Site, Sites
from fedss.flower.validation import MOST_EXAMPLES
from fedss.seeds import generator
from fedss.settings import resolve
from fedss.training.build import round_plan
from fedss.wire.messages import WireFormat, encode_update
from tests.flower_grid import through_the_wire

N, D, LAYOUT = 9, 4, (torch.Size([3, 8]), torch.Size([5]))
IDS, CLIENTS, ROUND = torch.tensor([0, 2, 5]), (0, 1), 0

Content = RecordDict | Error | None


class GarbageGrid:
    """One node, which answers each kind of message as it likes."""

    def __init__(self, answers: dict[str, Content]) -> None:
        self.answers, self.replies = answers, list[Message]()
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        (message,) = messages
        message_id = f"message {id(message)}"
        arrived = through_the_wire(message)
        arrived.metadata.__dict__["_message_id"] = message_id
        content = self.answers.get(message.metadata.message_type)
        if content is not None:
            self.replies.append(through_the_wire(Message(content, reply_to=arrived)))
        return [message_id]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        found, self.replies = self.replies, []
        return found

    def get_node_ids(self) -> Iterable[int]:
        return [5, 6]


class Impatient(Deployment):
    """Whatever was not answered at once never is."""

    def __post_init__(self) -> None:
        pass


METHODS: dict[str, dict[str, Any]] = {
    "fedss": {},
    "moments int8": {"method": "moments", "rows_up": "int8", "backbone_up": "int8"},
    "eigenvectors": {"method": "moments", "rows_up": "int4", "moments_rank": 2},
    "full": {"method": "full"},
    "deck": {"sampler": "deck"},
    "all": {"requests": "all", "rows_up": "int8"},
    "common": {"requests": "common"},
}


def engine_of(changes: dict[str, Any], answers: dict[str, Content], folder: Path) -> Any:
    """Engine, state and plan of one site with two clients."""
    config = Config(**{"sample_size": 4, "embedding_size": D, **changes})
    wire = WireFormat(
        LAYOUT, D, N, "float32", config.rows_up, "float32", config.backbone_up, config.moments_rank
    )
    optimizer = ServerOptimizer()
    clients = tuple(f"client {k}" for k in CLIENTS)
    known = Registry(tuple(f"c{i}" for i in range(N)), clients, "", (Growth(0, N, len(CLIENTS)),))
    sites = Sites(
        GarbageGrid(answers),
        {"version": "1", "config": {}},
        Impatient("/srv/run", deadline=0.0),
        folder / "registry.json",
        known,
        {5: Site("stamp", np.arange(N, dtype=np.int32), {k: k for k in CLIENTS})},
    )
    engine = FlowerEngine(sites, 9, 2, optimizer, wire, lambda phase: None)
    rows = create_class_rows(N, D, optimizer.slots, 0)
    plan = round_plan(resolve(config, None)[0], N, ROUND)
    if plan.method.moments:
        rows = with_sums(rows)
    theta_P = torch.zeros(29)
    return engine, ServerState(theta_P, {"momentum": theta_P.clone()}, rows, ROUND), plan


texts = st.one_of(
    st.text(st.characters(codec=None), max_size=5),
    st.sampled_from(["0", "1", "raised", "version", "c1", "client 0", "\ud800", "9" * 30]),
)
values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.sampled_from([ROUND, ROUND - 1, 0, 1, 10**300, -1]),
        st.floats(),
        texts,
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=6,
)
metrics = st.fixed_dictionaries(
    dict.fromkeys(
        [field.name for field in fields(RetrievalMetrics)],
        st.one_of(st.just(1), st.sampled_from([0, 0.5, float("nan"), -1, 2**70, True]), values),
    )
)
names = st.one_of(st.lists(texts, max_size=3).map(lambda t: sorted(set(t))), values)
told = st.fixed_dictionaries(
    {"round": st.one_of(st.just(ROUND), values)},
    optional={
        "error": values,
        "detail": values,
        "failed": st.one_of(values, st.dictionaries(st.sampled_from(["0", "1"]), values)),
        "next": st.one_of(values, st.lists(st.one_of(st.sampled_from(CLIENTS), values))),
        "changed": st.one_of(
            values, st.fixed_dictionaries({"classes": names, "clients": names, "secret": names})
        ),
        "metrics": st.one_of(metrics, values),
        "floors": st.one_of(
            values, st.dictionaries(st.sampled_from(["chance", "pixels", "x"]), values)
        ),
        "classes": names,
        "clients": names,
        "secret": st.one_of(st.just(""), values),
    },
)
DTYPES = [torch.float32, torch.float64, torch.int32, torch.int64, torch.int8, torch.uint8]
DTYPES += [torch.bfloat16, torch.bool, torch.float16]
SPECIAL = [0.0, 1.0, float("nan"), float("inf"), -1.0, 3e38, 7.0, 8.0, 100.0]


@st.composite
def tensors(draw: Any) -> torch.Tensor:
    shape = draw(st.sampled_from([(), (0,), (1,), (3,), (3, D), (1, D), (29,), (24,), (5,), (6,)]))
    filled = torch.full(shape, draw(st.sampled_from(SPECIAL)), dtype=torch.float64)
    if draw(st.booleans()):
        return filled.float()
    return filled.nan_to_num().clamp(-100, 100).to(draw(st.sampled_from(DTYPES)))


def asked_for(plan: Any) -> torch.Tensor:
    if plan.method.negatives == "all":
        return torch.arange(N)
    shared_R = shared_classes(plan)
    return IDS if shared_R is None else shared_R


def honest(plan: Any, wire: WireFormat, client: int) -> dict[str, torch.Tensor]:
    ids_S = asked_for(plan)
    update = ClientUpdate(client, torch.ones(29), ids_S, torch.ones(len(ids_S), D), 2, 0.5)
    return dict(encode_update(wire, update, generator(0, "x")))


@st.composite
def contents(draw: Any, parts: Callable[[int], dict[str, torch.Tensor]]) -> Content:
    """What a site may say: from nearly right to anything at all."""
    kind = draw(st.sampled_from(["nearly", "nearly", "nearly", "any", "error", "none"]))
    if kind == "none":
        return None
    if kind == "error":
        return Error(draw(st.integers(-(2**31), 2**31 - 1)), draw(st.text(max_size=5)))
    text = json.dumps(draw(told if kind == "nearly" else values))
    text = draw(st.sampled_from([text, text, text, text[:-1], "[" * 5000]))
    buffers = {}
    for name in draw(st.sets(st.sampled_from(["updates", "requests", "x"]))):
        held = {f"{k}/{n}": t for k in CLIENTS for n, t in parts(k).items()}
        if name == "requests":
            held = {f"{k}/ids": IDS.int() for k in CLIENTS}
        for key in draw(st.sets(st.sampled_from([*held, "2/ids", "x", "1/", "0/y"]), max_size=3)):
            if draw(st.booleans()):
                held[key] = draw(tensors())
            else:
                held.pop(key, None)
        data = bytearray(save(held))
        for place in draw(st.lists(st.integers(0, len(data) - 1), max_size=2)):
            data[place] = draw(st.integers(0, 255))
        if draw(st.sampled_from([True, False, False])):
            data = data[: draw(st.integers(0, len(data)))]
        buffers[name] = Array("uint8", (len(data),), "safetensors", bytes(data))
    record = RecordDict({"fedss": ConfigRecord({"json": text})})
    if draw(st.sampled_from([True, True, True, False])):
        record["fedss.tensors"] = ArrayRecord(buffers)
    return record


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=150)
@given(data=st.data())
def test_the_server_stands_whatever_a_site_sends(method, data):
    with tempfile.TemporaryDirectory() as folder:
        answers: dict[str, Content] = {}
        engine, state, plan = engine_of(METHODS[method], answers, Path(folder))
        content = contents(lambda k: honest(plan, engine.wire, k))
        for kind in ("query.register", "query.classes", "train", "evaluate"):
            answers[kind] = data.draw(content, kind)
        if data.draw(st.booleans(), "has asked"):
            asked = torch.arange(N) if plan.method.negatives == "all" else IDS
            engine.requests[ROUND, N] = dict.fromkeys(CLIENTS, asked)
        results = list(engine.train(state, np.array(CLIENTS), plan))
        assert {result.client for result in results} == {*CLIENTS}
        for result in results:
            if isinstance(result, Failure):
                assert result.reason.isprintable()
                assert result.detail.isprintable()
                assert len(result.detail) <= 300
                continue
            assert 0 < result.num_examples <= MOST_EXAMPLES
            assert abs(result.loss) < float("inf")
            assert result.backbone_delta_P.shape == (29,)
            assert result.rows_delta_SD.shape == (len(result.ids_S), D)
            assert result.backbone_delta_P.isfinite().all()
            assert result.rows_delta_SD.isfinite().all()
        for round in (ROUND, 0):
            found, floors = engine.evaluate(state.backbone_P, round)
            rates = ("map_at_10", "map_at_10_by_class", "recall_at_1")
            assert found is None or all(0 <= found[name] <= 1 for name in rates)
            assert len(floor_order(floors)) == len(floors)
            assert all(0 <= value <= 1 for value in floors.values())
            json.dumps([found, floors], allow_nan=False)
        for (_, n), requests in engine.requests.items():
            for ids_S in requests.values():
                assert int(ids_S[0]) >= 0
                assert int(ids_S[-1]) < n


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"deck"}))
def test_what_the_garbage_is_made_of_is_an_update(method, tmp_path):
    engine, state, plan = engine_of(METHODS[method], {}, tmp_path)
    parts = {f"{k}/{n}": t for k in CLIENTS for n, t in honest(plan, engine.wire, k).items()}
    data = save(parts)
    engine.sites.grid.answers["train"] = RecordDict(
        {
            "fedss": ConfigRecord({"json": json.dumps({"round": ROUND})}),
            "fedss.tensors": ArrayRecord(
                {"updates": Array("uint8", (len(data),), "safetensors", data)}
            ),
        }
    )
    engine.requests[ROUND, N] = dict.fromkeys(CLIENTS, asked_for(plan))
    results = list(engine.train(state, np.array(CLIENTS), plan))
    assert [type(result) for result in results] == [ClientUpdate] * 2
