"""``--config FILE``: YAML, TOML and JSON, whole or in part."""

import json
import sys

import pytest

from fedss.cli import main
from fedss.config import Config
from tests.cli.test_cli import GLYPHS, refused

VALUES = {"rounds": 3, "client_lr": 1e-3, "method": "pos-only", "rotations": True, "device": "cpu"}
FILES = {
    "a.json": json.dumps(VALUES),
    "run.json": json.dumps({"config": VALUES, "data": {}}),
    "a.toml": """
        rounds = 3
        client_lr = 1e-3
        method = "pos-only"
        rotations = true
        device = "cpu"
    """,
    "a.YAML": """
        rounds: 3
        client_lr: 1e-3  # a text for YAML 1.1
        method: pos-only
        rotations: yes
        device: cpu
    """,
    "a.yml": "{rounds: 3, client_lr: .001, method: pos-only, rotations: true, device: cpu}",
}


@pytest.mark.parametrize("name", FILES)
def test_a_part_of_the_settings_can_come_from_each_kind_of_file(name, tmp_path, monkeypatch):
    (tmp_path / name).write_text(FILES[name])
    found = []

    def load(config):
        found.append(config)
        raise MemoryError

    monkeypatch.setattr("fedss.training.build.load_data", load)
    words = ["info", "--config", str(tmp_path / name)]
    assert main([*words, "--device", "cuda"]) == 2
    assert found == [Config(**{**VALUES, "device": "cuda"})]


@pytest.mark.parametrize("name", ["empty.toml", "empty.yaml"])
def test_a_file_with_comments_alone_changes_nothing(name, tmp_path, capsys):
    (tmp_path / name).write_text("# rounds: 3")
    assert main(["info", *GLYPHS]) == 0
    usual = capsys.readouterr().out
    assert main(["info", *GLYPHS, "--config", str(tmp_path / name)]) == 0
    assert capsys.readouterr().out == usual


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.yaml", "rounds: three", "rounds: expected int, got 'three' (str)"),
        ("a.toml", "rounds = 2020-01-01", "rounds: expected int, got datetime.date"),
        ("a.toml", "client-lr = 1.0", "'client-lr' is unknown; did you mean client_lr"),
        ("a.json", '{"sampler": null}', "sampler: None is unknown"),
        ("a.yaml", "1: 2", "1 is unknown"),
        ("a.yaml", "rounds: [3", "cannot read it as YAML: line 1: expected ',' or ']'"),
        ("a.yaml", "? [a]\n: 3", "cannot read it as YAML: line 1: found unhashable key"),
        ("a.yaml", "x: !!python/object:os.system {}", "cannot read it as YAML: line 1: could not"),
        ("a.yaml", "\x07", "cannot read it as YAML: unacceptable character"),
        ("a.toml", "rounds =", "cannot read it as TOML: Invalid value (at"),
        ("a.json", "{", "cannot read it as JSON: Expecting property name"),
        ("a.txt", "rounds", "cannot read it as JSON"),
        ("a.yaml", "- rounds", "expected settings by name, such as rounds, or the config.json of"),
        ("a.json", '{"config": 3}', "config: expected settings by name"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line_with_its_name(name, content, said, tmp_path, capsys):
    (tmp_path / name).write_text(content)
    words = ["train", "--config", str(tmp_path / name), "--out", str(tmp_path / "run")]
    (line,) = refused(words, capsys).splitlines()
    assert line.startswith(f"fedss train: --config {tmp_path / name}: ")
    assert said in line
    assert not (tmp_path / "run").exists()


def test_yaml_says_what_to_install(tmp_path, capsys, monkeypatch):
    (tmp_path / "a.yaml").write_text("rounds: 3")
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert 'pip install "fedss[yaml]"' in refused(
        ["info", "--config", str(tmp_path / "a.yaml")], capsys
    )


def test_a_number_with_an_exponent_is_one_wherever_one_is_expected(tmp_path):
    from fedss.cli.options import _read_yaml

    for text in ("1e-3", "-2E5", "1.e+3", "12e0"):
        assert _read_yaml(f"a: {text}".encode()) == {"a": float(text)}
    for text in ("e3", "1e", "1e3x", "timm:1e3"):
        assert _read_yaml(f"a: {text}".encode()) == {"a": text}
