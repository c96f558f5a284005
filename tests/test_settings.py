"""What ``auto`` stands for: laws of the rules, and that a run keeps to what it began with."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedss.cli import main
from fedss.config import OPTIONS, Config
from fedss.errors import ConfigError, RunFolderError
from fedss.losses.methods import METHODS
from fedss.settings import Problem, auto_eval_every, resolve
from fedss.training.build import round_plan
from fedss.training.experiment import train

AUTO = [option.name for option in OPTIONS if option.auto]

problems = st.builds(
    Problem,
    classes=st.integers(2, 10**7),
    clients=st.integers(1, 10**7),
    images=st.floats(1, 10**5),
    own_classes=st.floats(1, 10**4),
)
configs = st.builds(
    Config,
    method=st.sampled_from(list(METHODS)),
    clients_per_round=st.integers(1, 10**5),
    rounds=st.integers(1, 10**5),
    server_optimizer=st.sampled_from(["sgd", "momentum", "adam"]),
    pretrained=st.booleans(),
)


@given(config=configs, problem=problems | st.none())
def test_every_problem_gets_settings_that_can_be(config: Config, problem: Problem | None) -> None:
    # Construction checks ranges: the rule has made another Config.
    resolved, settings = resolve(config, problem)
    assert list(settings) == [name for name in settings if name in AUTO]
    # These follow from n, which a federation learns while it runs.
    later = {"sample_size", "delta"} if problem is None or not config.noise else set()
    if problem is not None:
        later -= {"sample_size"}
    assert set(settings) == set(AUTO) - later
    for name, setting in settings.items():
        assert getattr(resolved, name) == setting.value != "auto"
        assert 10 < len(setting.why) < 100
    if problem is not None:
        assert resolved.sample_size <= problem.classes
    assert resolve(resolved, problem) == (resolved, {})


@given(rounds=st.integers(8, 10**5))
def test_a_run_has_eight_evaluations_or_more(rounds: int) -> None:
    every = auto_eval_every(rounds)
    assert rounds // every >= 8
    # And no more often than every 20 rounds in a long one, nor every round in one of 16.
    assert every <= 20
    assert rounds // every < 16 or every == 20


@given(config=configs, problem=problems, name=st.sampled_from([n for n in AUTO if n != "delta"]))
def test_a_value_of_the_user_wins(config: Config, problem: Problem, name: str) -> None:
    value = {
        "row_mean": "holders",
        "sample_size": 2,
        "eval_every": 2,
        "image_size": 32,
        "trainable": "last-1",
        "projection_init": "whitened",
        "rows_init": "means",
        "embedding_size": 8,
        "batch_size": 4,
    }.get(name, 0.25)
    resolved, settings = resolve(dataclasses.replace(config, **{name: value}), problem)
    assert getattr(resolved, name) == value
    assert name not in settings


@pytest.mark.parametrize(
    "told, batch",
    [
        ({}, 8),
        ({"trainable": "last-2"}, 8),
        ({"pretrained": True}, 8),
        ({"pretrained": True, "trainable": "last-2"}, 128),
        ({"pretrained": True, "trainable": "all"}, 8),
        ({"pretrained": True, "trainable": "last-2", "method": "central"}, 8),
    ],
)
def test_trained_blocks_take_one_step_for_all_images_of_a_client(
    told: dict[str, Any], batch: int
) -> None:
    config = Config(backbone="timm:tf_efficientnet_lite0", **told)
    problem = Problem(classes=892, clients=227, images=80, own_classes=12)
    resolved, _ = resolve(config, problem)
    assert resolved.batch_size == batch
    # A step for all images of a client is as long as its ten shorter ones together.
    if batch == 128:
        small, _ = resolve(dataclasses.replace(config, batch_size=8), problem)
        assert resolved.client_lr == pytest.approx(10 * small.client_lr, rel=0.01)


@given(problem=problems, cohort=st.integers(1, 10**4), rounds=st.integers(1, 10**4))
def test_a_row_moves_within_bounds_for_what_a_client_has_learnt(
    problem: Problem, cohort: int, rounds: int
) -> None:
    """Whatever the cohort and the momentum are, and the less the more images come at once."""
    resolved, _ = resolve(Config(clients_per_round=cohort, rounds=rounds), problem)
    gain = resolved.server_row_lr / (cohort * (1 - resolved.server_momentum))
    own, batch = problem.own_classes, min(8, problem.images)
    together = max(1, problem.images / own) ** 0.5 * max(1, batch / own)
    assert resolved.class_row_lr == pytest.approx(1 / together, rel=0.01)
    assert 0.49 < gain < 4.52  # sqrt(40 / 2) and rounding to three digits


@given(config=configs, problem=problems | st.none(), value=st.floats(1e-3, 1e3))
def test_who_gives_a_row_rate_gets_the_server_as_it_is(config, problem, value):
    """The rate of rows is then all of their step, as in the papers."""
    resolved, _ = resolve(dataclasses.replace(config, class_row_lr=value), problem)
    assert resolved.server_row_lr == config.server_lr
    # And for the mean over those who hold a row there is nothing to make up for.
    holders, _ = resolve(dataclasses.replace(config, row_mean="holders"), problem)
    assert holders.server_row_lr == config.server_lr


@given(config=configs, problem=problems, steps=st.integers(1, 100))
def test_few_local_steps_want_little_momentum_and_short_steps_of_rows(config, problem, steps):
    """A gradient alone overshoots, where many steps come to rest."""
    few = dataclasses.replace(config, local_steps=steps, pretrained=False)
    resolved, _ = resolve(few, problem)
    assert resolved.server_momentum <= max(0.0, 1 - 0.3 / steps) + 1e-3
    if resolved.row_mean == "cohort" and config.server_optimizer == "momentum":
        bound = max(1.0, steps) * config.clients_per_round * (1 - resolved.server_momentum)
        assert METHODS[config.method].pooled or resolved.server_row_lr <= 1.01 * bound
    # Passes over the same images count as the batches that they are.
    one = dataclasses.replace(config, pretrained=False)
    once, _ = resolve(one, problem)
    twice, _ = resolve(dataclasses.replace(one, local_epochs=2), problem)
    assert twice.server_momentum >= once.server_momentum


# From the formula in the docstring, by hand: K, R, n, images, P, and server_row_lr, class_row_lr
# and |S|.
@pytest.mark.parametrize(
    ("cohort", "rounds", "classes", "images", "own", "server", "row_lr", "size"),
    [
        (20, 120, 960, 32.0, 32.0, 0.5 * 20 * 0.1, 1, 74),  # E = 80
        (20, 30, 960, 32.0, 32.0, 2 * 20 * 0.1, 1, 74),  # E = 20
        (40, 60, 12000, 40.0, 40.0, 4 * 40 * 0.1, 1, 262),  # E = 8
        (4, 60, 960, 8.0, 8.0, 1 * 4 * 0.5, 1, 74),  # E = 2, T = 1
        (40, 60, 1000, 4.0, 4.0, 1 * 40 * 0.3, 1, 75),  # E = 9.6, T = 1
        (40, 60, 12000, 5.0, 5.0, 1 * 40 * 0.3, 1, 262),  # E = 1, T = 1
        (40, 120, 960, 20.0, 1.0, 0.5 * 40 * 0.12, 20**-0.5 / 8, 74),  # E = 100, one own class
        (4, 40, 960, 108.0, 18.0, 40 / 18 * 4 * 0.5, 6**-0.5, 74),  # E = 18, six in a round
    ],
)
def test_settings_of_known_problems(cohort, rounds, classes, images, own, server, row_lr, size):
    config = Config(clients_per_round=cohort, rounds=rounds)
    resolved, _ = resolve(config, Problem(classes, 10**6, images, own))
    assert resolved.server_row_lr == pytest.approx(server, rel=0.01)
    assert resolved.class_row_lr == pytest.approx(row_lr, rel=0.01)
    assert resolved.sample_size == size
    epochs, _ = resolve(
        dataclasses.replace(config, local_epochs=3), Problem(classes, 10**6, images, own)
    )
    more, _ = resolve(config, Problem(classes, 10**6, 3 * images, own))
    if images >= 8:  # else batches are smaller
        assert epochs.class_row_lr == more.class_row_lr


@pytest.mark.parametrize(("size", "share"), [("auto", 0.5), (2400, 0.25), (9600, 1.0)])
def test_where_a_set_is_common_a_class_is_seen_less_often(size, share):
    """In twice the rounds as often, and then its rate is the same."""
    problem = Problem(9600, 10**6, 320.0, 32.0)
    common = Config(requests="common", sample_size=size, rounds=120, clients_per_round=20)
    own = Config(rounds=round(120 * share), clients_per_round=20)
    resolved, settings = resolve(common, problem)
    assert resolved.sample_size == 9600 * share
    other, _ = resolve(own, problem)
    gains = [r.server_row_lr / (1 - r.server_momentum) for r in (resolved, other)]
    assert gains[0] == pytest.approx(gains[1])
    assert ("half of its images" in settings["sample_size"].why) if size == "auto" else True
    # In a federation it follows from n.
    unknown, _ = resolve(Config(requests="common"), None)
    assert [round_plan(unknown, n, 0).sample_size for n in (40, 100, 961)] == [40, 64, 481]


def test_momentum_follows_the_cohort():
    momentum = [resolve(Config(clients_per_round=k), None)[0].server_momentum for k in (1, 2, 4)]
    assert momentum == [0, 0, 0.5]
    assert resolve(Config(clients_per_round=10**4), None)[0].server_momentum == 0.9
    # Where all clients take part there is no luck of the draw to average out.
    sites = Problem(100, 4, 50.0, 10.0)
    assert resolve(Config(clients_per_round=4), sites)[0].server_momentum == 0.9
    assert resolve(Config(clients_per_round=2), sites)[0].server_momentum == 0.5


def test_an_unresolved_setting_is_told_of():
    with pytest.raises(ConfigError, match=r"fedss\.settings\.resolve"):
        round_plan(Config(), 10, 0)


def test_a_run_writes_its_settings_and_keeps_to_them(tmp_path: Path) -> None:
    config = Config(
        glyphs_classes=20, glyphs_clients=8, clients_per_round=4, rounds=1, client_lr=0.04
    )
    train(config, tmp_path / "run")
    path = tmp_path / "run/config.json"
    written = json.loads(path.read_text())
    assert written["config"]["class_row_lr"] == "auto"
    assert written["config"]["client_lr"] == 0.04
    assert set(written["resolved"]) == set(written["why"]) == set(AUTO) - {"client_lr", "delta"}
    # How often a run is evaluated decides no weight: versions may differ in that.
    del written["resolved"]["eval_every"]
    path.write_text(json.dumps(written | {"config": written["config"] | {"eval_every": 20}}))
    (record,) = map(json.loads, (tmp_path / "run/records.jsonl").read_text().splitlines())
    assert record["class_row_lr"] == written["resolved"]["class_row_lr"]
    assert train(config, tmp_path / "run").already_done
    # A version of fedss with other rules does not go on with other numbers.
    written["resolved"]["class_row_lr"] = 7.5
    path.write_text(json.dumps(written))
    with pytest.raises(RunFolderError, match=r"class_row_lr: 7\.5 there"):
        train(config, tmp_path / "run")


def test_info_shows_settings_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--glyphs-classes", "20", "--glyphs-clients", "8", "--scale", "9"]) == 0
    out = capsys.readouterr().out
    for name, setting in resolve(Config(), Problem(16, 8, 50.0, 8.0))[1].items():
        assert f" {name} " in out
        if name == "client_lr":
            assert setting.why in out
