"""The Python of README and of docs/get-started.md runs, word for word but for its size."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
GET_STARTED = (ROOT / "docs" / "get-started.md").read_text()


def python_of(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page, re.S)


def test_the_quickstart_prints_what_the_readme_shows(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = python_of(README)
    (shown,) = re.findall(r"```\n(R@1 .*?)```", README, re.S)
    exec(code.replace("rounds=110", "rounds=1, glyphs_classes=40, glyphs_clients=8"), {})
    number = r"\b\d+(\.\d+)?"
    assert re.sub(number, "0", capsys.readouterr().out) == re.sub(number, "0", shown)
    assert Path("runs/quickstart/report.html").exists()
    assert Path("runs/quickstart/floors.json").exists()


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150
    (code,) = python_of(README)
    statements = [line for line in code.splitlines() if line and not line.startswith("import")]
    assert len(statements) == 5


@pytest.mark.parametrize("said", ["not a privacy method", "docs/related.md#patents"])
def test_what_a_reader_must_know_comes_before_the_first_heading(said):
    assert said in README.partition("\n## ")[0]


def test_the_python_of_get_started_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    rows = ["image,label,client"]
    for label in range(90):
        for client in range(3):
            name = f"{label}-{client}.png"
            Image.fromarray(rng.integers(0, 256, (70, 66, 3), dtype=np.uint8)).save(name)
            rows.append(f"{name},thing {label},phone {client}")
    Path("photos.csv").write_text("\n".join(rows))
    for name in ("a.jpg", "b.jpg"):
        Image.fromarray(rng.integers(0, 256, (80, 90, 3), dtype=np.uint8)).save(name)
    first, second = python_of(GET_STARTED)
    assert len(first.splitlines()) <= 15
    names: dict[str, object] = {}
    for block in (first.replace("rounds=100", "rounds=2"), second):
        exec(block, names)
    assert "a.jpg" in capsys.readouterr().out
    assert Path("runs/own-network/report.html").exists()
