"""A run starts from the weights of another: its backbone, and class rows by name."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fedss
from fedss import Config, ConfigError, Dataset, RunFolderError
from fedss.cli import main
from fedss.core.class_rows import create_class_rows, read
from fedss.losses.moments import row_sums
from fedss.models import fingerprint, load_embedder
from fedss.runs.checkpoint import load_checkpoint
from fedss.training.build import server_optimizer
from tests import reference
from tests.training.test_experiment import DATA, SMALL, digest, lines, train

CONFIG = dataclasses.replace(SMALL, seed=3)
# Rates at which nothing moves: what is there in the end was there at the start.
STILL = dataclasses.replace(
    CONFIG, rounds=1, client_lr=1e-30, class_row_lr=1e-30, server_row_lr=1.0
)


def renamed(start: int) -> Dataset:
    """The same images in other rows: names move on by some, and the last classes are new ones."""
    names = [*DATA.train.class_names[start:], *(f"new {i}" for i in range(start))]
    return dataclasses.replace(DATA, train=dataclasses.replace(DATA.train, class_names=names))


NEW = renamed(3)


def begin(out: Path, source: Path | None, config: Config = CONFIG, **more: object) -> fedss.Run:
    backbone = reference.tiny_backbone()
    return fedss.train(config, out, data=NEW, backbone=backbone, start=source, **more)


def stored_rows(run: Path, seed: int, slots: tuple[str, ...] = ("momentum",)) -> tuple:
    """Weights, velocities and when they were written, of the last checkpoint."""
    state = load_checkpoint(run / "checkpoint", create_class_rows(12, 6, slots, seed))
    assert state is not None
    return state, state.class_rows.weight_ND, state.class_rows.slots, state.class_rows.updated_N


def as_they_stand(run: Path) -> dict[str, Tensor]:
    """Rows by class name; the steps of momentum that they have missed are taken one by one."""
    state, weight_ND, slots, updated_N = stored_rows(run, SMALL.seed)
    rows = {}
    for row, name in enumerate(DATA.train.class_names):
        w, v = weight_ND[row].double(), slots["momentum"][row].double()
        for _ in range(state.round - int(updated_N[row])):
            v = 0.9 * v
            w = w + v
        if updated_N[row]:
            rows[name] = F.normalize(w, dim=0).float()
    return rows


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 rounds with few rows, so that some are not touched, and some have coasted."""
    config = dataclasses.replace(SMALL, sample_size=2, rounds=3, clients_per_round=1)
    return train(tmp_path_factory.mktemp("source"), config).folder


def test_backbone_and_rows_are_those_of_the_other_run(source, tmp_path):
    run = begin(tmp_path / "run", source, STILL)
    before, after = fedss.load(source, reference.tiny_backbone()), run.embedder
    for (name, one), other in zip(before.named_parameters(), after.parameters(), strict=True):
        assert torch.equal(one, other), name
    expected = as_they_stand(source)
    assert 0 < len(expected) < 12
    _, weight_ND, _, updated_N = stored_rows(run.folder, CONFIG.seed)
    shared = [name for name in NEW.train.class_names if name in expected]
    assert len(shared) > 2
    for row, name in enumerate(NEW.train.class_names):
        if name in expected:
            assert torch.allclose(weight_ND[row], expected[name], atol=1e-5), name
            assert updated_N[row] in (-1, 1)
        else:
            assert updated_N[row] in (0, 1), name
    # The others start as usual: as those of a run with this seed that starts by itself.
    begin(tmp_path / "plain", None, STILL)
    _, plain_ND, _, touched_N = stored_rows(tmp_path / "plain", CONFIG.seed)
    for row, name in enumerate(NEW.train.class_names):
        if name not in expected and touched_N[row] and updated_N[row]:
            assert torch.allclose(weight_ND[row], plain_ND[row], atol=1e-6)
    told = json.loads((run.folder / "config.json").read_text())["start"]
    assert told == {"run": str(source), "round": 3, "class_rows": len(shared)}
    # What it begins with is its floor.
    judged = fedss.evaluate(before, NEW.test).map_at_10
    assert run.summary["floors"]["untrained"] == pytest.approx(judged, abs=1e-6)


@pytest.mark.parametrize("row_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["fedss", "moments"])
def test_it_goes_on_with_the_same_bits_when_the_other_run_is_gone(
    method, row_dtype, source, tmp_path
):
    config = dataclasses.replace(CONFIG, method=method, row_dtype=row_dtype, rounds=4)
    other = shutil.copytree(source, tmp_path / "other")
    begin(tmp_path / "whole", other, config)

    def stop(record: dict) -> None:
        if record["round"] == 3:
            raise KeyboardInterrupt

    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        begin(run, other, config, on_round=stop)
    shutil.rmtree(other)
    with pytest.raises(RunFolderError, match=r"was started from .*/other, not from .*/source"):
        begin(run, tmp_path / "source", config)
    begin(run, None, config)
    assert digest(run) == digest(tmp_path / "whole")
    assert lines(run) == lines(tmp_path / "whole")
    assert begin(run, other, config).already_done
    # Also beyond its end, where it still knows.
    begin(run, None, dataclasses.replace(config, rounds=5))
    told = json.loads((run / "config.json").read_text())["start"]
    assert told["run"] == str(other)


def test_the_moments_are_those_of_all_rows(source, tmp_path):
    config = dataclasses.replace(STILL, method="moments")
    run = begin(tmp_path / "run", source, config)
    slots = server_optimizer(config).of_rows.slots
    rows = stored_rows(run.folder, CONFIG.seed, slots)[0].class_rows
    expected_EE = row_sums(read(rows, torch.arange(12))[0])
    assert torch.allclose(rows.sums_EE, expected_EE, atol=1e-5)


def test_a_run_that_began_otherwise_is_refused(source, tmp_path):
    begin(tmp_path / "run", None, STILL)
    with pytest.raises(RunFolderError, match="start: None there"):
        begin(tmp_path / "run", source, STILL)


def test_another_architecture_is_one_line_that_says_what_differs(source, tmp_path):
    wider = dataclasses.replace(CONFIG, embedding_size=8)
    with pytest.raises(ConfigError, match="embedding_size 6 there, 8 here") as caught:
        begin(tmp_path / "run", source, wider)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
    whole = fedss.train(
        dataclasses.replace(STILL, image_size=8, backbone="conv4-4"), tmp_path / "conv", data=DATA
    )
    config = dataclasses.replace(STILL, backbone="conv4-8")
    with pytest.raises(ConfigError, match="backbone 'conv4-4' there, 'conv4-8' here"):
        fedss.train(config, tmp_path / "run", data=DATA, start=whole.folder)
    own = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(ConfigError, match="does not fit the model"):
        fedss.train(CONFIG, tmp_path / "run", data=NEW, backbone=own, start=source)
    with pytest.raises(RunFolderError, match="no such folder"):
        begin(tmp_path / "run", tmp_path / "nowhere")


def test_an_unfinished_run_and_a_model_alone_will_do(source, tmp_path, caplog):
    cut = shutil.copytree(source, tmp_path / "cut")
    for name in ("summary.json", "model"):
        path = cut / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    first = begin(tmp_path / "one", cut, STILL).embedder
    alone = shutil.copytree(source / "model", tmp_path / "alone")
    with caplog.at_level("INFO", "fedss"):
        run = begin(tmp_path / "two", alone, STILL)
    assert any("no class rows with names" in message for message in caplog.messages)
    assert any(message.endswith("and 0 rows of 12 classes") for message in caplog.messages)
    whole = fingerprint(fedss.load(source, reference.tiny_backbone()))
    assert fingerprint(first) == fingerprint(run.embedder) == whole


def test_on_the_command_line(tmp_path, capsys):
    words = """
        train --data glyphs --glyphs-clients 8 --image-size 12 --backbone conv4-4 --workers 1
        --embedding-size 4 --clients-per-round 2 --rounds 1
    """.split()  # noqa: SIM905
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    assert main([*words, "--glyphs-classes", "20", "--out", one]) == 0
    capsys.readouterr()
    more = [*words, "--glyphs-classes", "30", "--seed", "1", "--out", two]
    assert main([*more, "--from", one]) == 0
    assert f"starts from {one}: the backbone, and " in capsys.readouterr().err
    first = load_embedder(Path(two) / "checkpoint" / "first")
    assert fingerprint(first) == fingerprint(fedss.load(one))
    assert main(more) == 0
    assert "is done: 1 round" in capsys.readouterr().out
    wrong = [*words, "--out", str(tmp_path / "three"), "--embedding-size", "5"]
    assert main([*wrong, "--from", one]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "embedding_size 4 there, 5 here" in line
