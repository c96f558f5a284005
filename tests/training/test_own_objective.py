"""A loss of a user's own, in place of the library's."""

import dataclasses
import json
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import fedss
from examples.own_loss import smoothed_softmax
from fedss.losses.methods import METHODS
from fedss.losses.softmax import logits, positive_hinge
from fedss.training.objective import objective_name
from tests import reference

DATA = reference.tiny_dataset()
SMALL = fedss.Config(
    rounds=2,
    clients_per_round=3,
    sample_size=6,
    method="fedss-published",
    embedding_size=4,
    batch_size=3,
    local_epochs=2,
    eval_every=0,
    workers=1,
)


def train(out, config=SMALL, **options):
    return fedss.train(config, out, data=DATA, backbone=reference.tiny_backbone(), **options)


def mine(h_BD, rows_SD, target_B, sample, scoring, absent):
    """The corrected softmax, written anew."""
    o_BS = logits(h_BD, rows_SD, target_B, scoring) - sample.log_q_S
    return F.cross_entropy(o_BS, target_B, reduction="none")


def trained(out, config, **options):
    run = train(out, config, **options)
    weights = (run.folder / "model" / "model.safetensors").read_bytes()
    lines = (run.folder / "records.jsonl").read_text().splitlines()
    return weights, [{**json.loads(line), "seconds": None} for line in lines]


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "fedss-published"},
        {"method": "full"},
        {"method": "pos-only"},
        {"method": "central"},
        {"method": "fedss-published", "stack": 2},
        {"method": "fedss-published", "margin_kind": "cosface", "margin": 0.2, "workers": 2},
    ],
    ids=str,
)
def test_the_librarys_loss_written_anew_gives_the_same_bits(tmp_path, changes):
    config = dataclasses.replace(SMALL, **changes)
    expected = trained(tmp_path / "theirs", config)
    assert trained(tmp_path / "mine", config, objective=mine) == expected


def test_another_loss_gives_another_model(tmp_path):
    expected = trained(tmp_path / "theirs", SMALL)

    def twice(*arguments):
        return 2 * mine(*arguments)

    found = trained(tmp_path / "mine", SMALL, objective=twice)
    assert found[0] != expected[0]
    first, second = (records[0]["loss"] for _, records in (expected, found))
    assert second > 1.5 * first


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_method_that_its_loss_makes_keeps_it(tmp_path, method):
    config = dataclasses.replace(SMALL, method=method, rounds=1)
    if method in ("full", "fedss", "pos-only", "fedss-published", "local-heads", "central"):
        train(tmp_path / "run", config, objective=mine)
        return
    message = (
        f"objective 'mine': method {method} .*expected .* full, fedss, pos-only, "
        "fedss-published, local-heads, central"
    )
    with pytest.raises(fedss.ConfigError, match=message):
        train(tmp_path / "run", config, objective=mine)
    with pytest.raises(fedss.ConfigError, match=message):
        fedss.compare(SMALL, ["fedss", method], [0], tmp_path / "c", data=DATA, objective=mine)
    assert not list(tmp_path.iterdir())


class Reduced:
    """An objective need be no function."""

    def __call__(self, *arguments):
        return mine(*arguments).mean()


def jitters(*arguments):
    return mine(*arguments) + torch.rand(2)


def breaks(*arguments):
    raise KeyError("x")


def no_embeddings(h_BD, rows_SD, *others):
    return mine(h_BD.detach(), rows_SD, *others)


def no_rows(h_BD, rows_SD, *others):
    return mine(h_BD, rows_SD.detach(), *others)


def neither(h_BD, rows_SD, *others):
    return mine(h_BD.detach(), rows_SD.detach(), *others)


def numbers(*arguments):
    return mine(*arguments).tolist()


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (Reduced(), r"objective 'Reduced': expected .* a loss per image, \[2\], got \[\]$"),
        (numbers, r"objective 'numbers': expected a tensor .*, got list$"),
        (breaks, "objective 'breaks' fails: KeyError: 'x'"),
        (jitters, "objective 'jitters' draws random numbers"),
        (no_embeddings, "objective 'no_embeddings' has no gradient .* embeddings h_BD"),
        (no_rows, "objective 'no_rows' has no gradient .* class rows rows_SD"),
        (neither, "objective 'neither' has no gradient"),
    ],
)
def test_what_is_no_loss_is_refused_before_training(tmp_path, objective, message):
    with pytest.raises(fedss.ConfigError, match=message):
        train(tmp_path / "run", objective=objective)
    assert not (tmp_path / "run").exists()


def with_a_branch(h_BD, *others):
    """A value decides what is done next, which torch.func.vmap cannot do."""
    loss_B = mine(h_BD, *others)
    return loss_B if loss_B.max().item() < 1e9 else loss_B / 2


def test_a_loss_that_cannot_be_stacked_is_told_so(tmp_path):
    message = r"vmap cannot run objective 'with_a_branch'.*leave"
    with pytest.raises(fedss.ConfigError, match=message):
        train(tmp_path / "run", dataclasses.replace(SMALL, stack=2), objective=with_a_branch)
    assert trained(tmp_path / "run", SMALL, objective=with_a_branch) == trained(
        tmp_path / "theirs", SMALL
    )


def scaled(factor, *arguments, plus=0.0):
    return factor * mine(*arguments) + plus


def weighted(*arguments, weights):
    return mine(*arguments) * weights.mean()


@pytest.mark.parametrize(
    ("objective", "others"),
    [
        (partial(scaled, 2), [partial(scaled, 3), partial(scaled, 2.0), scaled]),
        (partial(scaled, 2, plus=1), [partial(scaled, 2), partial(partial(scaled, 2), plus=0)]),
        (partial(scaled, [1] * 900), [partial(scaled, [1] * 899 + [2])]),
        (
            partial(weighted, weights=torch.linspace(0, 1, 5000)),
            [
                partial(weighted, weights=torch.linspace(0, 1, 5000).roll(1)),
                partial(weighted, weights=torch.linspace(0, 1, 5000).view(50, 100)),
                partial(weighted, weights=torch.linspace(0, 1, 5000).double()),
            ],
        ),
    ],
    ids=["positional", "keywords", "long", "tensor"],
)
def test_a_partial_is_named_by_what_is_in_it(objective, others):
    names = [objective_name(one) for one in (objective, *others)]
    assert len(set(names)) == len(names)
    assert max(map(len, names)) < 200
    again = partial(objective.func, *objective.args, **dict(reversed(objective.keywords.items())))
    assert objective_name(again) == names[0]
    assert objective_name(partial(scaled, 2, plus="a")) == "scaled(2, plus='a')"
    # A function's own name counts, also where it was given.
    smoothed: Any = smoothed_softmax(0.5)
    assert objective_name(partial(smoothed, x=1)) == "smoothed_loss(0.5)(x=1)"


def test_a_run_does_not_go_on_with_a_partial_of_another_number(tmp_path):
    train(tmp_path / "run", objective=partial(scaled, 2))
    assert train(tmp_path / "run", objective=partial(scaled, 2)).already_done
    message = r"objective: 'scaled\(2\)' there, 'scaled\(3\)' now"
    with pytest.raises(fedss.RunFolderError, match=message):
        train(tmp_path / "run", objective=partial(scaled, 3))


@pytest.mark.parametrize(
    ("objective", "got"),
    [
        (lambda *arguments: mine(*arguments), "got a lambda"),
        (partial(lambda *arguments: mine(*arguments)), "got a lambda"),
        (partial(scaled, np.float32(2)), "got one of type float32"),
        (partial(scaled, plus=[object()]), "got one of type object"),
    ],
)
def test_a_loss_without_a_name_is_refused(tmp_path, objective, got):
    with pytest.raises(fedss.ConfigError, match=f"^objective: .*{got}; give .* a name with def$"):
        train(tmp_path / "run", objective=objective)
    with pytest.raises(fedss.ConfigError, match=got):
        fedss.compare(SMALL, ["fedss"], [0], tmp_path / "c", data=DATA, objective=objective)
    assert not list(tmp_path.iterdir())


def test_a_run_remembers_the_name_of_its_loss(tmp_path):
    train(tmp_path / "run", objective=mine)
    model = json.loads((tmp_path / "run" / "config.json").read_text())["model"]
    assert model["objective"] == "mine"
    assert train(tmp_path / "run", objective=mine).already_done
    for objective, name in ((None, "None"), (positive_hinge, "'positive_hinge'")):
        with pytest.raises(fedss.RunFolderError, match=f"objective: 'mine' there, {name} now"):
            train(tmp_path / "run", objective=objective)
    # A run of before there were any.
    train(tmp_path / "old")
    path = tmp_path / "old" / "config.json"
    content = json.loads(path.read_text())
    del content["model"]["objective"]
    path.write_text(json.dumps(content))
    assert train(tmp_path / "old").already_done
    with pytest.raises(fedss.RunFolderError, match="objective: None there, 'mine' now"):
        train(tmp_path / "old", objective=mine)
