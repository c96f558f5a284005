"""Attacks: they succeed on what does not protect, and can only guess where something does."""

import dataclasses
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedss
from fedss.cli import main
from fedss.core.algorithm import select
from fedss.models import embed_pixels, flatten_
from fedss.runs.audits import Audit, Finding, read_audit, write_audit
from fedss.training.build import build_model, server_optimizer
from fedss.trust.attacks import (
    class_size,
    intersection,
    membership,
    update_direction,
    update_norm,
)
from fedss.trust.audit import audit
from fedss.trust.simulated import read_simulated, train_again
from fedss.trust.updates import _gain, _pairs
from tests.reference import tiny_backbone, tiny_dataset
from tests.sites import write_secret

SETTINGS: dict[str, Any] = {
    **{"glyphs_classes": 80, "glyphs_clients": 8, "client_classes": 6, "sample_size": 16},
    **{"image_size": 12, "backbone": "conv4-8", "embedding_size": 8, "rounds": 3, "workers": 1},
    **{"class_row_lr": 2.0, "clients_per_round": 32, "eval_every": 0},
}
REQUESTS = ["request", "replay", "intersection"]
UPDATES = ["update norm", "update direction", "membership"]


def train(folder: Path, **changes: Any) -> Path:
    fedss.train(fedss.Config(**{**SETTINGS, **changes}), folder)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose draws are keyed by its seed alone, and one that has a secret."""
    folder = tmp_path_factory.mktemp("runs")
    secret = write_secret(folder / "secret")
    train(folder / "open", local_epochs=4)
    train(folder / "secret-run", secret_file=str(secret))
    return folder


@pytest.fixture(scope="module")
def opened(runs: Path) -> Audit:
    return audit(runs / "open", seconds=600)


def last(found: Audit) -> dict[str, Finding]:
    return {finding.name: finding for finding in found.attacks}


def test_attacks_succeed_on_a_run_that_hides_nothing(opened):
    assert (opened.mode, opened.rounds) == ("fedss, uniform without a secret", 3)
    assert (opened.trained_again, opened.why) == (3, "")
    assert {f.name for f in opened.attacks if f.rounds == 1} == {*REQUESTS, *UPDATES}
    assert {f.rounds for f in opened.attacks} == {1, 2, 3}
    by_name = last(opened)
    for name, least in (("replay", 0.6), ("update norm", 0.6), ("update direction", 0.9)):
        assert by_name[name].precision > max(least, by_name[name].guess + 0.3), by_name[name]
        assert by_name[name].recall > 0.6, by_name[name]
    for name in ("replay", "intersection", "update norm", "update direction", "membership"):
        assert by_name[name].succeeds, by_name[name]
    # One request tells nothing by itself; each further one of a client tells more.
    steps = [f for f in opened.attacks if f.name == "intersection"]
    assert steps[0].precision == steps[0].guess
    assert steps[0].precision < steps[1].precision < steps[2].precision
    assert steps[2].recall == 1
    assert not any(finding.hidden for finding in opened.attacks)


def test_classes_of_many_images_are_told_where_sizes_differ(tmp_path):
    changes = {"partition": "dirichlet:0.2", "partition_clients": 16, "client_classes": None}
    found = last(audit(train(tmp_path / "run", rounds=1, **changes)))["class size"]
    assert found.succeeds
    assert found.among == "own classes"


def fails(found: Audit, *names: str, named: bool = True) -> None:
    """Where a mode claims to hide something, and nowhere else, the attack can only guess.

    ``named``: it names classes all the same; else there are none to name.
    """
    assert {f.name for f in found.attacks if f.hidden} == {*names}
    for finding in found.attacks:
        assert not finding.broken, finding
        assert finding.name not in UPDATES or not finding.hidden
    for name in {*names} - {"request"}:
        assert last(found)[name].precision <= last(found)[name].guess + 0.05
        # It is not for want of naming any.
        assert last(found)[name].recall > 0.1 if named else last(found)[name].recall == 0


def test_who_does_not_know_the_secret_cannot_replay(runs):
    found = audit(runs / "secret-run", seconds=0)
    fails(found, "replay")
    assert last(found)["intersection"].succeeds


def test_what_a_fixed_cover_hides_and_a_server_that_draws_does_not(tmp_path, runs):
    short: dict[str, Any] = {"rounds": 3, "local_steps": 1}
    keyed = {**short, "secret_file": str(runs / "secret")}
    fails(audit(train(tmp_path / "1", sampler="sticky", **keyed), seconds=0), *REQUESTS[1:])
    # Clients that take turns with their classes, beside negatives that stay, are given away.
    fails(
        audit(train(tmp_path / "2", sampler="sticky", **{**keyed, "sample_size": 6}), seconds=0),
        "replay",
    )
    sticky = audit(train(tmp_path / "3", sampler="sticky", **short), seconds=0)
    fails(sticky)
    assert last(sticky)["replay"].precision > 0.9
    deck = audit(train(tmp_path / "4", sampler="deck", **short), seconds=0)
    fails(deck)
    told = last(deck)["request"]
    assert (told.precision, told.recall) == (1, 1)
    assert told.guess < 0.2
    full = audit(train(tmp_path / "5", method="full", **short), seconds=0)
    fails(full, *REQUESTS)
    for name in REQUESTS:
        # Of the clients, or of all their requests, one more than another.
        assert last(full)[name].precision == pytest.approx(last(full)[name].guess, abs=0.01)
    assert last(full)["update direction"].succeeds
    for requests, mode in (("all", "all rows"), ("common", "a set common to a round")):
        same = audit(train(tmp_path / requests, requests=requests, **short), seconds=20)
        assert same.mode == f"fedss, {mode}"
        fails(same, *REQUESTS)
        # All clients ask for the same: what is kept of it over the rounds is none of theirs more
        # than another's, and what a client changes is not hidden.
        assert last(same)["intersection"].recall > 0.1
        assert last(same)["update direction"].succeeds
        # Zeros say which rows a client took, or that it has no class in the set.
        zeros = last(same)["unchanged rows"]
        assert (zeros.succeeds, zeros.recall) == (requests == "all", 1)
    heads = audit(train(tmp_path / "7", method="local-heads", **short), seconds=0)
    fails(heads, *REQUESTS, named=False)
    assert {finding.name for finding in heads.attacks} == {*REQUESTS, "membership"}
    moments = audit(train(tmp_path / "6", method="moments", **short), seconds=0)
    assert (moments.mode, last(moments)["request"].precision) == ("moments", 1)


def test_what_is_simulated_again_is_what_the_run_sent(runs, opened):
    """Figures by a slow count of what is recorded while the run is trained once more."""
    from fedss.core import algorithm
    from fedss.training import loop

    data = fedss.load_data(fedss.Config(**SETTINGS)).train
    sent: list[dict[int, set[int]]] = []
    names: dict[str, list[int]] = {"update norm": [0, 0], "update direction": [0, 0]}

    def watched(*arguments: Any) -> Any:
        state, updates, failures = algorithm.run_round(*arguments)
        sent.append({u.client: {*u.ids_S.tolist()} for u in updates})
        for u in updates:
            own = {*data.labels[data.clients == u.client].tolist()}
            for name, attack in (
                ("update norm", update_norm),
                ("update direction", update_direction),
            ):
                named = {*attack(u.ids_S.numpy(), u.rows_delta_SD.numpy()).tolist()}
                names[name][0] += len(named & own)
                names[name][1] += len(named)
        return state, updates, failures

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "run_round", watched)
        train(runs / "again", local_epochs=4)
    found = last(opened)
    for name, (right, named) in names.items():
        assert found[name].precision == right / named
    common: dict[int, set[int]] = {}
    for requests in sent:
        for k, ids in requests.items():
            common[k] = common.get(k, ids) & ids
    own = {k: {*data.labels[data.clients == k].tolist()} for k in common}
    right = sum(len(common[k] & own[k]) for k in common)
    assert found["intersection"].precision == right / sum(map(len, common.values()))
    assert found["intersection"].recall == right / sum(map(len, own.values()))
    right = sum(len(ids & own[k]) for requests in sent for k, ids in requests.items())
    rows = sum(len(ids) for requests in sent for ids in requests.values())
    assert found["intersection"].guess == found["request"].precision == right / rows


def test_gains_are_those_of_the_loss(runs):
    """Log odds of a label, before and after an update, image by image in plain Python."""
    simulated = read_simulated(runs / "open", {}, False)
    images, model = simulated.data.train, build_model(simulated.config, simulated.data, None)
    theta_P = flatten_(model).theta_P
    model.eval()
    checked = []

    def log_odds(plan: Any, backbone_P: Any, rows_SD: Any, ids_S: Any, example: int) -> float:
        theta_P.copy_(backbone_P)
        h_D = embed_pixels(model, images.pixels[[example]])[0].tolist()
        exps = {}
        for label, row_D in zip(ids_S.tolist(), rows_SD.tolist(), strict=True):
            cos = sum(h * w for h, w in zip(h_D, row_D, strict=True)) / math.hypot(*row_D)
            exps[label] = math.exp(plan.scoring.scale * cos)
        of_label = exps.pop(int(images.labels[example]))
        return math.log(of_label / sum(exps.values()))

    def listen(engine: Any, state: Any, plan: Any, updates: Any) -> None:
        optimizer = server_optimizer(simulated.config)
        for u in updates[:2]:
            pairs = _pairs(simulated, plan, u.client, simulated.own(u.client))
            inside, outside = pairs.T
            assert (images.clients[inside] == u.client).all()
            assert (images.clients[outside] != u.client).all()
            assert (images.labels[inside] == images.labels[outside]).all()
            gain_N = _gain(simulated, engine, state, plan, u, inside[:3])
            rows_SD = select(optimizer, state, u.ids_S)
            after = state.backbone_P + u.backbone_delta_P, rows_SD + u.rows_delta_SD
            for gain, example in zip(gain_N, inside[:3].tolist(), strict=True):
                expected = log_odds(plan, *after, u.ids_S, example)
                expected -= log_odds(plan, state.backbone_P, rows_SD, u.ids_S, example)
                assert gain == pytest.approx(expected, abs=1e-3)
                checked.append(gain)

    assert next(iter(train_again(simulated, listen))) == (1, True)
    assert len(checked) == 6


def test_attacks_on_numbers_made_up():
    rng = np.random.default_rng(0)
    ids_S, towards_D = np.arange(0, 40, 2), rng.normal(size=8)
    own_S = np.isin(np.arange(20), [1, 4, 5, 9])
    far_S = np.where(own_S, rng.uniform(2, 3, 20), -rng.uniform(0.01, 0.1, 20))
    delta_SD = far_S[:, None] * (towards_D + 0.1 * rng.normal(size=(20, 8)))
    for attack in (update_norm, update_direction):
        assert attack(ids_S, delta_SD).tolist() == ids_S[own_S].tolist()
        assert attack(ids_S[:1], delta_SD[:1]).tolist() == [0]
        assert len(attack(ids_S, np.zeros((20, 8)))) in (0, 20)
    # Of the own rows, 2 to 18 of the ids, those that moved farther than their mean.
    mean = np.linalg.norm(delta_SD[own_S], axis=1).mean()
    large_S = own_S & (np.linalg.norm(delta_SD, axis=1) > mean)
    assert class_size(ids_S, delta_SD).tolist() == ids_S[large_S].tolist()
    # Of equal spread the border lies half-way; a narrow one inside a wide one has two.
    inside, outside = np.array([2.0, 4.0]), np.array([-1.0, 1.0])
    assert membership(np.array([1.4, 1.6, 9.0]), inside, outside).tolist() == [False, True, True]
    wide = np.array([-9.0, 9.0])
    assert membership(np.array([-8.0, 0.0, 8.0]), wide, outside).tolist() == [True, False, True]
    sets = [np.array(ids) for ids in ([1, 2, 5, 9], [2, 3, 5, 9], [0, 5, 9])]
    assert intersection(sets).tolist() == [5, 9]


def test_the_command_prints_a_table_or_json_and_the_report_has_it(runs, capsys):
    run = runs / "open"
    assert main(["audit", str(run), "--json", "--seconds", "0"]) == 0
    printed = json.loads(capsys.readouterr().out)
    (of_run,) = printed["runs"]
    assert (of_run["trained_again"], of_run["why"]) == (1, "more than 0 seconds")
    keys = {field.name for field in dataclasses.fields(Finding)} | {"mode"}
    assert all({*attack} == keys for attack in printed["attacks"])
    assert {a["name"] for a in printed["attacks"]} == {*REQUESTS, *UPDATES}
    assert main(["audit", str(run), "--seconds", "0"]) == 0
    lines = capsys.readouterr().out.rstrip().splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[-1].endswith("% of what is there")
    (row,) = (line.split() for line in lines if "replay" in line and "/" in line)
    found = {a["rounds"]: a for a in printed["attacks"] if a["name"] == "replay"}
    cells = [f"{100 * f['precision']:.0f}/{100 * f['recall']:.0f}" for f in found.values()]
    assert row == ["replay", *cells, f"{100 * found[3]['guess']:.0f}"]
    page = (run / "report.html").read_text()
    assert page.count('<h2 id="audit">What it told</h2>') == 1
    assert all(f"<td>{cell}</td>" in page for cell in cells)
    assert "updates of 1 round (more than 0 seconds)" in page


def test_an_audit_is_read_as_it_was_written(tmp_path, opened):
    assert read_audit(tmp_path) is None
    write_audit(tmp_path, opened)
    assert read_audit(tmp_path) == opened
    path = tmp_path / "audit.json"
    path.write_text(path.read_text().replace('"precision": ', '"precision": 7', 1))
    with pytest.raises(fedss.RunFolderError, match=r"'precision': expected a share.*fedss audit"):
        read_audit(tmp_path)


def test_of_a_comparison_each_mode_is_audited(tmp_path, capsys):
    config = fedss.Config(**{**SETTINGS, "rounds": 1, "local_steps": 1})
    fedss.compare(config, ["fedss", "pos-only", "central"], [0], tmp_path / "both")
    assert main(["audit", str(tmp_path / "both"), "--json", "--seconds", "0"]) == 0
    printed = json.loads(capsys.readouterr().out)
    modes = {"fedss, uniform without a secret", "pos-only"}
    assert {attack["mode"] for attack in printed["attacks"]} == modes
    page = (tmp_path / "both" / "report.html").read_text()
    assert all(mode in page for mode in modes)


def copies(runs: Path, folder: Path) -> Iterator[tuple[Path, list[str], str]]:
    """Folders that cannot be audited, options, and what is said."""
    yield folder / "none", [], "config.json"
    yield runs / "open" / "model", [], "got a model"
    wrong = write_secret(folder / "wrong", "wrong")
    yield runs / "secret-run", ["--secret-file", str(wrong)], "got another"
    yield runs / "secret-run", ["--secret-file", str(folder / "gone")], "cannot read it"
    yield runs / "open", ["--glyphs-classes", "81"], "expected the images that it was trained on"
    own = {"data": tiny_dataset(), "backbone": tiny_backbone()}
    fedss.train(fedss.Config(**{**SETTINGS, "sample_size": 7}), folder / "own", **own)
    yield folder / "own", [], "expected the images"
    train(folder / "pooled", method="central", rounds=1)
    yield folder / "pooled", [], "pooled"
    shutil.copytree(runs / "open", folder / "other")
    path = folder / "other" / "records.jsonl"
    path.write_text(path.read_text().replace('"class_rows": 512', '"class_rows": 511'))
    yield folder / "other", [], "expected requests for 511 rows in round 1, as recorded, got 512"
    path = folder / "other" / "config.json"
    path.write_text(path.read_text().replace('"conv4-8"', '"os:abort"'))
    yield folder / "other", [], "would import os:abort"


def test_what_cannot_be_audited_is_one_line(runs, tmp_path, capsys):
    for folder, options, said in copies(runs, tmp_path):
        capsys.readouterr()
        assert main(["audit", str(folder), *options]) == 2
        out, err = capsys.readouterr()
        (line,) = err.splitlines()
        assert out == ""
        assert line.startswith("fedss audit: ")
        assert said in line


def test_rounds_that_cannot_be_trained_again_are_not(tmp_path, runs):
    fedss.train(fedss.Config(**SETTINGS), tmp_path / "next", start=runs / "open")
    found = audit(tmp_path / "next")
    assert (found.trained_again, found.why) == (0, "the run began with the weights of another")
    assert {f.name for f in found.attacks} == {*REQUESTS}
    # A loss other than the recorded one: those are not the updates that were sent.
    shutil.copytree(runs / "open", tmp_path / "other")
    path = tmp_path / "other" / "records.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[1]["loss"] *= 1.05
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = audit(tmp_path / "other", seconds=600)
    assert (found.trained_again, found.why) == (1, "round 2 came out otherwise than recorded")


def test_a_backbone_alone_tells_of_images(tmp_path):
    """Images that a client trains on move otherwise than others of their classes."""
    changes = {"method": "local-heads", "client_lr": 0.2, "class_row_lr": 0.3, "local_epochs": 8}
    found = last(audit(train(tmp_path / "run", **changes), seconds=600))
    assert found["membership"].succeeds
    assert not found["membership"].hidden
    assert found["membership"].recall > 0.3
