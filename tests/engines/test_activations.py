"""What is frozen of a backbone is computed once for each image, and nothing else changes."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fedss
from fedss.data import Dataset
from fedss.engines import activations, local
from fedss.engines.local import start_workers
from fedss.models import build_embedder, find_border

CONFIG = fedss.Config(
    glyphs_classes=12,
    glyphs_clients=8,
    backbone="conv4-8",
    trainable="last-1",
    rounds=3,
    clients_per_round=2,
    workers=2,
    eval_every=1,
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDSS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def glyphs(cache: Path) -> Dataset:
    return fedss.load_data(CONFIG)


@pytest.mark.parametrize(
    "changes",
    [{}, {"trainable": "head"}, {"stack": 2}, {"method": "full"}, {"precision": "bfloat16"}],
    ids=str,
)
def test_a_run_with_cached_activations_ends_where_one_without_does(
    changes: dict[str, object], glyphs: Dataset, tmp_path: Path
) -> None:
    runs = []
    for once in (True, False):
        config = dataclasses.replace(CONFIG, cache_activations=once, **changes)
        runs.append(fedss.train(config, tmp_path / str(once), data=glyphs).embedder.state_dict())
    tolerance = 3e-2 if "precision" in changes else 3e-3
    for name, tensor in runs[0].items():
        assert torch.allclose(tensor, runs[1][name], atol=tolerance), name


def test_they_are_made_once_and_found_again(
    glyphs: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    plain = local.Workers._activations
    monkeypatch.setattr(
        local.Workers, "_activations", lambda self, p: (made.append(len(p)), plain(self, p))[1]
    )
    few = activations._FEW  # looked at again each time
    for out, changes in {
        "first": {},
        "again": {"method": "full"},
        "others": {"seed": 1},  # other frozen weights
        "without": {"cache_activations": False},
        "all": {"trainable": "all"},
    }.items():
        fedss.train(dataclasses.replace(CONFIG, **changes), tmp_path / out, data=glyphs)
        assert glyphs.test is not None
        sizes = [len(glyphs.train), len(glyphs.test.query)]
        assert [n for n in made if n > few] == {"first": sizes, "others": sizes}.get(out, []), out
        made.clear()


def test_images_that_are_changed_are_embedded_anew_each_time(
    glyphs: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(
        local.Replica,
        "images",
        lambda self, example: (
            seen.append(self.pixels.dtype),
            torch.from_numpy(self.pixels[example]),
        )[1],
    )
    fedss.train(dataclasses.replace(CONFIG, augment="drawings"), tmp_path / "run", data=glyphs)
    assert set(seen) == {np.dtype(np.uint8)}
    seen.clear()
    fedss.train(CONFIG, tmp_path / "plain", data=glyphs)
    assert set(seen) == {np.dtype(np.float16)}


def workers_of(scale: float, pixels: np.ndarray) -> np.ndarray:
    body = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.Linear(6, 5))
    with torch.no_grad():
        body[1].weight.fill_(scale)
    embedder = build_embedder(
        body, channels=1, image_size=8, embedding_size=4, seed=0, trainable="last-1"
    )
    with start_workers(embedder, pixels, 1, frozen_once=True) as workers:
        return workers.inputs(pixels)


def test_what_is_beyond_float16_is_computed_each_time(
    cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pixels = np.random.default_rng(0).integers(1, 256, (5, 1, 8, 8), np.uint8)
    assert workers_of(1.0, pixels).dtype == np.float16
    assert workers_of(1e6, pixels) is pixels
    assert "beyond float16" in caplog.text
    assert not list(cache.glob("*.tmp"))


def test_activations_larger_than_the_image_are_not_kept() -> None:
    embedder = build_embedder(
        "conv4-64", channels=1, image_size=28, embedding_size=4, seed=0, trainable="last-3"
    )
    embedder.border = find_border(embedder.backbone, torch.rand(2, 1, 28, 28))
    assert embedder.border is not None
    assert embedder.border.shape == (64, 14, 14)
    assert not activations.pays(embedder)


class _Net(nn.Module):
    """A frozen layer, whose features are put together in one way or another."""

    def __init__(self, largest: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.largest = nn.Conv2d(1, 6, 3), largest

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = self.layer(x).flatten(2)
        return flat.amax(2) if self.largest else flat.mean(2)


def inputs_of(net: nn.Module, pixels: np.ndarray) -> np.ndarray:
    embedder = build_embedder(
        net, channels=1, image_size=8, embedding_size=4, seed=0, trainable="head"
    )
    with start_workers(embedder, pixels, 1, frozen_once=True) as workers:
        return np.array(workers.inputs(pixels))


def test_code_that_has_changed_since_is_noticed(cache: Path) -> None:
    """Of a network of the user's own no key knows what it computes."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 1, 8, 8), np.uint8)
    mean, largest = inputs_of(_Net(False), pixels), inputs_of(_Net(True), pixels)
    assert np.abs(mean - largest).max() > 0.1
    fresh = inputs_of(_Net(True), pixels)
    assert np.array_equal(largest, fresh)


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"x" * 1000])
def test_a_file_that_is_damaged_is_made_again(content: bytes, cache: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 1, 8, 8), np.uint8)
    expected = inputs_of(_Net(False), pixels)
    (file,) = cache.glob("*.npy")
    file.write_bytes(content)
    assert np.array_equal(inputs_of(_Net(False), pixels), expected)


def test_a_full_disk_costs_time_and_not_the_run(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    full = shutil.disk_usage("/")._replace(free=10)
    monkeypatch.setattr("fedss.data.cache.shutil.disk_usage", lambda path: full)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 1, 8, 8), np.uint8)
    assert np.array_equal(inputs_of(_Net(False), pixels), pixels)
    assert "computed every round: frozen part of the backbone" in caplog.text
