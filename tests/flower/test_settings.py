"""The settings of a federation, and the app folder that carries them."""

import dataclasses
import tomllib

import pytest

from fedss.cli import main
from fedss.config import Config
from fedss.errors import ConfigError
from fedss.flower.settings import Deployment, explicit, read_settings, write_app

APART = {"out": "/srv/run"}


def run_config(folder):
    return tomllib.loads((folder / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]


@pytest.mark.parametrize(
    "changes",
    [{}, {"sample_size": 12, "local_steps": 3, "data": "csv", "data_path": 'a "quoted" é\\path'}],
)
def test_what_is_written_is_what_is_read(tmp_path, changes):
    config = Config(**changes)
    deployment = Deployment("/srv/run", sites=4, deadline=30.0, evaluate_at="server")
    write_app(tmp_path, config, deployment)
    assert read_settings(run_config(tmp_path)) == (explicit(config), deployment)


def test_the_app_holds_no_code(tmp_path):
    write_app(tmp_path / "app", Config(), Deployment("/srv/run"))
    assert {path.name for path in (tmp_path / "app").iterdir()} == {"pyproject.toml", "LICENSE"}


def test_the_command_line_writes_the_same(tmp_path, capsys):
    words = ["--out", "/srv/run", "--sites", "3", "--method", "moments", "--quorum", "0.25"]
    assert main(["app", str(tmp_path / "app"), *words]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'app' / 'pyproject.toml'}\n"
    config, deployment = read_settings(run_config(tmp_path / "app"))
    # What a data set would decide for itself must be the same at all sites, so it is written down.
    assert config == Config(
        method="moments", data="folder", image_size=64, channels=3, checkpoint_every=1
    )
    assert deployment == Deployment("/srv/run", sites=3, quorum=0.25)
    assert main(["app", str(tmp_path / "app"), *words]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["app", str(tmp_path / "other"), *words, "--rotations"]) == 2
    assert "rotations: sites read their images as they are" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_glyphs_are_small_and_gray():
    config = explicit(Config())
    assert (config.image_size, config.channels) == (28, 1)
    assert explicit(Config(image_size=32, channels=3)) == Config(image_size=32, channels=3)


def test_whole_numbers_do_for_seconds():
    # Flower's command line makes an int of deadline=60.
    assert read_settings({**APART, "deadline": 60})[1].deadline == 60.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"out": "runs/here"}, "out: expected a full path at the server, got 'runs/here'"),
        ({**APART, "sites": 0}, "sites: expected at least 1, got 0"),
        ({**APART, "sites": "3"}, "sites: expected int, got '3'"),
        ({**APART, "sites": True}, "sites: expected int, got True"),
        ({**APART, "deadline": 0}, "deadline: expected 1 to 1e7 seconds"),
        ({**APART, "deadline": 0.99}, "deadline: expected 1 to 1e7 seconds, got 0.99"),
        ({**APART, "deadline": 10000001}, "deadline: expected 1 to 1e7 seconds"),
        ({**APART, "deadline": True}, "deadline: expected float, got True"),
        ({**APART, "deadline": float("nan")}, "deadline: expected 1 to 1e7 seconds"),
        ({**APART, "pause": -1}, "pause: expected 0 to"),
        ({**APART, "quorum": 1.5}, "quorum: expected 0 to 1, got 1.5"),
        ({**APART, "attempts": 0}, "attempts: expected at least 1"),
        ({**APART, "share": 1.01}, "share: expected 0 to 1, got 1.01"),
        ({**APART, "share": float("nan")}, "share: expected 0 to 1"),
        ({**APART, "grace": -1}, "grace: expected 0 to 1e7 seconds"),
        ({**APART, "aside": -1}, "aside: expected at least 0"),
        ({**APART, "aside": 1.5}, "aside: expected int, got 1.5"),
        ({**APART, "evaluate-at": "home"}, "evaluate_at: expected sites or server, got 'home'"),
        ({**APART, "evaluate-at": 3}, "evaluate_at: expected sites or server, got 3"),
        ({**APART, "simple-size": 3}, "configuration field: 'simple_size' is unknown.*sample_size"),
        ({**APART, "method": "central"}, "method: central pools images"),
        ({**APART, "rotations": True}, "rotations: sites read their images as they are"),
        ({**APART, "client-classes": 3}, "client_classes: sites read their images as they are"),
        (
            {**APART, "partition": "dirichlet:0.5", "partition-clients": 3},
            "partition: sites read their images as they are",
        ),
        ({**APART, "secret-file": "key"}, "secret_file: a federation's server must not have it"),
        ({**APART, "rounds": 1.5}, "rounds: expected int, got 1.5"),
    ],
)
def test_bad_settings_are_named(values, message):
    with pytest.raises(ConfigError, match=message):
        read_settings(values)


def test_the_settings_are_pinned():
    assert [item.name for item in dataclasses.fields(Deployment)] == [
        "out",
        "sites",
        "evaluate_at",
        "deadline",
        "quorum",
        "share",
        "grace",
        "aside",
        "absence",
        "site_classes",
        "site_clients",
        "attempts",
        "pause",
    ]
