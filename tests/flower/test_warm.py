"""A federation's first step: sites tell of their features, and what cannot be is left out."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from flwr.app import Message
from safetensors.torch import load_file
from torch import Tensor

import fedss
from fedss.core.features import FeatureSums
from fedss.engines.local import LocalEngine
from fedss.errors import QuorumError
from fedss.flower.messages import FEATURES, TRAIN, buffer, pack, unpack
from fedss.runs.records import read_records
from tests.flower_grid import ProcessGrid, digests, serialized
from tests.sites import CLIENTS, SITES, federate, nodes, settings, write_photos

NODES = dict(zip(SITES, (3, 10, 17), strict=True))
NAMES = sorted(name for names in CLIENTS.values() for name in names)
WHITENED = {"projection_init": "whitened", "rows_init": "means", "rounds": 2}

Change = Callable[[Tensor], Tensor]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder)
    return folder


def spoiling(nodes: Sequence[int], content: Callable[[Message], Any]) -> Any:
    """Replies of these nodes about features, with another content."""

    def spoil(node: int, message: Message, reply: Message) -> list[Message]:
        if message.metadata.message_type == FEATURES and node in nodes:
            reply.content = content(reply)
        return [reply]

    return spoil


def with_sums(name: str, change: Change) -> Callable[[Message], Any]:
    def content(reply: Message) -> Any:
        metadata, buffers = unpack(reply)
        sums = {
            key: change(tensor) if key.endswith(f"/{name}") else tensor
            for key, tensor in buffers["sums"].items()
        }
        return pack(metadata, sums=buffer(sums))

    return content


RUBBISH: Mapping[str, Callable[[Message], Any]] = {
    "not finite": with_sums("factor", lambda t: t / 0),
    "ids of no dimension": with_sums("ids", Tensor.sum),
    "of another class": with_sums("ids", lambda t: t + 99),
    "an error": lambda reply: pack({"error": "raised", "detail": "ValueError"}),
    "nothing": lambda reply: pack(unpack(reply)[0]),
    "all clients failed": lambda reply: pack(
        {"round": 0, "failed": {str(k): "ValueError" for k in range(len(NAMES))}}
    ),
}


@pytest.mark.parametrize("what", RUBBISH)
def test_a_site_that_tells_rubbish_is_left_out_of_the_whitening_alone(
    what: str, photos: Path, tmp_path: Path
) -> None:
    config = settings(photos, **WHITENED)
    ask, north = LocalEngine.feature_sums, [NAMES.index(name) for name in CLIENTS["north"]]

    def without(
        engine: LocalEngine, backbone_P: Tensor, clients: Sequence[int], by_class: bool
    ) -> list[FeatureSums]:
        return ask(engine, backbone_P, [k for k in clients if k not in north], by_class)

    with patch.object(LocalEngine, "feature_sums", without):
        local = digests(lambda: fedss.train(config, tmp_path / "local", on_round=lambda r: None))
    grid = ProcessGrid(nodes(photos), spoiling([NODES["north"]], RUBBISH[what]))
    assert digests(lambda: federate(grid, config, tmp_path / "apart")) == local
    record, _ = read_records(tmp_path / "apart" / "records.jsonl", 2)
    assert record["warm_start"]["clients"] == len(NAMES) - len(north)
    # It trains like the others.
    assert "failures" not in record, record.get("failures")
    assert (TRAIN, NODES["north"], "0") in grid.sent


def test_where_nobody_tells_of_features_the_run_ends_in_one_line(
    photos: Path, tmp_path: Path
) -> None:
    grid = ProcessGrid(nodes(photos), spoiling([*NODES.values()], RUBBISH["not finite"]))
    with pytest.raises(QuorumError, match=r"no site told of its features \(not finite") as caught:
        federate(grid, settings(photos, **WHITENED), tmp_path / "run")
    assert "\n" not in str(caught.value)
    # The same run begins when they do.
    federate(ProcessGrid(nodes(photos)), settings(photos, **WHITENED), tmp_path / "run")
    federate(ProcessGrid(nodes(photos)), settings(photos, **WHITENED), tmp_path / "whole")
    models = [load_file(tmp_path / n / "model/model.safetensors") for n in ("run", "whole")]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_a_federation_that_was_killed_goes_on_and_asks_nobody_again(
    photos: Path, tmp_path: Path
) -> None:
    config = settings(photos, **WHITENED, trainable="last-1")

    def die(node: int, message: Message, reply: Message) -> list[Message]:
        if message.metadata.message_type == TRAIN and message.metadata.group_id == "1":
            raise KeyboardInterrupt
        return [reply]

    federate(ProcessGrid(nodes(photos)), config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        federate(ProcessGrid(nodes(photos), die), config, tmp_path / "run")
    grid = ProcessGrid(nodes(photos))
    federate(grid, config, tmp_path / "run")
    assert FEATURES not in {kind for kind, _, _ in grid.sent}
    models = [load_file(tmp_path / n / "model/model.safetensors") for n in ("run", "whole")]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_the_ledger_of_the_whitening_is_what_flower_sends(photos: Path, tmp_path: Path) -> None:
    sent = {"up": 0, "messages": 0}

    def count(node: int, message: Message, reply: Message) -> list[Message]:
        if message.metadata.message_type == FEATURES:
            sent["messages"] += 1
            sent["up"] += sum(map(len, serialized(reply).values()))
        return [reply]

    grid = ProcessGrid(nodes(photos), count)
    federate(grid, settings(photos, **WHITENED), tmp_path / "run")
    record, later = read_records(tmp_path / "run" / "records.jsonl", 2)
    told = record["warm_start"]
    # One message to each site; safetensors has a header for each client's tensors there, too.
    assert sent["messages"] == len(SITES)
    assert told["clients"] == len(NAMES)
    assert told["bytes_up"] == pytest.approx(sent["up"], rel=0.35)
    assert "warm_start" not in later
