"""A run's life: it goes on beyond its end, and a callback may end it."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest

import fedss
from fedss import STOP, Config, RunFolderError
from fedss.cli import main
from fedss.runs.checkpoint import newest_round
from fedss.runs.reading import read_runs
from fedss.settings import problem_of, resolve
from tests import reference
from tests.training.test_experiment import DATA, SMALL, digest, lines, scalars, train

CONSTANT = dataclasses.replace(SMALL, lr_schedule="constant")


def with_rounds(rounds: int, config: Config = CONSTANT, **values: Any) -> Config:
    return dataclasses.replace(config, rounds=rounds, **values)


def config_json(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return content


@pytest.fixture(scope="module")
def twelve(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("twelve"), with_rounds(12)).folder


@pytest.mark.parametrize("ends", ["finished", "interrupted", "in steps"])
def test_six_rounds_and_then_twelve_are_twelve_in_one_go(ends, twelve, tmp_path):
    def stop(record: dict) -> None:
        if record["round"] == 5:
            raise KeyboardInterrupt

    run = tmp_path / "run"
    if ends == "interrupted":
        with pytest.raises(KeyboardInterrupt):
            train(run, with_rounds(6), on_round=stop)
    else:
        train(run, with_rounds(6))
    if ends == "in steps":
        assert not train(run, with_rounds(8)).already_done
    done = train(run, with_rounds(12))
    assert not done.already_done
    assert done.summary["rounds"] == 12
    assert digest(run) == digest(twelve)
    assert lines(run) == lines(twelve)
    assert config_json(run)["config"]["rounds"] == 12
    before = [6, 8] if ends == "in steps" else [6]
    assert config_json(run)["rounds_before"] == before
    assert train(run, with_rounds(12)).already_done
    # What the end leaves is of the new end.
    assert [r["round"] for r in lines(run) if r["metrics"]] == [2, 4, 6, 8, 10, 12]
    (seen,) = read_runs(run)
    assert (seen.finished, seen.planned_rounds, seen.last_round) == (True, 12, 12)


def test_a_run_that_goes_on_is_not_done_until_its_new_end(tmp_path):
    run = tmp_path / "run"
    train(run, with_rounds(6))

    def look(record: dict) -> None:
        if record["round"] == 8:
            assert not {"summary.json", "model", "by_class.json"} & {p.name for p in run.iterdir()}
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(run, with_rounds(12), on_round=look)
    assert not read_runs(run)[0].finished
    # Also by the length that it had in between.
    with pytest.raises(RunFolderError, match="8 rounds are trained, expected as many or more"):
        train(run, with_rounds(6))
    assert not train(run, with_rounds(12)).already_done


def test_auto_keeps_to_what_a_run_began_with_and_numbers_win(tmp_path):
    auto = dict.fromkeys(("client_lr", "class_row_lr", "server_row_lr", "server_momentum"), "auto")
    run, config = tmp_path / "run", with_rounds(2, SMALL, local_epochs=3, **auto)
    train(run, config)
    before = config_json(run)
    longer, rule = with_rounds(8, config), resolve(with_rounds(8, config), problem_of(DATA))[1]
    assert rule["server_row_lr"].value != before["resolved"]["server_row_lr"]
    for _ in range(2):
        train(run, longer)
        after = config_json(run)
        assert after["resolved"] == before["resolved"]
        told = "; as for the 2 rounds that the run began with"
        assert after["why"]["server_row_lr"] == before["why"]["server_row_lr"] + told
    # The schedule is that of the whole length: as if it were new, behind what was trained.
    rates = [r["class_row_lr"] / before["resolved"]["class_row_lr"] for r in lines(run)]
    assert rates == pytest.approx([1, 1, 1, 1, 1, 0.75, 0.5, 0.25])
    with pytest.raises(RunFolderError, match=r"class_row_lr: 'auto' there, 0\.5 now"):
        train(run, dataclasses.replace(longer, class_row_lr=0.5))
    train(run, with_rounds(9, longer, class_row_lr=0.5, lr_schedule="linear"))
    assert lines(run)[-1]["class_row_lr"] == pytest.approx(0.5 / 4.5)
    assert lines(run)[:8] == lines(run)[:8]
    assert "class_row_lr" not in config_json(run)["resolved"]
    assert config_json(run)["resolved"]["server_row_lr"] == 1
    with pytest.raises(RunFolderError, match=r"class_row_lr: 0\.5 there, 'auto' now"):
        train(run, with_rounds(10, longer))
    with pytest.raises(RunFolderError, match=r"class_row_lr: 0\.5 there, 0\.7 now"):
        train(run, with_rounds(10, longer, class_row_lr=0.7))


def test_fewer_rounds_than_are_trained_are_one_line(tmp_path):
    run = tmp_path / "run"
    train(run, with_rounds(4))
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    with pytest.raises(RunFolderError, match="4 rounds are trained, expected as many or more") as e:
        train(run, with_rounds(3))
    assert "\n" not in str(e.value)
    with pytest.raises(RunFolderError, match="client_lr"):
        train(run, with_rounds(6, client_lr=0.1))
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_an_interrupted_run_may_end_where_it_is(tmp_path):
    def stop(record: dict) -> None:
        if record["round"] == 3:
            raise KeyboardInterrupt

    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train(run, with_rounds(6), on_round=stop)
    assert newest_round(run / "checkpoint") == 3
    summary = train(run, with_rounds(3)).summary
    whole = train(tmp_path / "whole", with_rounds(3))
    assert digest(run) == digest(whole.folder)
    assert lines(run) == lines(whole.folder)
    assert summary["map_at_10"] == whole.summary["map_at_10"]


def test_without_its_checkpoint_a_run_cannot_go_on(tmp_path):
    run = tmp_path / "run"
    train(run, with_rounds(2))
    for path in [*(run / "checkpoint").glob("round-*/*"), *(run / "checkpoint").glob("round-*")]:
        path.unlink() if path.is_file() else path.rmdir()
    with pytest.raises(RunFolderError, match=r"expected the checkpoint of round 2.*found none"):
        train(run, with_rounds(4))
    assert train(run, with_rounds(2)).already_done


def test_a_comparison_goes_on_as_a_whole(tmp_path):
    def compare(rounds: int, methods: list[str], seeds: list[int], out: str = "both") -> list[Any]:
        backbone, config = reference.tiny_backbone(), with_rounds(rounds)
        return fedss.compare(config, methods, seeds, tmp_path / out, data=DATA, backbone=backbone)

    compare(2, ["full"], [0, 1])
    compare(2, ["fedss"], [0, 1])
    before = (tmp_path / "both" / "summary.json").read_bytes()
    for methods, seeds in ((["full"], [0, 1]), (["full", "fedss"], [1])):
        with pytest.raises(RunFolderError, match="--methods full fedss --seeds 0 1"):
            compare(4, methods, seeds)
    with pytest.raises(RunFolderError, match="rounds: 2 there, 1 now"):
        compare(1, ["full", "fedss"], [0, 1])
    assert (tmp_path / "both" / "summary.json").read_bytes() == before
    grown = compare(4, ["full", "fedss"], [0, 1])
    assert [s["rounds"] for s in grown] == [4] * 4
    assert config_json(tmp_path / "both")["config"]["rounds"] == 4
    fresh = compare(4, ["full", "fedss"], [0, 1], "fresh")
    for one, other in zip(grown, fresh, strict=True):
        folders = [tmp_path / "both" / one["folder"], tmp_path / "fresh" / other["folder"]]
        assert digest(folders[0]) == digest(folders[1])


@pytest.mark.parametrize("at", [1, 3, 4])
def test_a_callback_ends_a_run_whole(at, tmp_path, twelve):
    run = train(
        tmp_path / "run", with_rounds(12), on_round=lambda r: STOP if r["round"] == at else True
    )
    assert run.summary["rounds"] == at
    assert [r["round"] for r in lines(run.folder)] == [*range(1, at + 1)]
    short = train(tmp_path / "short", with_rounds(at))
    assert digest(run.folder) == digest(short.folder)
    assert lines(run.folder) == lines(short.folder)
    assert run.summary["map_at_10"] == short.summary["map_at_10"] is not None
    names = [{p.name for p in r.folder.iterdir()} for r in (run, short)]
    assert names[0] == names[1]
    drawn = [scalars(r.folder) for r in (run, short)]
    assert drawn[0]["test/map_at_10"] == drawn[1]["test/map_at_10"]
    assert drawn[0]["train/loss"] == drawn[1]["train/loss"]
    assert train(tmp_path / "run", with_rounds(12)).already_done
    (seen,) = read_runs(run.folder)
    assert (seen.finished, seen.planned_rounds) == (True, at)
    assert newest_round(run.folder / "checkpoint") == at
    # Another length wakes it.
    train(tmp_path / "run", with_rounds(13))
    losses = [[record["loss"] for record in lines(folder)] for folder in (run.folder, twelve)]
    assert losses[0][:12] == losses[1]
    assert len(losses[0]) == 13


def test_what_a_callback_said_last_holds_after_an_interruption(tmp_path):
    def stop(record: dict) -> object:
        return STOP if record["round"] == 3 else None

    def die(record: dict) -> None:
        if record["round"] == 3:
            raise KeyboardInterrupt

    for say, rounds in ((stop, 3), (lambda r: STOP if r["round"] == 2 else None, 6)):
        run = tmp_path / str(rounds)
        with pytest.raises(KeyboardInterrupt):
            train(run, with_rounds(6), on_round=die)
        assert train(run, with_rounds(6), on_round=say).summary["rounds"] == rounds
        assert lines(run)[-1]["metrics"]


def test_a_callback_does_not_switch_progress_off(tmp_path, caplog):
    seen: list[int] = []
    with caplog.at_level(logging.INFO, "fedss.progress"):
        train(tmp_path / "run", with_rounds(2), on_round=lambda r: seen.append(r["round"]))
    logged = [r.__dict__["progress"].done for r in caplog.records if "progress" in r.__dict__]
    assert seen == [1, 2]
    assert logged[-1] == 2


GLYPHS = """
    --data glyphs --glyphs-classes 20 --glyphs-clients 8 --image-size 12 --backbone conv4-4
    --embedding-size 4 --clients-per-round 2 --workers 1
""".split()  # noqa: SIM905


def test_the_command_line_goes_on_and_says_so(tmp_path, capsys):
    words = ["train", *GLYPHS, "--out", str(tmp_path / "run")]
    assert main([*words, "--rounds", "1"]) == 0
    capsys.readouterr()
    assert main([*words, "--rounds", "2"]) == 0
    assert "was to have 1 round; it goes on to 2" in capsys.readouterr().err
    assert main([*words, "--rounds", "2"]) == 0
    assert "is done: 2 rounds; more --rounds go on" in capsys.readouterr().out
    assert main([*words, "--rounds", "1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "2 rounds are trained" in line


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"fedss {fedss.__version__}\n"
