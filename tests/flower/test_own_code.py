"""Code of one's own in a federation: the same bits as here, and the same file at every site."""

import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

import fedss
from fedss.cli import main
from fedss.errors import QuorumError
from fedss.flower import client_app
from fedss.own_code import find_code
from tests.flower_grid import ProcessGrid, digests
from tests.own import forget
from tests.sites import federate, nodes, settings, write_photos

PARTS = """
import torch
from torch import nn

from fedss.losses.softmax import sampled_softmax
from fedss.sampling.samplers import draw_uniform


def net(channels):
    return nn.Sequential(nn.Conv2d(channels, 4, 3, padding=1), nn.ReLU(), nn.Flatten())


def draw(own_P, n, m, rng):
    return draw_uniform(own_P, n, (m + 1) // 2, rng)


def loss(*arguments):
    return 2 * sampled_softmax(*arguments)


def flip(image):
    return image.flip(-1) if torch.rand(()) < 0.5 else image
"""
NAMED = dict(
    backbone="parts:net", sampler="parts:draw", objective="parts:loss", augment="parts:flip"
)


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("parts.py").write_text(PARTS)
    (tmp_path / "photos").mkdir()
    write_photos(tmp_path / "photos")
    yield tmp_path / "photos"
    forget(tmp_path)


def test_the_bits_of_the_local_engine_after_every_round(photos, tmp_path):
    config = settings(photos, **NAMED)
    local = digests(lambda: fedss.train(config, tmp_path / "local", on_round=lambda record: None))
    out = tmp_path / "apart"
    assert digests(lambda: federate(ProcessGrid(nodes(photos)), config, out)) == local
    assert len(set(local)) == 3
    # It goes on with the same file alone.
    longer = replace(config, rounds=4)
    Path("parts.py").write_text(f"{PARTS}\n")
    with pytest.raises(fedss.RunFolderError, match="was made with another parts:net: its file"):
        federate(ProcessGrid(nodes(photos)), longer, out)
    with pytest.raises(fedss.ConfigError, match="would import parts:net"):
        fedss.load(out)


@pytest.mark.parametrize(
    ("at_site", "reason"),
    [
        (
            lambda name: replace(find_code(name), sha256="0" * 64),
            "at the server, 000000000000 here",
        ),
        (lambda name: find_code("gone:net"), "parts:net, which is not installed at the site"),
    ],
)
def test_a_site_with_another_file_or_none_is_refused(
    photos, tmp_path, monkeypatch, at_site, reason
):
    monkeypatch.setattr(client_app, "find_code", at_site)
    config = settings(photos, backbone="parts:net")
    with pytest.raises(QuorumError, match=rf"could not register \(code\): .*{reason}") as caught:
        federate(ProcessGrid(nodes(photos)), config, tmp_path / "run", deadline=1.0)
    assert "\n" not in str(caught.value)


def test_what_is_no_loss_is_refused_before_a_site_is_asked(photos, tmp_path):
    config = settings(photos, objective="parts:flip")
    grid = ProcessGrid(nodes(photos))
    with pytest.raises(fedss.ConfigError, match="objective 'parts:flip' fails: TypeError"):
        federate(grid, config, tmp_path / "run")
    assert not grid.sent


def test_an_app_names_the_code_and_imports_none(photos, tmp_path, capsys):
    words = ["--out", str(tmp_path / "out"), "--backbone", "elsewhere.nets:net"]
    assert main(["app", "app", *words, "--augment", "parts:flip"]) == 0
    written = tomllib.loads(Path("app/pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    assert written["backbone"] == "elsewhere.nets:net"
    assert written["augment"] == "parts:flip"
    assert written["objective"] == ""
    assert "parts" not in sys.modules
    # Of a run that names some.
    fedss.train(settings(photos, backbone="parts:net", rounds=1, secret_file=None), "run")
    words = ["app", "other", "--out", str(tmp_path / "out"), "--config", "run/config.json"]
    capsys.readouterr()
    assert main(words) == 2
    assert "--config run/config.json: would import parts:net from" in capsys.readouterr().err
    assert main([*words, "--trust-code"]) == 0
