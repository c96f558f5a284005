"""Runs with differential privacy: what they tell, how they go on, and when they end."""

import dataclasses
import json
import re
import sys

import pytest
import torch

import fedss
from fedss import ConfigError
from fedss.cli import main
from fedss.core.algorithm import draw_cohort
from fedss.core.defence import Defence
from fedss.core.privacy import Noise
from fedss.inference.model_card import model_card
from fedss.privacy import epsilon_spent, rounds_within, sampling_rate
from fedss.secret import make_secret
from fedss.training import private
from fedss.training.build import defence
from fedss.trust.audit import audit
from tests.training.test_experiment import DATA, SMALL, digest, lines, train

CLIENTS = len(DATA.train.client_names)
PRIVATE = dataclasses.replace(SMALL, method="full", clip="0.5", noise=1.0, eval_every=0)


@pytest.mark.report
def test_what_a_private_run_tells(tmp_path):
    run = train(tmp_path / "run", PRIVATE)
    records, (rate, delta) = lines(run.folder), (sampling_rate(3, CLIENTS), run.summary["delta"])
    sizes = {len(draw_cohort(CLIENTS, 3, 0, r, noise=Noise(1.0, 3))) for r in range(6)}
    assert len(sizes) > 1
    for number, record in enumerate(records, start=1):
        # How many there were in a cohort is not told, nor what they said.
        assert (record["loss"], record["examples"], record["clients"]) == (None, None, 3)
        assert record["class_rows"] == 3 * record["num_classes"]
        assert "failures" not in record
        assert record["clip"] == 0.5
        spent = epsilon_spent(1.0, [rate] * number, delta)
        assert record["epsilon"] == pytest.approx(spent)
    assert len({record["bytes_up"] for record in records}) == 1
    assert run.summary["epsilon"] == records[-1]["epsilon"]
    assert (run.summary["noise"], delta) == (1.0, float(f"{CLIENTS**-1.1:.2g}"))
    assert "ε spent" in (run.folder / "report.html").read_text()
    card = model_card(run.folder, run.embedder.spec, "abc", "none")
    assert f"ε = {run.summary['epsilon']:.3g} at δ = {delta:.2g}" in card
    assert "not a privacy method" not in card


@pytest.mark.parametrize("method", ["full", "local-heads"])
def test_bytes_are_those_of_messages(method, tmp_path):
    """Worked out for as many clients as there are on average, they are what each one sends."""
    noisy = dataclasses.replace(PRIVATE, rounds=1, method=method)
    told = lines(train(tmp_path / "run", noisy).folder)[0]
    plain = dataclasses.replace(noisy, noise=0.0)
    sent = lines(train(tmp_path / "plain", plain).folder)[0]
    names = [name for name in sent if "bytes" in name or name in ("class_rows", "clients")]
    assert {name: told[name] for name in names} == {name: sent[name] for name in names}


@pytest.mark.parametrize("clip", ["0.5", "adaptive:0.2"])
def test_an_interrupted_private_run_goes_on_bit_for_bit(clip, tmp_path):
    config = dataclasses.replace(PRIVATE, clip=clip, checkpoint_every=4)
    whole = train(tmp_path / "whole", config)

    def interrupt(record):
        if record["round"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", config, on_round=interrupt)
    # What noise has hidden once is never hidden anew: each round is kept before the next.
    assert (tmp_path / "parts" / "checkpoint" / "round-000003").exists()
    parts = train(tmp_path / "parts", config)
    assert digest(parts.folder) == digest(whole.folder)
    assert lines(parts.folder) == lines(whole.folder)
    if clip != "0.5":
        assert len({record["clip"] for record in lines(whole.folder)}) == 6


def test_a_run_ends_before_it_spends_more_than_its_budget(tmp_path):
    delta = 0.01
    budget = epsilon_spent(1.0, [sampling_rate(3, CLIENTS)] * 4, delta) * 1.0001
    config = dataclasses.replace(PRIVATE, epsilon=budget, delta=delta)
    assert rounds_within(budget, 1.0, sampling_rate(3, CLIENTS), delta, 6) == 4
    run = train(tmp_path / "run", config)
    assert run.summary["rounds"] == len(lines(run.folder)) == 4
    assert run.summary["epsilon"] <= budget
    assert run.summary["map_at_10"] is not None
    assert train(tmp_path / "run", config).already_done
    with pytest.raises(ConfigError, match="epsilon: one round spends"):
        train(tmp_path / "none", dataclasses.replace(config, epsilon=1e-3))


@pytest.mark.parametrize("method", [m for m in fedss.METHODS if m not in ("full", "local-heads")])
def test_methods_that_ask_for_own_classes_claim_nothing(method, tmp_path):
    with pytest.raises(ConfigError, match=r"^noise: ") as caught:
        train(tmp_path / "run", dataclasses.replace(PRIVATE, method=method))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
    # A bound alone is for every method that has clients.
    if method not in ("central", "moments"):
        run = train(tmp_path / "bound", dataclasses.replace(PRIVATE, method=method, noise=0.0))
        assert "epsilon" not in run.summary
        assert lines(run.folder)[-1]["loss"] is not None


@pytest.mark.parametrize("requests", ["all", "common"])
def test_requests_that_tell_nothing_can_be_private(requests, tmp_path):
    config = dataclasses.replace(PRIVATE, method="fedss", requests=requests, rounds=2)
    whole = train(tmp_path / "whole", config)
    assert whole.summary["epsilon"] > 0
    rows = {"all": 12, "common": 6}[requests]
    assert [record["class_rows"] for record in lines(whole.folder)] == [3 * rows] * 2


def test_the_noise_of_a_run_with_a_secret_is_that_of_no_other(tmp_path):
    secret = tmp_path / "secret"
    make_secret(secret)
    config = dataclasses.replace(PRIVATE, secret_file=str(secret), delta=0.01)
    assert private.simulation_key(PRIVATE, DATA) is None
    key = private.simulation_key(config, DATA)
    assert key == private.simulation_key(dataclasses.replace(config, rounds=9, workers=2), DATA)
    images = dataclasses.replace(DATA.train, labels=DATA.train.labels[::-1].copy())
    others = [
        (config, dataclasses.replace(DATA, train=images)),
        (dataclasses.replace(config, client_lr=0.06), DATA),
    ]
    assert all(private.simulation_key(*other) != key for other in others)


def test_without_dp_accounting_there_is_one_line(tmp_path, monkeypatch, capsys):
    for name in [n for n in sys.modules if n.split(".")[0] == "dp_accounting"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(ConfigError, match=r'pip install "fedss\[dp\]"$'):
        train(tmp_path / "run", PRIVATE)


INFO = ["info", "--glyphs-classes", "40", "--glyphs-clients", "30", "--clients-per-round", "10"]


def test_info_says_what_will_be_spent(capsys):
    shared = [*INFO, "--method", "full", "--clip", "1", "--noise", "1", "--rounds", "50"]
    assert main([*shared, "--delta", "0.01"]) == 0
    spent = epsilon_spent(1.0, [1 / 3] * 50, 0.01)
    said = capsys.readouterr().out
    assert f"epsilon ε = {spent:.3g} at delta δ = 0.01 after 50 rounds\n" in said
    assert main([*shared, "--delta", "0.01", "--epsilon", "3"]) == 0
    rounds = rounds_within(3.0, 1.0, 1 / 3, 0.01, 50)
    said = capsys.readouterr().out
    assert re.search(rf"after {rounds} rounds, where the budget of 3 ends the run", said)
    assert main([*INFO, "--clip", "1", "--noise", "1"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main(INFO) == 0
    assert "epsilon" not in capsys.readouterr().out


def test_an_audit_hears_the_cohorts_of_a_private_run(tmp_path):
    config = fedss.Config(
        data="glyphs",
        glyphs_classes=30,
        glyphs_clients=10,
        image_size=16,
        backbone="conv4-8",
        embedding_size=8,
        method="full",
        rounds=2,
        clients_per_round=4,
        eval_every=0,
        clip="adaptive",
        noise=1.0,
        workers=1,
    )
    fedss.train(config, tmp_path / "run")
    found = audit(tmp_path / "run", seconds=60.0)
    assert found.rounds == 2
    json.dumps(dataclasses.asdict(found))
    assert torch.is_grad_enabled()


def test_whether_an_update_counts_depends_on_no_other_client(tmp_path):
    # The defences compare clients with each other: with them a client changes more than its part.
    assert defence(PRIVATE) == Defence()
    assert defence(dataclasses.replace(PRIVATE, noise=0.0)).norm_bound > 0
    with pytest.raises(ConfigError, match=r"^noise: .*aggregate median"):
        train(tmp_path / "run", dataclasses.replace(PRIVATE, aggregate="median"))
