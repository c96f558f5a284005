"""The frozen whitening of a model's features: its numbers, its files, its fingerprints."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.decomposition import PCA

from fedss.errors import ConfigError
from fedss.models import (
    Embedder,
    Whitening,
    build_embedder,
    fingerprint,
    frozen_fingerprint,
    load_embedder,
    save_embedder,
)
from fedss.models.saving import safetensors_of
from fedss.models.whitening import whitening_axes


def correlated(images: int, features: int, seed: int = 0) -> np.ndarray:
    """Vectors of length 1, away from zero on the average."""
    rng = np.random.default_rng(seed)
    f = rng.normal(size=(images, features)) @ rng.normal(size=(features, features)) + 2
    unit: np.ndarray = f / np.linalg.norm(f, axis=1, keepdims=True)
    return unit


def axes_of(f: np.ndarray, size: int, *shrinkage: float) -> np.ndarray:
    second, mean = torch.from_numpy(f.T @ f / len(f)), torch.from_numpy(f.mean(0))
    return whitening_axes(second, mean, size, *shrinkage).numpy()


@pytest.mark.parametrize("size", [1, 3, 7])
def test_without_shrinkage_it_is_the_pca_whitening_of_sklearn(size: int) -> None:
    f = correlated(50, 7)
    oracle = PCA(size, whiten=True, svd_solver="full").fit(f)
    # sklearn divides by N - 1.
    expected = oracle.transform(f) * np.sqrt(50 / 49)
    got = (f - f.mean(0)) @ axes_of(f, size)
    signs = np.sign((got * expected).sum(0))
    assert np.allclose(got, expected * signs, atol=1e-6)
    assert np.allclose(got.T @ got / 50, np.eye(size), atol=1e-6)


@pytest.mark.parametrize("shrinkage", [0.1, 1.0])
@pytest.mark.parametrize("size", [2, 5])
def test_with_shrinkage_axes_that_hardly_vary_count_for_less(shrinkage: float, size: int) -> None:
    f = correlated(40, 5, 1)
    variances, vectors = np.linalg.eigh(np.cov(f.T, bias=True))
    expected = np.zeros((5, size))
    for k in range(size):
        axis, variance = vectors[:, 4 - k], variances[4 - k]
        expected[:, k] = axis / np.sqrt(variance + shrinkage * variances.mean())
    z = (f - f.mean(0)) @ expected
    expected *= np.sqrt(size / np.mean(np.sum(z**2, 1)))
    got = axes_of(f, size, shrinkage)
    for k in range(size):
        same = np.sign(np.dot(got[:, k], expected[:, k]))
        assert np.allclose(got[:, k], same * expected[:, k], atol=1e-9)
    spread = np.var((f - f.mean(0)) @ got, axis=0)
    assert (np.diff(spread) < 0).all()
    assert spread.sum() == pytest.approx(size)


def test_an_axis_points_where_it_is_largest() -> None:
    for seed in range(5):
        axes = axes_of(correlated(30, 6, seed), 6, 0.1)
        assert (axes[np.abs(axes).argmax(0), range(6)] > 0).all()


@pytest.mark.parametrize("shrinkage", [0.0, 0.1])
def test_only_as_many_axes_as_vary(shrinkage: float) -> None:
    f = correlated(4, 9)  # four points span three directions about their mean
    assert axes_of(f, 6, shrinkage).shape == (9, 3)
    # In float32, as they are told.
    f = f.astype(np.float32).astype(np.float64)
    assert axes_of(f, 9, shrinkage).shape == (9, 3)
    same = np.tile(f[:1], (8, 1))
    assert axes_of(same, 5, shrinkage).shape == (9, 0)


# --- in a model


def whitened(embedding_size: int = 6, set_: bool = True, **more: Any) -> Embedder:
    kind = {"channels": 1, "image_size": 16, "seed": 0, "whitened": True, **more}
    embedder = build_embedder("conv4-4", embedding_size=embedding_size, **kind)
    if set_:
        change(embedder, 0)
    return embedder


def change(embedder: Embedder, seed: int) -> None:
    assert isinstance(embedder.whitening, Whitening)
    rng = torch.Generator().manual_seed(seed)
    mean_F, axes_FK = embedder.whitening.mean_F, embedder.whitening.axes_FK
    embedder.whitening.set_(
        torch.rand(mean_F.shape, generator=rng), torch.randn(axes_FK.shape, generator=rng)
    )


PIXELS = torch.randint(
    256, (5, 1, 16, 16), generator=torch.Generator().manual_seed(1), dtype=torch.uint8
)
FEATURES = 64  # of conv4-4 on 16 pixels


def test_an_embedding_is_the_whitened_feature_projected() -> None:
    embedder = whitened().eval()
    with torch.no_grad():
        embedder.projection.weight.normal_(generator=torch.Generator().manual_seed(2))
        f = embedder.features(PIXELS).double().numpy()
        got = embedder(PIXELS).numpy()
    state = {name: t.double().numpy() for name, t in embedder.state_dict().items()}
    for i in range(len(f)):
        unit = f[i] / np.sqrt((f[i] ** 2).sum())
        z = state["whitening.axes_FK"].T @ (unit - state["whitening.mean_F"])
        g = state["projection.weight"] @ z
        assert np.allclose(got[i], g / np.linalg.norm(g), atol=1e-5)


@pytest.mark.parametrize("size", [6, FEATURES, FEATURES + 9])
def test_a_new_model_projects_nothing_away(size: int) -> None:
    embedder, kept = whitened(size).eval(), min(size, FEATURES)
    assert embedder.projection.weight.shape == (size, kept)
    with torch.no_grad():
        z = embedder.whitening(embedder.features(PIXELS))
        h = embedder(PIXELS)
    assert torch.allclose(h[:, :kept], torch.nn.functional.normalize(z), atol=1e-6)
    assert torch.equal(h[:, kept:], torch.zeros(5, size - kept))


def test_it_does_not_train() -> None:
    embedder = whitened()
    embedder(PIXELS).square()[:, 0].sum().backward()
    trained = [name for name, p in embedder.named_parameters() if p.grad is not None]
    assert "projection.weight" in trained
    assert not [name for name, _ in embedder.named_parameters() if name.startswith("whitening")]
    # Gradients pass through it.
    assert any(name.startswith("backbone.") for name in trained)


@pytest.mark.parametrize("size", [6, FEATURES + 9])
@pytest.mark.parametrize("exported", [False, True])
def test_files_keep_it_bit_for_bit(size: int, exported: bool, tmp_path: Path) -> None:
    embedder = whitened(size, trainable="last-1").eval()
    if exported:
        (tmp_path / "model.safetensors").write_bytes(safetensors_of(embedder, {}))
    else:
        save_embedder(embedder, tmp_path, {})
    loaded = load_embedder(tmp_path)
    assert loaded.spec == embedder.spec
    assert loaded.spec.whitened
    for name, tensor in embedder.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert torch.equal(loaded(PIXELS), embedder(PIXELS))
    assert fingerprint(loaded) == fingerprint(embedder)
    names = load_file(tmp_path / "model.safetensors")
    assert {"whitening.mean_F", "whitening.axes_FK"} <= names.keys()


def test_the_fingerprint_is_of_the_whitening_too_and_that_of_the_frozen_part_is_not() -> None:
    found, frozen = set(), set()
    for seed in (0, 1):
        embedder = whitened(trainable="last-1")
        change(embedder, seed)
        found.add(fingerprint(embedder))
        frozen.add(frozen_fingerprint(embedder))
    found.add(fingerprint(whitened(trainable="last-1", set_=False)))
    frozen.add(frozen_fingerprint(whitened(trainable="last-1", set_=False)))
    assert len(found) == 3
    assert len(frozen) == 1
    assert None not in frozen
    # Where all trains there is nothing frozen but it.
    assert frozen_fingerprint(whitened()) is None
    # Another frozen weight is noticed.
    embedder = whitened(trainable="last-1")
    with torch.no_grad():
        next(p for p in embedder.backbone.parameters() if not p.requires_grad)[0] += 1
    assert frozen_fingerprint(embedder) not in frozen
    one, other = fingerprint(whitened(set_=False)), fingerprint(whitened(set_=False))
    assert one == other


def description(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def test_models_of_before_say_nothing_of_it_and_load(tmp_path: Path) -> None:
    old = build_embedder("conv4-4", channels=1, image_size=16, embedding_size=6, seed=0).eval()
    save_embedder(old, tmp_path, {})
    # What was written before there was a choice.
    assert "whitened" not in description(tmp_path)["embedder"]
    names = load_file(tmp_path / "model.safetensors")
    assert not [name for name in names if name.startswith("whitening")]
    loaded = load_embedder(tmp_path)
    assert not loaded.spec.whitened
    assert fingerprint(loaded) == fingerprint(old)
    assert torch.equal(loaded(PIXELS), old(PIXELS))


@pytest.mark.parametrize("value", [False, None, "yes", 1])
def test_a_description_that_does_not_fit_the_file_is_one_line(value: Any, tmp_path: Path) -> None:
    save_embedder(whitened(), tmp_path, {})
    about = description(tmp_path)
    assert about["embedder"]["whitened"] is True
    if value is None:
        del about["embedder"]["whitened"]
    else:
        about["embedder"]["whitened"] = value
    (tmp_path / "config.json").write_text(json.dumps(about))
    with pytest.raises(ConfigError, match=r"does not (fit|describe)") as caught:
        load_embedder(tmp_path)
    assert "\n" not in str(caught.value)
