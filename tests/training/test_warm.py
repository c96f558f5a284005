"""What clients tell of their features before the first round, and what a run makes of it."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn

import fedss
from fedss import Config, ConfigError, Dataset, RunFolderError
from fedss.core.class_rows import create_class_rows
from fedss.core.features import FeatureSums
from fedss.core.state import ServerState
from fedss.engines.local import LocalEngine
from fedss.models import load_embedder
from fedss.models.backbones import conv4_features
from fedss.runs.checkpoint import newest_round
from fedss.runs.records import bytes_moved, read_records
from fedss.training import loop, warm
from tests.training.test_experiment import digest, lines

CONFIG = Config(
    glyphs_classes=20,
    glyphs_clients=8,
    image_size=12,
    backbone="conv4-8",
    embedding_size=6,
    projection_init="whitened",
    rounds=3,
    clients_per_round=2,
    sample_size=8,
    workers=1,
    eval_every=1,
    checkpoint_every=1,
)


def dealt() -> Dataset:
    """Glyphs, of which each client holds 2 to 4 classes, and the first more images than there are
    features."""
    data = fedss.load_data(CONFIG)
    labels, image_N = data.train.labels, np.arange(len(data.train))
    clients = (labels // 2 + (image_N % 4 == 0)) % 8
    clients[(image_N % 2 == 0) & (labels < 13)] = 0
    return dataclasses.replace(data, train=dataclasses.replace(data.train, clients=clients))


DATA = dealt()
N, SIZE = len(DATA.train.class_names), 6
FEATURES = conv4_features(1, DATA.train.pixels.shape[2], 8)
CLIENTS = len(DATA.train.client_names)


def train(out: Path, config: Config = CONFIG, **more: Any) -> fedss.Run:
    return fedss.train(config, out, data=DATA, **more)


def changed(**values: Any) -> Config:
    return dataclasses.replace(CONFIG, **values)


Asked = list[tuple[list[int], Sequence[FeatureSums]]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """Which clients are asked, and what they tell."""
    found, ask = Asked(), LocalEngine.feature_sums

    def watch(engine: LocalEngine, *arguments: Any) -> list[FeatureSums]:
        sums = ask(engine, *arguments)
        found.append((arguments[1], sums))
        return sums

    monkeypatch.setattr(LocalEngine, "feature_sums", watch)
    return found


@pytest.fixture
def first_rows(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """Rows of all classes as a run's first round finds them, and when they were written."""
    found, run_round = list[tuple[Tensor, Tensor]](), loop.run_round  # type: ignore[attr-defined]

    def watch(server: Any, engine: Any, state: ServerState, plan: Any) -> Any:
        if not state.round:
            rows = state.class_rows
            found.append((rows.weight_ND.clone().float(), rows.updated_N.clone()))
        return run_round(server, engine, state, plan)

    monkeypatch.setattr(loop, "run_round", watch)
    return found


def unit_features(first: Path) -> np.ndarray:
    """Of all training images, from the layers alone; float64."""
    model = load_embedder(first)
    pixels = torch.from_numpy(DATA.train.pixels) / 255
    with torch.no_grad():
        scaled = (pixels - model.mean[:, None, None]) / model.std[:, None, None]
        features = model.backbone(scaled).double().numpy()
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def whitened_features(first: Path) -> np.ndarray:
    state = load_file(first / "model.safetensors")
    mean, axes = (state[f"whitening.{name}"].double().numpy() for name in ("mean_F", "axes_FK"))
    return (unit_features(first) - mean) @ axes


def interrupt_after(rounds: int) -> Any:
    def stop(record: Any) -> None:
        if record["round"] == rounds:
            raise KeyboardInterrupt

    return stop


def cut(out: Path, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kill a run in its first round: there is a model, and no checkpoint."""

    def die(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "run_round", die)
        with pytest.raises(KeyboardInterrupt):
            train(out, config)
    assert (out / "checkpoint" / "first" / "model.safetensors").exists()
    assert not newest_round(out / "checkpoint")


# --- a run that goes on


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"trainable": "head", "method": "moments", "class_row_lr": 0.5},
        {"trainable": "last-1", "row_store": "file", "row_dtype": "bfloat16"},
    ],
    ids=str,
)
def test_a_run_that_was_killed_ends_with_the_same_bits(
    changes: dict[str, Any], asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = changed(**changes, eval_every=0)
    train(tmp_path / "whole", config)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "later", config, on_round=interrupt_after(1))
    assert newest_round(tmp_path / "later" / "checkpoint") == 1
    cut(tmp_path / "before", config, monkeypatch)
    assert len(asked) == 3
    train(tmp_path / "later", config)
    # What they told is in the model that the run began with.
    assert len(asked) == 3
    train(tmp_path / "before", config)
    assert len(asked) == 4
    for name in ("later", "before"):
        assert digest(tmp_path / name) == digest(tmp_path / "whole")
        assert lines(tmp_path / name) == lines(tmp_path / "whole")


def test_an_interrupted_run_is_the_model_that_it_was_judged_as(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", on_round=interrupt_after(2))
    first = tmp_path / "run" / "checkpoint" / "first"
    axes_FK = load_file(first / "model.safetensors")["whitening.axes_FK"]
    assert bool((axes_FK != 0).any(0).all())
    model = fedss.load(tmp_path / "run")
    recorded = lines(tmp_path / "run")[1]["metrics"]["map_at_10"]
    assert fedss.evaluate(model, DATA.test).map_at_10 == pytest.approx(recorded, abs=1e-9)
    # And by hand: the weights of the checkpoint, in the frozen frame of the first model.
    theta_P = load_file(tmp_path / "run" / "checkpoint" / "round-000002" / "state.safetensors")
    oracle = load_embedder(first)
    torch.nn.utils.vector_to_parameters(
        theta_P["backbone"], [p for p in oracle.parameters() if p.requires_grad]
    )
    pixels = torch.from_numpy(DATA.test.query.pixels[:9])
    with torch.no_grad():
        unit = nn.functional.normalize(oracle.backbone((pixels / 255 - 0.5) / 0.5), dim=1)
        mean_F = load_file(first / "model.safetensors")["whitening.mean_F"]
        expected = (unit - mean_F) @ axes_FK @ oracle.projection.weight.T
        got = model(pixels)
    assert torch.allclose(got, nn.functional.normalize(expected, dim=1), atol=1e-5)


def other_model(path: Path) -> None:
    state = {k: v for k, v in load_file(path).items() if not k.startswith("whitening.")}
    save_file(state, path)


def other_size(path: Path) -> None:
    save_file({**load_file(path), "whitening.axes_FK": torch.ones(FEATURES, SIZE + 1)}, path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-9]),
        lambda path: path.write_bytes(b"\xff" * 99),
        other_model,
        other_size,
    ],
    ids=["gone", "empty", "short", "garbage", "not whitened", "of another size"],
)
def test_a_first_model_that_is_damaged_is_one_line(damage: Any, tmp_path: Path) -> None:
    config = changed(rounds=2, eval_every=0)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", config, on_round=interrupt_after(1))
    path = tmp_path / "run" / "checkpoint" / "first" / "model.safetensors"
    damage(path)
    before = [p.read_bytes() for p in sorted(tmp_path.rglob("round-*/*"))]
    with pytest.raises(RunFolderError, match="the model with which the run began") as caught:
        train(tmp_path / "run", config)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [p.read_bytes() for p in sorted(tmp_path.rglob("round-*/*"))] == before


def test_a_run_from_another_takes_its_whitening_and_asks_nobody(
    asked: Asked, first_rows: Any, tmp_path: Path
) -> None:
    train(tmp_path / "one", changed(rounds=1))
    config = changed(seed=5, rounds=2)
    train(tmp_path / "two", config, start=tmp_path / "one")
    assert len(asked) == 1
    models = [
        load_file(tmp_path / name / "model.safetensors")
        for name in ("one/model", "two/checkpoint/first", "two/model")
    ]
    for name in ("whitening.mean_F", "whitening.axes_FK"):
        assert torch.equal(models[0][name], models[1][name])
        assert torch.equal(models[0][name], models[2][name])
    assert not any("warm_start" in record for record in lines(tmp_path / "two"))
    (summary,) = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert not [name for name in summary if name.startswith("warm_start")]
    # What it begins with is what the other ended with, also once it was killed.
    judged = fedss.evaluate(fedss.load(tmp_path / "one"), DATA.test).map_at_10
    assert summary["floors"]["untrained"] == pytest.approx(judged, abs=1e-6)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", config, start=tmp_path / "one", on_round=interrupt_after(1))
    train(tmp_path / "cut", config)
    assert digest(tmp_path / "cut") == digest(tmp_path / "two")
    assert len(asked) == 1


# --- what is told, and what is made of it


def by_hand(by_class: bool) -> list[dict[str, Tensor]]:
    """Each client's message: names, types and shapes, from the labels alone."""
    sizes = np.bincount(DATA.train.clients)
    assert sizes.min() < FEATURES < sizes.max()
    messages = []
    for k in range(CLIENTS):
        labels = DATA.train.labels[DATA.train.clients == k]
        own = len(set(labels.tolist()))
        groups = own if by_class else 1
        messages.append(
            {
                "factor": torch.zeros(min(len(labels), FEATURES), FEATURES),
                "ids": torch.zeros(own if by_class else 0, dtype=torch.int64),
                "counts": torch.zeros(groups, dtype=torch.int64),
                "sums": torch.zeros(groups, FEATURES),
            }
        )
    return messages


WHITENING = {
    "mean": torch.zeros(FEATURES).half(),
    "mean_largest": torch.tensor(0.0),
    "axes": torch.zeros(FEATURES, SIZE).half(),
    "axes_largest": torch.tensor(0.0),
}


@pytest.mark.parametrize("rows_init", ["means", "random"])
def test_the_ledger_counts_what_is_sent(rows_init: str, tmp_path: Path) -> None:
    run = train(tmp_path / "run", changed(rows_init=rows_init, rounds=2, eval_every=0))
    first, second = read_records(run.folder / "records.jsonl", 2)
    up = sum(len(save(message)) for message in by_hand(rows_init == "means"))
    down = CLIENTS * len(save(WHITENING))
    assert first["warm_start"] == {"clients": CLIENTS, "bytes_up": up, "bytes_down": down}
    assert "warm_start" not in second
    assert bytes_moved(first) == first["bytes_up"] + first["bytes_down"] + up + down
    assert bytes_moved(second) == second["bytes_up"] + second["bytes_down"]
    summary = run.summary
    assert (summary["warm_start_bytes_up"], summary["warm_start_bytes_down"]) == (up, down)


def test_pooled_images_are_told_of_for_nothing(tmp_path: Path) -> None:
    run = train(tmp_path / "run", changed(method="central", rounds=1, eval_every=0))
    (record,) = lines(run.folder)
    told = record["warm_start"]
    assert (told["bytes_up"], told["bytes_down"]) == (0, 0)
    assert run.summary["warm_start_bytes_up"] == run.summary["warm_start_bytes_down"] == 0
    # All images count for its whitening, whoever they came from.
    unit = unit_features(run.folder / "checkpoint" / "first")
    state = load_file(run.folder / "checkpoint" / "first" / "model.safetensors")
    assert np.allclose(state["whitening.mean_F"], unit.mean(0), atol=1e-3)


def test_without_a_whitening_nobody_is_asked(asked: Asked, tmp_path: Path) -> None:
    run = train(tmp_path / "run", changed(projection_init="random", rounds=1, eval_every=0))
    assert not asked
    assert "warm_start" not in lines(run.folder)[0]
    assert "warm_start_bytes_up" not in run.summary


@pytest.mark.parametrize("changes", [{}, {"row_dtype": "bfloat16"}, {"method": "full"}], ids=str)
def test_class_rows_begin_with_the_means_of_embeddings(
    changes: dict[str, Any], first_rows: Any, tmp_path: Path
) -> None:
    train(tmp_path / "run", changed(**changes, rounds=1, eval_every=0))
    first = tmp_path / "run" / "checkpoint" / "first"
    z = whitened_features(first)
    expected = np.stack([z[DATA.train.labels == c].mean(0) for c in range(N)])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    ((weight_ND, updated_N),) = first_rows
    tolerance = 8e-3 if changes.get("row_dtype") == "bfloat16" else 1e-3
    assert np.allclose(weight_ND.numpy(), expected, atol=tolerance)
    assert updated_N.tolist() == [-1] * N
    # Means of embeddings: the projection changes nothing yet.
    assert torch.equal(load_embedder(first).projection.weight, torch.eye(SIZE))
    # And features are white: centred, decorrelated, of K in all.
    assert np.allclose(z.mean(0), 0, atol=1e-2)
    covariance = z.T @ z / len(z)
    assert np.allclose(covariance, np.diag(np.diag(covariance)), atol=2e-2)
    assert np.trace(covariance) == pytest.approx(SIZE, rel=0.02)


def test_of_random_rows_nobody_tells_a_class(asked: Asked, first_rows: Any, tmp_path: Path) -> None:
    train(tmp_path / "run", changed(rows_init="random", rounds=1, eval_every=0))
    ((_, sums),) = asked
    for k, of_client in enumerate(sums):
        images = int((DATA.train.clients == k).sum())
        assert (len(of_client.ids_P), of_client.counts_P.tolist()) == (0, [images])
        assert of_client.sums_PF.shape == (1, FEATURES)
    ((weight_ND, updated_N),) = first_rows
    fresh = create_class_rows(N, SIZE, ("momentum",), CONFIG.seed)
    assert torch.equal(weight_ND, fresh.weight_ND)
    assert updated_N.tolist() == [0] * N
    # The whitening is the same as with them, but for rounding.
    train(tmp_path / "means", changed(rounds=1, eval_every=0))
    one, other = (
        load_file(tmp_path / name / "checkpoint/first/model.safetensors")["whitening.axes_FK"]
        for name in ("run", "means")
    )
    assert torch.allclose(one, other, rtol=1e-2, atol=1e-2)


def test_of_many_clients_some_tell_and_all_get_the_whitening(
    asked: Asked, first_rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warm, "MOST_TELLING", 3)
    config = changed(rounds=1, eval_every=0)
    for name, seed in (("a", 0), ("b", 0), ("c", 1), ("d", 2)):
        train(tmp_path / name, dataclasses.replace(config, seed=seed))
    who = [clients for clients, _ in asked]
    assert all(clients == sorted(set(clients)) and len(clients) == 3 for clients in who)
    assert {k for clients in who for k in clients} <= {*range(CLIENTS)}
    assert who[0] == who[1]
    assert len({*map(tuple, who)}) > 1
    told = lines(tmp_path / "a")[0]["warm_start"]
    messages = by_hand(True)
    assert told["clients"] == 3
    assert told["bytes_up"] == sum(len(save(messages[k])) for k in who[0])
    assert told["bytes_down"] == CLIENTS * len(save(WHITENING))
    # Classes that none of them holds begin at random.
    held = {*DATA.train.labels[np.isin(DATA.train.clients, who[0])].tolist()}
    weight_ND, updated_N = first_rows[0]
    fresh = create_class_rows(N, SIZE, ("momentum",), CONFIG.seed).weight_ND
    assert 0 < len(held) < N
    assert {*torch.nonzero(updated_N == -1)[:, 0].tolist()} == held
    for c in range(N):
        assert torch.equal(weight_ND[c], fresh[c]) == (c not in held)
    # As many as may be asked are all asked.
    monkeypatch.setattr(warm, "MOST_TELLING", CLIENTS)
    train(tmp_path / "all", config)
    assert asked[-1][0] == [*range(CLIENTS)]


def test_the_number_of_workers_changes_no_bit(tmp_path: Path) -> None:
    for workers in (1, 3):
        train(tmp_path / str(workers), changed(workers=workers, rounds=2, eval_every=0))
    assert digest(tmp_path / "1") == digest(tmp_path / "3")
    first = [(tmp_path / n / "checkpoint/first/model.safetensors").read_bytes() for n in "13"]
    assert first[0] == first[1]


class Overflowing(nn.Module):
    """Features beyond float32 for bright images, hence not for the images that probe a backbone."""

    def __init__(self, only: float) -> None:
        super().__init__()
        self.layer, self.only = nn.Linear(144, 8), only

    def forward(self, images_BCHW: Tensor) -> Tensor:
        bright_B = (images_BCHW.mean((1, 2, 3)) > self.only).float()
        return self.layer(images_BCHW.flatten(1)) * (1 + bright_B[:, None] * 1e38 * 1e38)


@pytest.mark.parametrize("share", [0.0, 0.99])
@pytest.mark.parametrize("rows_init", ["means", "random"])
def test_features_that_are_not_finite_are_one_line(
    share: float, rows_init: str, tmp_path: Path
) -> None:
    brightness = 2 * DATA.train.pixels.mean((1, 2, 3)) / 255 - 1
    backbone = Overflowing(float(np.quantile(brightness, share)))
    with pytest.raises(ConfigError, match="the weights overflow") as caught:
        train(tmp_path / "run", changed(rows_init=rows_init, trainable="all"), backbone=backbone)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "checkpoint" / "first").exists()


def test_images_that_do_not_differ_are_refused_and_few_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = fedss.load_data(fedss.Config(glyphs_classes=12, glyphs_clients=8))
    config = fedss.Config(
        backbone="conv4-8", projection_init="whitened", rounds=1, eval_every=0, workers=1
    )
    same = np.broadcast_to(data.train.pixels[:1], data.train.pixels.shape).copy()
    alike = dataclasses.replace(data, train=dataclasses.replace(data.train, pixels=same))
    with pytest.raises(ConfigError, match="features of all training images are the same"):
        fedss.train(config, tmp_path / "alike", data=alike)
    few = dataclasses.replace(config, embedding_size=256)
    fedss.train(few, tmp_path / "few", data=data)
    assert "of the 256 numbers of an embedding begin as zeros" in caplog.text
