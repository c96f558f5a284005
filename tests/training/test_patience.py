"""Early stopping on validation, against a plain loop over the figures of a run without it."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import fedss
from fedss.cli import main
from fedss.models import fingerprint
from fedss.runs.findings import read_verification
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
    # What was measured on the run's own images is kept, as beside a run: `identify` needs it.
    measured = run / "best" / "verification.json"
    assert measured.exists()
    records = [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]
    figures = [record["metrics"]["map_at_10"] for record in records]
    is_last = figures.index(max(figures)) == len(figures) - 1
    assert (read_verification(run / "best") == read_verification(run)) == is_last
    measured.unlink()
    assert main(["evaluate", str(run / "best"), "--eval-split", "test", "--json"]) == 0
    assert main(["evaluate", str(run / "best"), "--data-seed", "1", "--json"]) == 0
    assert not measured.exists()


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    """A run that patience ended: its best round is not its last."""
    config = fedss.Config(
        **GLYPHS,
        backbone="conv4-4",
        embedding_size=4,
        clients_per_round=2,
        workers=1,
        rounds=20,
        eval_split="validation",
        eval_every=1,
        patience=1,
        lr_schedule="constant",
    )
    run = fedss.train(config, tmp_path_factory.mktemp("kept") / "run")
    told = json.loads((run.folder / "best" / "config.json").read_text())["config"]
    assert told["round"] < run.summary["rounds"]
    return run.folder


def test_the_best_model_is_exported_with_its_own_card(kept, capsys):
    best, told = kept / "best", json.loads((kept / "best" / "config.json").read_text())["config"]
    assert main(["export", str(best), "--format", "safetensors"]) == 0
    exported = fedss.load(best / "export" / "model.safetensors")
    assert fingerprint(exported) == fingerprint(fedss.load(best)) != fingerprint(fedss.load(kept))
    card = (best / "export" / "MODEL_CARD.md").read_text()
    assert f"These are the weights of round {told['round']} of 20: those that did best" in card
    assert f"| MAP@10 | {told['metrics']['map_at_10']:.4f} |" in card
    of_run = json.loads((kept / "summary.json").read_text())[0]
    assert of_run["map_at_10"] != told["metrics"]["map_at_10"]
    assert f"| MAP@10 | {of_run['map_at_10']:.4f} |" not in card
    train = fedss.load_data(fedss.Config(**GLYPHS)).train
    assert f"| training classes | {len(train.class_names)} |" in card
    # A folder is of one model, so the run's own goes elsewhere.
    elsewhere = ["--format", "safetensors", "--out", str(best / "export")]
    assert main(["export", str(kept), *elsewhere]) == 2
    assert "is the card of another model" in capsys.readouterr().err


def test_commands_take_the_best_model(kept, tmp_path, capsys):
    best, pictures = kept / "best", tmp_path / "pictures"
    test = fedss.load_data(fedss.Config(**GLYPHS)).test.query
    for i, (pixels, label) in enumerate(zip(test.pixels, test.labels, strict=True)):
        place = pictures / test.class_names[label]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[0]).save(place / f"{i:04}.png")
    one = str(next(pictures.rglob("*.png")))
    assert main(["embed", str(best), str(pictures), "--out", str(tmp_path / "e.npy")]) == 0
    files = [str(pictures / name) for name in json.loads((tmp_path / "e.names.json").read_text())]
    by_hand = fedss.embed_files(fedss.load(best), files).embeddings_ND
    assert np.allclose(np.load(tmp_path / "e.npy"), by_hand, atol=1e-6)
    assert main(["index", str(best), str(pictures)]) == 0
    assert (best / "index").exists()
    assert not (kept / "index").exists()
    capsys.readouterr()
    assert main(["search", str(best), one, "--json", "--count", "1"]) == 0
    (match,) = json.loads(capsys.readouterr().out)[0]["matches"]
    assert match["path"] == one
    (best / "verification.json").unlink(missing_ok=True)
    assert main(["identify", str(best), one]) == 2
    assert f"fedss evaluate {best} measures one" in capsys.readouterr().err
    assert main(["evaluate", str(best)]) == 0
    assert main(["identify", str(best), one]) == 0


def test_a_later_best_model_has_no_figures_of_the_one_before(kept, tmp_path):
    run = Path(shutil.copytree(kept, tmp_path / "run"))
    about = json.loads((run / "config.json").read_text())["config"]
    before = json.loads((run / "best" / "config.json").read_text())["config"]
    assert main(["evaluate", str(run / "best")]) == 0
    config = fedss.Config(**{**about, "patience": 40, "rounds": 40})
    fedss.train(config, run)
    after = json.loads((run / "best" / "config.json").read_text())["config"]
    assert after["round"] > before["round"]
    assert not (run / "best" / "verification.json").exists()


def test_runs_start_from_the_best_model(kept, tmp_path):
    about = json.loads((kept / "config.json").read_text())["config"]
    config = fedss.Config(**{**about, "patience": None, "client_lr": 1e-9, "rounds": 1})
    config = dataclasses.replace(config, eval_split="test")
    out = tmp_path / "compared"
    fedss.compare(config, ["fedss"], [0], out, start=kept / "best")
    best, last = fedss.load(kept / "best"), fedss.load(kept)
    pixels = torch.from_numpy(fedss.load_data(config).test.query.pixels[:8])
    first = fedss.load(out / "fedss-seed0")(pixels)
    assert torch.allclose(first, best(pixels), atol=1e-4)
    assert not torch.allclose(first, last(pixels), atol=1e-2)
    # Runs added later start there too; and from nowhere else.
    fedss.compare(config, ["fedss", "full"], [0], out)
    second = fedss.load(out / "full-seed0")(pixels)
    assert torch.allclose(second, best(pixels), atol=1e-4)
    with pytest.raises(fedss.RunFolderError, match=r"its runs start from .*best, not from .*run;"):
        fedss.compare(config, ["fedss"], [0], out, start=kept)
    words = ["compare", "--data", "glyphs", "--from", "nowhere", "--out", str(tmp_path / "b")]
    assert main(words) == 2
