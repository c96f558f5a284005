"""The Python of docs/datasets.md runs, with small data in the places of its names."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.utils.data import TensorDataset

import fedss
from tests.data.made import make_image, save
from tests.data.test_sources import Frame, HuggingFace

PAGE = Path(__file__).parents[2] / "docs" / "datasets.md"


def test_data_sets_of_other_libraries(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    labels, phones = [i % 4 for i in range(24)], [i % 3 for i in range(24)]
    pictures = [make_image(i, (32, 32)) for i in range(24)]
    images = np.stack([np.asarray(picture) for picture in pictures])
    for i, picture in enumerate(pictures):
        save(Path(f"photos/{i}.png"), picture)
    columns = {"image": pictures, "species": labels, "photographer": phones}
    frame = {"path": [f"{i}.png" for i in range(24)], "species": labels, "phone": phones}
    names = {
        "fedss": fedss,
        "cifar": TensorDataset(torch.from_numpy(images), torch.tensor(labels)),
        "animals": HuggingFace(columns, {"species": SimpleNamespace(names=["a", "b", "c", "d"])}),
        "frame": Frame(frame),
        "images": images,
        "labels": labels,
        "phones": phones,
    }
    exec(block.replace('dog"]', 'dog"], test_classes=0.6, seed=3'), names)
    assert "RetrievalMetrics" in capsys.readouterr().out
