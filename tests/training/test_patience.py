"""Early stopping on validation, against a plain loop over the figures of a run without it."""

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fedss
from fedss.cli import main
from fedss.models import fingerprint
from fedss.runs.records import best_evaluated, out_of_patience
from tests import reference
from tests.training.test_experiment import DATA, SMALL, digest, lines

VALIDATED = dataclasses.replace(DATA, validation=DATA.test)
CONFIG = dataclasses.replace(
    SMALL, rounds=16, eval_split="validation", eval_every=1, lr_schedule="constant", scale=30.0
)


def train(out: Path, config: fedss.Config = CONFIG, **more: object) -> fedss.Run:
    backbone = reference.tiny_backbone()
    return fedss.train(config, out, data=VALIDATED, backbone=backbone, **more)


def stops_at(figures: list[float], patience: int) -> tuple[int, int]:
    """The round at which a run ends, and its best one: by hand."""
    best, waited = 0, 0
    for number, figure in enumerate(figures):
        if number == 0 or figure > figures[best]:
            best, waited = number, 0
        else:
            waited += 1
        if waited == patience:
            return number + 1, best + 1
    return len(figures), best + 1


def as_records(figures: list[float | None]) -> list[dict]:
    return [
        {"round": n, "metrics": None if f is None else {"map_at_10": f}}
        for n, f in enumerate(figures, start=1)
    ]


@given(st.lists(st.sampled_from([None, 0.1, 0.2, 0.3, 0.4])), st.integers(1, 4))
def test_the_rule_is_that_of_a_loop(figures, patience):
    known = [(n, f) for n, f in enumerate(figures, start=1) if f is not None]
    end, best = stops_at([f for _, f in known], patience) if known else (0, 0)
    waited = [
        n
        for n in range(len(known) + 1)
        if out_of_patience(as_records(figures[: known[n - 1][0] if n else 0]), patience)
    ]
    assert (waited[0] if waited else len(known)) == end
    if known:
        found = best_evaluated(as_records(figures[: known[end - 1][0]]))
        assert found["round"] == known[best - 1][0]
    assert not out_of_patience(as_records(figures), None)


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    run = train(tmp_path_factory.mktemp("endless"))
    assert not (run.folder / "best").exists()
    return [record["metrics"]["map_at_10"] for record in lines(run.folder)]


@pytest.mark.parametrize("patience", [1, 2, 4])
def test_a_run_ends_when_patience_does_and_keeps_its_best_round(patience, endless, tmp_path):
    end, best = stops_at(endless, patience)
    assert patience == 4 or end < 16
    config = dataclasses.replace(CONFIG, patience=patience)
    run = train(tmp_path / "run", config)
    assert run.summary["rounds"] == end
    assert [r["metrics"]["map_at_10"] for r in lines(run.folder)] == endless[:end]
    kept = fedss.load(run.folder / "best", reference.tiny_backbone())
    there = train(tmp_path / "best", dataclasses.replace(CONFIG, rounds=best)).embedder
    assert fingerprint(kept) == fingerprint(there)
    told = json.loads((run.folder / "best" / "config.json").read_text())["config"]
    assert (told["round"], told["metrics"]["map_at_10"]) == (best, endless[best - 1])
    assert train(tmp_path / "run", config).already_done


def test_an_interruption_changes_neither(endless, tmp_path):
    end, best = stops_at(endless, 2)
    config = dataclasses.replace(CONFIG, patience=2)

    def stop(record: dict) -> None:
        if record["round"] in (best, end) and record["round"] not in seen:
            seen.append(record["round"])
            raise KeyboardInterrupt

    seen: list[int] = []
    for _ in {best, end}:
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "run", config, on_round=stop)
    run, whole = train(tmp_path / "run", config), train(tmp_path / "whole", config)
    assert lines(run.folder) == lines(whole.folder)
    assert digest(run.folder) == digest(whole.folder)
    file = Path("best") / "model.safetensors"
    assert (run.folder / file).read_bytes() == (whole.folder / file).read_bytes()


def test_more_patience_goes_on(endless, tmp_path):
    train(tmp_path / "run", dataclasses.replace(CONFIG, patience=1))
    train(tmp_path / "run", dataclasses.replace(CONFIG, rounds=17, patience=16))
    assert [r["metrics"]["map_at_10"] for r in lines(tmp_path / "run")][:16] == endless


GLYPHS = {"glyphs_classes": 20, "glyphs_clients": 8, "image_size": 12}


def test_the_best_model_is_judged_by_the_test(tmp_path, capsys):
    words = """
        train --data glyphs --glyphs-classes 20 --glyphs-clients 8 --image-size 12
        --backbone conv4-4 --embedding-size 4 --clients-per-round 2 --workers 1 --rounds 3
    """.split()  # noqa: SIM905
    run = tmp_path / "run"
    assert main([*words, "--out", str(run), "--patience", "1"]) == 2
    assert "take eval_split validation" in capsys.readouterr().err
    validated = ["--eval-split", "validation", "--eval-every", "1", "--patience", "1"]
    assert main([*words, "--out", str(run), *validated]) == 0
    assert f"best    {run / 'best'}" in capsys.readouterr().out
    told = json.loads((run / "best" / "config.json").read_text())["config"]
    for split in ("validation", "test"):
        assert main(["evaluate", str(run / "best"), "--eval-split", split, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)["map_at_10"]
        judged = getattr(fedss.load_data(fedss.Config(**GLYPHS)), split)
        by_hand = fedss.evaluate(fedss.load(run / "best"), judged).map_at_10
        assert found == pytest.approx(by_hand, abs=1e-6)
        if split == "validation":
            assert found == pytest.approx(told["metrics"]["map_at_10"], abs=1e-6)
    # By itself it is judged as the run was.
    assert main(["evaluate", str(run / "best"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["map_at_10"]
    assert found == pytest.approx(told["metrics"]["map_at_10"], abs=1e-6)
    assert not (run / "best" / "verification.json").exists()
