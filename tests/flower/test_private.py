"""Federations with differential privacy: the bits of a simulation, and a key of their own."""

import json
from contextlib import contextmanager, suppress

import pytest

import fedss
from fedss import ConfigError
from fedss.core.algorithm import draw_cohort
from fedss.core.privacy import Noise
from fedss.flower import server_app
from fedss.flower.messages import TRAIN, by_client, unpack
from fedss.flower.settings import Deployment, write_app
from fedss.models import fingerprint
from fedss.training import federation
from fedss.training.private import server_key
from tests.flower.test_engine import photos
from tests.flower_grid import ProcessGrid, digests
from tests.sites import federate, nodes, settings

__all__ = ["photos"]
PRIVATE = {"method": "full", "clip": "adaptive:0.5", "noise": 0.5, "delta": 0.01, "rounds": 5}


def test_the_bits_of_a_simulation_with_the_same_key(photos, tmp_path, monkeypatch):
    key = b"k" * 32

    @contextmanager
    def known(config, folder):
        yield key

    monkeypatch.setattr(federation, "simulation_key", lambda config, data: key)
    monkeypatch.setattr(server_app, "server_key", known)
    config = settings(photos, **PRIVATE, rows_up="int8")
    local = digests(lambda: fedss.train(config, tmp_path / "local", on_round=lambda record: None))
    grid = ProcessGrid(nodes(photos), seed=1)
    apart = digests(lambda: federate(grid, config, tmp_path / "apart"))
    assert apart == local
    assert len(set(local)) == 5
    sizes = {len(draw_cohort(6, 4, config.seed, r, noise=Noise(0.5, 4, key))) for r in range(5)}
    assert len(sizes) > 1
    told = [
        [json.loads(line) for line in (tmp_path / name / "records.jsonl").read_text().splitlines()]
        for name in ("local", "apart")
    ]
    for one, other in zip(*told, strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}


def test_a_federation_has_a_key_of_its_own_and_destroys_it(photos, tmp_path):
    config, found = settings(photos, **PRIVATE), []

    def look(round: int) -> None:
        found.append((tmp_path / "one" / "noise.secret").exists())

    one = federate(ProcessGrid(nodes(photos), visit=look), config, tmp_path / "one")
    other = federate(ProcessGrid(nodes(photos)), config, tmp_path / "other")
    assert found[-1]
    assert not (tmp_path / "one" / "noise.secret").exists()
    assert fingerprint(one.embedder) != fingerprint(other.embedder)


def test_a_key_stays_until_the_run_is_done(photos, tmp_path):
    config, keys = settings(photos, **PRIVATE), []
    for _ in range(2):
        with suppress(KeyboardInterrupt), server_key(config, tmp_path) as key:
            keys.append(key)
            raise KeyboardInterrupt
    assert (tmp_path / "noise.secret").stat().st_mode & 0o777 == 0o600
    with server_key(config, tmp_path) as key:
        keys.append(key)
    assert len(set(keys)) == 1
    with server_key(config, tmp_path) as key:
        assert key not in keys
    with server_key(settings(photos), tmp_path) as key:
        assert key is None


def test_nothing_that_noise_does_not_hide_leaves_a_client(photos, tmp_path):
    """Whatever a client holds, its messages differ in what is clipped alone."""
    sent = []

    def listen(node, message, reply):
        if message.metadata.message_type == TRAIN:
            sent.append(reply)
        return [reply]

    federate(ProcessGrid(nodes(photos), listen), settings(photos, **PRIVATE), tmp_path / "run")
    updates = [
        update
        for reply in sent
        for update in by_client(unpack(reply)[1].get("updates", {})).values()
    ]
    assert updates
    assert {int(update["num_examples"]) for update in updates} == {1}
    assert {float(update["loss"]) for update in updates} == {0.0}
    shapes = [{name: (t.shape, t.dtype) for name, t in update.items()} for update in updates]
    assert all(shape == shapes[0] for shape in shapes)
    assert "ids" not in shapes[0]


def test_what_a_private_federation_cannot_have(photos, tmp_path):
    config = settings(photos, **PRIVATE)
    with pytest.raises(ConfigError, match=r"^evaluate_at: figures that sites measure"):
        federate(ProcessGrid({}), config, tmp_path / "run", **{"evaluate-at": "sites"})
    app = settings(photos, **PRIVATE, secret_file=None)
    with pytest.raises(ConfigError, match=r"^evaluate_at: "):
        write_app(tmp_path / "app", app, Deployment("/run"))
    unsaid = settings(photos, **{**PRIVATE, "delta": "auto"})
    with pytest.raises(ConfigError, match=r"^delta: the number of clients is not known before"):
        federate(ProcessGrid({}), unsaid, tmp_path / "run")
    own = settings(photos, **{**PRIVATE, "method": "fedss"})
    with pytest.raises(ConfigError, match=r"^noise: the class rows that a client of method fedss"):
        federate(ProcessGrid({}), own, tmp_path / "run")
