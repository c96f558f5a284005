"""The README's Python runs, word for word but for the number of rounds."""

import re
from pathlib import Path

import numpy as np
from PIL import Image

README = Path(__file__).parent.parent / "README.md"


def test_the_readmes_python_runs(tmp_path, monkeypatch, capsys):
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
    first, second = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    assert len(first.splitlines()) <= 15
    names: dict[str, object] = {}
    for block in (first.replace("rounds=100", "rounds=2"), second):
        exec(block, names)
    assert "a.jpg" in capsys.readouterr().out
    assert Path("runs/own-network/report.html").exists()
