"""The example of docs/own-code.md runs, word for word but for the number of rounds."""

import sys
from pathlib import Path

import pytest

import fedss
from fedss.cli import main
from tests.docs.test_tutorials import blocks, commands
from tests.own import forget


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    module, program = blocks("own-code.md", "python")
    Path("mine.py").write_text(module)
    small = ["--glyphs-classes", "40", "--glyphs-clients", "8"]
    try:
        for words in commands("own-code.md"):
            if words[0] == "train":
                words = [*["1" if word == "30" else word for word in words], *small]
            assert main(words) == 0, words
        assert Path("runs/mine/export/model.safetensors").exists()
        small_config = 'rounds=1, glyphs_classes=40, glyphs_clients=8, data="glyphs"'
        names: dict[str, fedss.Embedder] = {}
        exec(program.replace("rounds=30", small_config), names)
        assert names["model"].spec.backbone == "mine:net"
        with pytest.raises(fedss.ConfigError, match="would import mine:net from"):
            fedss.load("runs/named")
    finally:
        forget(tmp_path)
