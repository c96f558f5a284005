"""Floors of a frozen backbone where images are of another size than its weights were made for."""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import fedss
from fedss import Config, Dataset
from fedss.data import load_dataset
from fedss.errors import DataError
from fedss.evaluation.baselines import Floors
from fedss.runs.findings import read_scores
from fedss.training import floors
from fedss.training.build import load_data
from fedss.training.floors import weights_side
from tests.installed import needs_timm, timm
from tests.photographs import make_photographs

pytestmark = needs_timm

MADE_FOR = 160  # test_vit
FROZEN = ("frozen", "frozen_centred", "frozen_whitened")
AT = tuple(f"{name}_at_{MADE_FOR}" for name in FROZEN)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Photographs of 64 pixels as files, 24 of them for a test, and weights at random."""
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("photographs")
    data = make_photographs(classes=8, test_classes=4, per_class=6)
    assert data.test is not None
    lines = ["image,label,client,split"]
    for split, images in (("train", data.train), ("test", data.test.query)):
        for pixels, name, label, client in zip(
            images.pixels, images.names, images.labels, images.clients, strict=True
        ):
            Image.fromarray(pixels.transpose(1, 2, 0)).save(folder / name)
            lines.append(f"{name},{images.class_names[label]},{client % 2},{split}")
    (folder / "images.csv").write_text("\n".join(lines) + "\n")
    with torch.random.fork_rng():
        torch.manual_seed(7)
        state = timm.create_model("test_vit").state_dict()
        # Positions begin as zeros, and with them nothing would depend on where they are.
        state["pos_embed"] += 0.1 * torch.randn_like(state["pos_embed"])
    save_file({n: t.clone() for n, t in state.items()}, folder / "vit.safetensors")
    return {
        "data": "csv",
        "data_path": str(folder / "images.csv"),
        "backbone": "timm:test_vit",
        "weights": str(folder / "vit.safetensors"),
        "rounds": 1,
        "clients_per_round": 2,
        "embedding_size": 8,
        "sample_size": 2,
        "workers": 1,
    }


def measured(
    given: dict[str, Any], folder: Path, **more: Any
) -> tuple[Mapping[str, float], Floors]:
    run = fedss.train(Config(**{**given, **more}), folder)
    return run.summary["floors"], read_scores(folder / "floors.json")


def test_floors_at_the_size_of_the_weights_are_those_of_a_run_at_that_size(
    given: dict[str, Any], tmp_path: Path
) -> None:
    theirs, of_theirs = measured(given, tmp_path / "160")
    assert not {*AT} & {*theirs}
    for size in (64, 192):
        ours, of_ours = measured(given, tmp_path / str(size), image_size=size)
        assert list(ours)[-3:] == [*AT]
        for name, at in zip(FROZEN, AT, strict=True):
            assert ours[at] == pytest.approx(theirs[name], abs=1e-6)
            of_class = of_ours.by_class[at].map_at_10_C
            assert of_class == pytest.approx(of_theirs.by_class[name].map_at_10_C, abs=1e-6)
        assert any(ours[name] != pytest.approx(theirs[name], abs=1e-4) for name in FROZEN)


@pytest.mark.report
def test_they_stand_in_the_report_and_are_measured_once(
    given: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    sides: list[int] = []
    real = floors._floors_at

    def counting(side: int, *args: Any) -> Floors:
        sides.append(side)
        return real(side, *args)

    monkeypatch.setattr(floors, "_floors_at", counting)
    caplog.set_level(logging.DEBUG, "fedss")
    found = fedss.compare(
        Config(**{**given, "image_size": 64}), ["full", "fedss"], [0, 1], tmp_path / "runs"
    )
    assert sides == [MADE_FOR]
    assert all(summary["floors"][AT[2]] == found[0]["floors"][AT[2]] for summary in found)
    assert "whitened backbone at 160 px" in (tmp_path / "runs/report.html").read_text()
    (warning,) = [r.getMessage() for r in caplog.records if "made for" in r.getMessage()]
    assert "the floors at 160 px" in warning
    steps = [vars(r)["progress"] for r in caplog.records if hasattr(r, "progress")]
    (step,) = [step for step in steps if step.task == "frozen backbone at 160 px"][-1:]
    assert step.done == step.total == 48


def test_there_are_none_where_images_cannot_be_had_at_that_size(
    given: dict[str, Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = Config(**{**given, "image_size": 64})
    data = load_data(config)
    assert weights_side(config, data) == MADE_FOR
    # Turned images, arrays, a network without trained weights, one that is no timm's.
    assert weights_side(config, load_data(dataclasses.replace(config, rotations=True))) is None
    train = data.train
    arrays = Dataset.from_arrays(train.pixels, train.labels, train.clients, test_classes=0)
    arrays = dataclasses.replace(arrays, test=data.test)
    assert weights_side(config, arrays) is None
    assert weights_side(dataclasses.replace(config, weights=None), data) is None
    caplog.set_level(logging.WARNING, "fedss")
    run = fedss.train(config, tmp_path / "arrays", data=arrays)
    assert not {*AT} & {*run.summary["floors"]}
    (warning,) = [r.getMessage() for r in caplog.records if "made for" in r.getMessage()]
    assert "floors" not in warning
    # A run without a test.
    folder = tmp_path / "none"
    nothing = dataclasses.replace(data, test=None)
    fedss.train(dataclasses.replace(config, test_classes=0.0), folder, data=nothing)
    assert read_scores(folder / "floors.json") == Floors()


def test_a_file_that_is_gone_costs_these_floors_alone(
    given: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = Config(**{**given, "image_size": 64})
    data = load_data(config)
    assert data.test is not None
    names = ["gone.png", *data.test.query.names[1:]]
    query = dataclasses.replace(data.test.query, names=names)
    data = dataclasses.replace(data, test=fedss.RetrievalTask(query))
    run = fedss.train(config, tmp_path / "run", data=data)
    assert {*FROZEN} < {*run.summary["floors"]}
    assert not {*AT} & {*run.summary["floors"]}
    (warning,) = [r.getMessage() for r in caplog.records if "no floors" in r.getMessage()]
    assert "gone.png" in warning


def test_images_decoded_again_are_those_read_at_that_size(
    given: dict[str, Any], tmp_path: Path
) -> None:
    read = {
        side: load_dataset("csv", given["data_path"], image_size=side, channels=3, cache=tmp_path)
        for side in (40, 56)
    }
    before = sorted(tmp_path.iterdir())
    small, large = read[40], read[56]
    assert small.decode_again is not None
    few = [3, 0, 5]
    again = small.decode_again([small.train.names[i] for i in few], 56)
    assert np.array_equal(again, large.train.pixels[few])
    assert sorted(tmp_path.iterdir()) == before
    with pytest.raises(DataError, match=r"gone\.png"):
        small.decode_again(["gone.png"], 56)
