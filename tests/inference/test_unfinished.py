"""A run that was interrupted is used as it is: with the model of its last checkpoint."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import nn

import fedss
from fedss import Config, ConfigError, RunFolderError
from fedss.cli import main
from fedss.models import fingerprint
from fedss.runs.checkpoint import newest_round
from tests import reference
from tests.training.test_experiment import SMALL, train

CONFIG = Config(
    glyphs_classes=20,
    glyphs_clients=8,
    image_size=12,
    backbone="conv4-4",
    embedding_size=4,
    rounds=6,
    clients_per_round=2,
    eval_every=2,
    checkpoint_every=2,
    workers=1,
)


def interrupt_at(round: int):
    def on_round(record: dict) -> None:
        if record["round"] == round:
            raise KeyboardInterrupt

    return on_round


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It ended in round 4 of 6."""
    run = tmp_path_factory.mktemp("interrupted") / "run"
    with pytest.raises(KeyboardInterrupt):
        fedss.train(CONFIG, run, on_round=interrupt_at(4))
    assert newest_round(run / "checkpoint") == 4
    assert not (run / "model").exists()
    return run


def test_its_model_is_that_of_a_run_of_as_many_rounds(interrupted, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "fedss"):
        model = fedss.load(interrupted)
    (said,) = caplog.messages
    assert said == f"{interrupted} is not finished: this is its model of round 4 of 6"
    going_on = fedss.train(CONFIG, shutil.copytree(interrupted, tmp_path / "end"))
    # The learning rate falls with the length: an oracle is the run itself, stopped there.
    there = fedss.train(
        CONFIG,
        tmp_path / "stopped",
        on_round=lambda record: fedss.STOP if record["round"] == 4 else None,
    )
    assert fingerprint(model) == fingerprint(there.embedder)
    assert fingerprint(model) != fingerprint(going_on.embedder)
    assert not model.training


def test_it_is_evaluated_and_keeps_no_verification(interrupted, capsys):
    assert main(["evaluate", str(interrupted), "--json"]) == 0
    out, err = capsys.readouterr()
    assert "is not finished: this is its model of round 4 of 6" in err
    records = [json.loads(x) for x in (interrupted / "records.jsonl").read_text().splitlines()]
    found = json.loads(out)
    assert found["map_at_10"] == pytest.approx(records[3]["metrics"]["map_at_10"], abs=1e-6)
    assert {"chance", "pixels", "untrained"} <= found["floors"].keys()
    assert not (interrupted / "verification.json").exists()


def test_it_is_exported_with_a_card_that_says_so(interrupted, tmp_path):
    path = fedss.export(interrupted, "safetensors", tmp_path / "out")
    assert fingerprint(fedss.load(path)) == fingerprint(fedss.load(interrupted))
    card = (tmp_path / "out" / "MODEL_CARD.md").read_text()
    assert "The run was not finished: these are its weights of round 4 of 6." in card
    record = json.loads((interrupted / "records.jsonl").read_text().splitlines()[3])
    assert f"| MAP@10 | {record['metrics']['map_at_10']:.4f} |" in card


def test_it_is_indexed_and_searched(interrupted, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for number in range(3):
        pixels = rng.integers(0, 256, (12, 12), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    place = ["--index", str(tmp_path / "index")]
    assert main(["index", str(interrupted), str(tmp_path), *place]) == 0
    words = ["search", str(interrupted), str(tmp_path / "1.png"), *place, "--json"]
    capsys.readouterr()
    assert main(words) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["matches"][0]["name"] == "1.png"
    assert main(["embed", str(interrupted), str(tmp_path), "--out", str(tmp_path / "v.npy")]) == 0


def test_what_is_frozen_comes_with_it(tmp_path):
    """No checkpoint has it: it is kept beside them."""
    config = Config(**{**vars(SMALL), "pretrained": True, "trainable": "last-1"})
    whole = train(tmp_path / "whole", config, on_round=lambda r: fedss.STOP)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", config, on_round=interrupt_at(1))
    other = reference.tiny_backbone()
    for tensor in other.state_dict().values():
        tensor.zero_()
    assert fingerprint(fedss.load(tmp_path / "run", other)) == fingerprint(whole.embedder)


def test_another_backbone_is_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", on_round=interrupt_at(1))
    with pytest.raises(ConfigError, match="pass one of the same structure"):
        fedss.load(tmp_path / "run")
    frozen = reference.tiny_backbone()
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ConfigError, match="the same parameters frozen as in training"):
        fedss.load(tmp_path / "run", frozen)
    with pytest.raises(ConfigError, match="does not fit the model"):
        fedss.load(tmp_path / "run", nn.Sequential(nn.AvgPool2d(4), nn.Flatten()))


def test_a_run_without_a_checkpoint_says_so(tmp_path, interrupted):
    run = shutil.copytree(interrupted, tmp_path / "run")
    for checkpoint in (run / "checkpoint").glob("round-*"):
        shutil.rmtree(checkpoint)
    with pytest.raises(RunFolderError, match=r"found a run that has neither yet; wait"):
        fedss.load(run)


def test_a_damaged_checkpoint_is_told_with_what_to_do(tmp_path, interrupted):
    run = shutil.copytree(interrupted, tmp_path / "run")
    file = run / "checkpoint" / "round-000004" / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(RunFolderError, match=r"round-000004 is damaged.*go on from round-000002"):
        fedss.load(run)


def test_the_model_of_the_end_takes_its_place(interrupted, tmp_path, caplog):
    run = shutil.copytree(interrupted, tmp_path / "run")
    done = fedss.train(CONFIG, run)
    with caplog.at_level(logging.WARNING, "fedss"):
        assert fingerprint(fedss.load(run)) == fingerprint(done.embedder)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
