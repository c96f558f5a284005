"""A run with a backbone of one's own, by its name, through all commands."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fedss
from fedss.cli import main
from fedss.search import build_collection, open_collection
from fedss.search.web import app
from tests.cli.test_cli import GLYPHS
from tests.own import code, forget

WORDS = [*GLYPHS, "--embedding-size", "144", "--rounds", "1"]
CONFIG = fedss.Config(
    data="glyphs",
    image_size=12,
    embedding_size=144,
    rounds=1,
    clients_per_round=2,
    workers=1,
    glyphs_classes=40,
    glyphs_clients=8,
    sample_size=8,
)


@pytest.fixture
def log(tmp_path, monkeypatch):
    with code(tmp_path, monkeypatch) as log:
        yield log


@pytest.fixture
def run(log, capsys):
    """A trained run, whose code is as good as never imported."""
    assert main(["train", *WORDS, "--backbone", "nets:net", "--out", "run"]) == 0
    capsys.readouterr()
    forget(log.parent)
    log.unlink()
    rng = np.random.default_rng(0)
    Path("photos").mkdir()
    for number in range(4):
        pixels = rng.integers(0, 256, (12, 12), np.uint8)
        Image.fromarray(pixels).save(f"photos/{number}.png")
    return Path("run")


def refused(words, capsys) -> str:
    assert main(words) == 2, words
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert line.startswith(f"fedss {words[0]}: ")
    assert out == ""
    return line.partition(": ")[2]


def test_it_trains_the_network_that_the_function_makes(log):
    assert main(["train", *WORDS, "--backbone", "nets:net", "--out", "run"]) == 0
    torch.manual_seed(0)  # the run's seed
    module = sys.modules["nets"].net(1, 12)
    expected = fedss.train(CONFIG, "expected", backbone=module)
    named = fedss.load("run", trust_code=True).state_dict()
    assert named.keys() == expected.embedder.state_dict().keys()
    assert all(torch.equal(t, named[n]) for n, t in expected.embedder.state_dict().items())
    about = json.loads(Path("run/config.json").read_text())
    assert about["config"]["backbone"] == "nets:net"
    assert about["code"]["backbone"]["name"] == "nets:net"
    assert re.fullmatch("[0-9a-f]{64}", about["code"]["backbone"]["sha256"])
    assert "code" not in json.loads(Path("expected/config.json").read_text())
    # A class of modules, with a projection to another size.
    config = ["--backbone", "nets:Net", "--embedding-size", "16"]
    assert main(["train", *WORDS, *config, "--out", "class"]) == 0
    model = fedss.load("class", trust_code=True)
    assert type(model.backbone).__name__ == "Net"
    assert model.projection.weight.shape == (16, 36)


def use(run: Path) -> dict[str, list[str]]:
    photos = [str(path) for path in sorted(Path("photos").iterdir())]
    return {
        "evaluate": ["evaluate", str(run)],
        "embed": ["embed", str(run), "photos", "--out", "vectors.npy"],
        "index": ["index", str(run), "photos"],
        "search": ["search", str(run), photos[0]],
        "enrol": ["enrol", str(run), "mug", *photos[:2]],
        "identify": ["identify", str(run), photos[2], "--threshold", "0.5"],
        "export": ["export", str(run), "--format", "safetensors"],
        "torch-export": ["export", str(run), "--format", "torch-export", "--out", "pt2"],
    }


def test_every_command_uses_it_if_it_may(run, log, capsys):
    for words in use(run).values():
        line = refused(words, capsys)
        file = Path("nets.py").absolute()
        assert line.startswith(f"run/model: would import nets:net from {file}; allow it")
        assert not log.exists()
    for words in use(run).values():
        assert main([*words, "--trust-code"]) == 0, words
        capsys.readouterr()
    assert log.read_text() == "imported\n"
    vectors = np.load("vectors.npy")
    model = fedss.load(run, trust_code=True)
    pixels = np.stack([np.array(Image.open(f"photos/{i}.png")) for i in range(4)])[:, None]
    assert np.allclose(vectors, model(torch.from_numpy(pixels)).detach().numpy(), atol=1e-6)
    exported = fedss.load(run / "export" / "model.safetensors", trust_code=True)
    assert all(
        torch.equal(a, b) for a, b in zip(exported.parameters(), model.parameters(), strict=True)
    )
    card = (run / "export" / "MODEL_CARD.md").read_text()
    assert 'fedss.load("model.safetensors", trust_code=True)  # imports nets:net' in card
    with pytest.raises(fedss.ConfigError, match=r"would import nets:net from .*trust_code=True"):
        fedss.load(run / "export")
    assert main(["report", str(run)]) == 0


def test_it_is_served(run, capsys, monkeypatch):
    assert main(["index", "run", "photos", "--trust-code"]) == 0
    served: list[int] = []
    monkeypatch.setattr(app, "serve", lambda collection, *rest: served.append(len(collection)))
    capsys.readouterr()
    words = ["serve", "run", "--port", "0", "--threshold", "0.5"]
    assert "would import nets:net" in refused(words, capsys)
    assert main([*words, "--trust-code"]) == 0
    assert served == [4]


def test_a_name_on_the_command_line_is_asked_for(run, log, capsys):
    assert main(["evaluate", "run", "--backbone", "nets:net"]) == 0
    assert log.exists()
    assert main(["train", *WORDS, "--backbone", "nets:net", "--out", "run"]) == 0
    assert "run is done: 1 round" in capsys.readouterr().out
    # Not so in a file of settings.
    line = refused(["train", "--config", "run/config.json", "--out", "other"], capsys)
    assert line.startswith("--config run/config.json: would import nets:net from ")
    assert not Path("other").exists()
    assert main(["train", "--config", "run/config.json", "--trust-code", "--out", "other"]) == 0
    words = ["--config", "run/config.json", "--backbone", "conv4-4", "--embedding-size", "8"]
    assert main(["train", *words, "--out", "third"]) == 0


def test_a_run_goes_on_and_is_started_from(run, capsys):
    more = [*WORDS, "--rounds", "2", "--backbone", "nets:net"]
    assert main(["train", *more, "--out", "run"]) == 0
    assert main(["train", *more, "--out", "whole"]) == 0
    assert main(["train", *more, "--from", "run", "--out", "from"]) == 0
    about = json.loads(Path("from/config.json").read_text())
    assert about["start"]["run"] == str(Path("run").absolute())
    # One that is interrupted, with the model of its last checkpoint.
    Path("run/summary.json").unlink()
    for file in Path("run/model").iterdir():
        file.unlink()
    capsys.readouterr()
    assert "run/checkpoint/first: would import nets:net" in refused(["evaluate", "run"], capsys)
    assert main(["evaluate", "run", "--trust-code"]) == 0
    other = [*WORDS, "--rounds", "2", "--backbone", "nets:Net"]
    assert main(["train", *other, "--from", "from", "--out", "other"]) == 2
    assert "from/model/model.safetensors does not fit the model" in capsys.readouterr().err


def test_another_file_is_refused(run, log, capsys):
    text = Path("nets.py").read_text()
    Path("nets.py").write_text(f"{text}\n# changed\n")
    for words in use(run).values():
        line = refused([*words, "--trust-code"], capsys)
        assert re.match(r"run/model was made with another nets:net: .* put the file back", line)
        line = refused([*words, "--backbone", "nets:net"], capsys)
        assert line.startswith("run/model was made with another nets:net: ")
    assert not log.exists()
    assert main(["train", *WORDS, "--backbone", "nets:net", "--out", "run"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("fedss train: run was made with another nets:net: ") or last.startswith(
        f"fedss train: {run.absolute()} was made with another nets:net: "
    )
    assert last.endswith("put the file back as it was, or choose another folder")
    # Whoever knows that it is the same network says so.
    Path("moved.py").write_text(text)
    assert main(["evaluate", "run", "--backbone", "moved:net"]) == 0
    Path("nets.py").write_text(text)
    assert main(["evaluate", "run", "--trust-code"]) == 0


def test_a_run_of_a_module_is_used_with_the_code_that_makes_it(run, capsys):
    fedss.train(CONFIG, "module", backbone=fedss.load(run, trust_code=True).backbone)
    assert "--backbone package.module:function" in refused(["evaluate", "module"], capsys)
    assert main(["evaluate", "module", "--backbone", "nets:net"]) == 0
    capsys.readouterr()
    words = ["evaluate", "module", "--backbone", "conv4-4"]
    assert "backbone: expected package.module:function, got 'conv4-4'" in refused(words, capsys)
    collection = build_collection("module", "photos", backbone="nets:net")
    assert len(collection) == 4
    collection = open_collection("module/index", "module", backbone="nets:net")
    assert len(collection) == 4


def test_it_is_compared(log, capsys):
    words = [word for word in WORDS if word not in ("--seed", "0")]
    words += ["--methods", "fedss", "fedss:backbone=nets:Net", "--backbone", "nets:net"]
    assert main(["compare", *words, "--out", "both"]) == 0
    names = [
        json.loads((Path("both") / folder / "model" / "config.json").read_text())["embedder"]
        for folder in ("fedss-seed0", "fedss-backbone=nets-Net-seed0")
    ]
    assert [each["backbone"] for each in names] == ["nets:net", "nets:Net"]
    assert main(["info", *WORDS, "--backbone", "nets:net"]) == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nets:nett", "nets:nett: .*nets.py has no 'nett'; did you mean net"),
        ("gone:net", "gone:net: no module gone in"),
        ("odd:number", "backbone odd:number: expected a function or class .* of type int"),
        ("odd:module", "backbone odd:module: expected a function or class .* of type Linear"),
        (
            "odd:nothing",
            "odd:nothing: expected it to make a torch.nn.Module, got NoneType",
        ),
        ("odd:asks", r"backbone odd:asks: odd:asks\(channels=1\) fails: TypeError: .*'width'"),
        ("odd:drops", "dropout"),
    ],
)
def test_what_makes_no_network_is_one_line(name, message, log, capsys):
    Path("odd.py").write_text(
        "from torch import nn\nnumber, module = 4, nn.Linear(2, 2)\ndef nothing(): pass\n"
        "def asks(channels, width): pass\n"
        "def drops(): return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(144, 3))\n"
    )
    assert main(["train", *WORDS, "--backbone", name, "--out", "run"]) == 2
    (last,) = [line for line in capsys.readouterr().err.splitlines() if "fedss train" in line]
    assert re.search(message, last)
    assert not Path("run").exists()
