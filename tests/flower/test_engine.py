"""The engine of a federation: the local engine's bits, and nothing that a site does wrong."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

import fedss
from fedss.core import client
from fedss.flower.messages import REQUEST, TRAIN
from fedss.flower.server_app import line
from fedss.models import fingerprint, load_embedder
from fedss.secret import draw_key
from fedss.seeds import generator
from tests.flower_grid import ProcessGrid, digests, serialized
from tests.sites import CLIENTS, SITES, federate, nodes, settings, write_photos, write_secret


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder)
    return folder


VARIANTS = {
    **{method: {"method": method} for method in fedss.METHODS if method != "central"},
    "deck": {"sampler": "deck"},
    "sticky": {"sampler": "sticky"},
    "all": {"requests": "all", "rows_down": "int8", "rows_up": "int8"},
    "common": {"requests": "common", "sample_size": 3, "method": "fedss-published"},
    "covered": {"method": "moments", "cover": 2, "sampler": "deck"},
    "int4": {
        "rows_down": "int8",
        "rows_up": "int4",
        "backbone_down": "int8",
        "backbone_up": "int4",
    },
    "moments int8": {
        "method": "moments",
        "rows_up": "int8",
        "rows_down": "int8",
        "moments_rank": 3,
    },
    "augmented": {"augment": "drawings"},
    "whitened": {"projection_init": "whitened", "rows_init": "means"},
    "whitened, without rows": {"projection_init": "whitened", "rows_init": "random"},
    "frozen": {"projection_init": "whitened", "trainable": "last-1", "method": "moments"},
    "clipped": {"clip": "0.05", "rows_up": "int8"},
    "clipped apart": {"clip": "0.05", "row_clip": 0.2},
    "adaptive": {"clip": "adaptive:0.05", "method": "full"},
    "bfloat16": {"rows_down": "bfloat16", "rows_up": "bfloat16", "backbone_up": "bfloat16"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_bits_of_the_local_engine_after_every_round(variant, photos, tmp_path):
    config = settings(photos, **VARIANTS[variant])
    local = digests(lambda: fedss.train(config, tmp_path / "local", on_round=lambda record: None))
    grid = ProcessGrid(nodes(photos), seed=1)
    apart = digests(lambda: federate(grid, config, tmp_path / "apart"))
    assert len(local) == 3
    assert apart == local
    assert len(set(local)) == 3
    shown = [(tmp_path / name / "retrieval.npz").read_bytes() for name in ("local", "apart")]
    assert shown[0] == shown[1]
    assert (tmp_path / "apart" / "tensorboard" / "projector_config.pbtxt").exists()


def test_each_site_has_a_secret_of_its_own(photos, tmp_path, monkeypatch):
    """The bits of a simulation that gives each client its site's; not of one that knows none."""
    changes = {"rows_up": "int8", "augment": "drawings", "sample_size": 5, "eval_every": 0}
    config = settings(photos, **changes)
    files = {site: write_secret(tmp_path / site, site) for site in SITES}
    found = nodes(photos)
    for node, file in zip(found.values(), files.values(), strict=True):
        node["own-secret-file"] = str(file)
    apart = digests(lambda: federate(ProcessGrid(found), config, tmp_path / "apart"))
    keys = [draw_key(files[s].read_bytes().strip()) for s in SITES for _ in CLIENTS[s]]

    def each_its_own(seed, purpose, round, number, secret):
        return generator(seed, purpose, round, number, secret and keys[number])

    monkeypatch.setattr(client, "generator", each_its_own)
    quiet = {"on_round": lambda record: None}
    assert digests(lambda: fedss.train(config, tmp_path / "local", **quiet)) == apart
    unkeyed = dataclasses.replace(config, secret_file=None)
    known = digests(lambda: fedss.train(unkeyed, tmp_path / "unkeyed", **quiet))
    assert not {*known} & {*apart}


def test_a_federation_goes_on_beyond_its_end(photos, tmp_path, caplog):
    def run(rounds: int, name: str) -> fedss.Run:
        config = settings(photos, rounds=rounds, lr_schedule="constant")
        with caplog.at_level("INFO", "fedss"):
            return federate(ProcessGrid(nodes(photos)), config, tmp_path / name)

    run(2, "run")
    # One line a round: the server's own stands in place of what others log.
    told = [message.split("  ")[0] for message in caplog.messages if "/2" in message]
    assert told == ["round 1/2", "round 2/2"]
    assert not [r for r in caplog.records if r.name == "fedss.progress"]
    grown, whole = run(4, "run"), run(4, "whole")
    assert fingerprint(grown.embedder) == fingerprint(whole.embedder)
    first = load_embedder(tmp_path / "run" / "checkpoint" / "first")
    assert fingerprint(first) != fingerprint(grown.embedder)
    for name in ("summary.json", "model/model.safetensors"):
        (tmp_path / "run" / name).unlink()
    assert fingerprint(fedss.load(tmp_path / "run")) == fingerprint(whole.embedder)


@pytest.mark.parametrize("variant", ["fedss", "deck", "moments", "all", "common"])
def test_requests_travel_ahead(variant, photos, tmp_path):
    """A site that trained in the last round is not asked again: one message to it in this one."""
    grid = ProcessGrid(nodes(photos))
    federate(grid, settings(photos, rounds=8, **VARIANTS[variant]), tmp_path / "run")
    requested = {(node, int(round)) for kind, node, round in grid.sent if kind == REQUEST}
    trained = [(node, int(round)) for kind, node, round in grid.sent if kind == TRAIN]
    assert len(set(trained)) == len(trained)
    first = {(node, 0) for node in grid.nodes}
    unknown = {(node, round) for node, round in trained if (node, round - 1) not in trained}
    assert requested == unknown
    assert requested & first
    assert len(requested) < len(trained) / 2


def test_the_log_has_a_line_for_each_round():
    record = {
        "round": 3,
        "loss": 4.5678,
        "clients": 9,
        "seconds": {"request": 0.5, "train": 12.75},
        "metrics": {"map_at_10": 0.4321},
        "failures": [
            {"client": "ada", "reason": "deadline"},
            {"client": "ben", "reason": "deadline"},
        ],
    }
    start = "round 3/12  loss 4.568  9 clients  13.2 s"
    assert line(record, 12, None) == f"{start}  MAP@10 0.432"
    record["metrics"] = None
    assert line(record, 12, None) == start


@pytest.mark.parametrize("precision", ["float32", "int4"])
@pytest.mark.parametrize(
    "told",
    [{"method": "full"}, {}, {"method": "moments"}, {"requests": "all"}, {"requests": "common"}],
    ids=str,
)
def test_the_ledger_is_what_flower_sends(told, precision, photos, tmp_path):
    sent = {"down": 0, "up": 0}

    def count(node: int, message: Any, reply: Any) -> list[Any]:
        if message.metadata.message_type in (REQUEST, TRAIN):
            for way, of_way in (("down", message), ("up", reply)):
                sent[way] += sum(map(len, serialized(of_way).values()))
        return [reply]

    wire = {f"{part}_{way}": precision for part in ("rows", "backbone") for way in ("down", "up")}
    config = settings(photos, backbone="conv4-64", embedding_size=32, **told, **wire)
    run = federate(ProcessGrid(nodes(photos), count), config, tmp_path / "run")
    records = [json.loads(line) for line in (run.folder / "records.jsonl").read_text().splitlines()]
    for way, size in sent.items():
        counted = sum(record[f"bytes_{way}"] for record in records)
        assert counted == pytest.approx(size, rel=0.05)
        assert counted <= size
