"""Floors against simulation, by hand and with scikit-learn."""

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from fedss import Images, RetrievalTask
from fedss.errors import ConfigError, DataError, RunFolderError
from fedss.evaluation.baselines import (
    Floors,
    backbone_floors,
    chance,
    data_floors,
    expected_precision,
    fit_whitening,
    floor,
    pixel_vectors,
)
from fedss.evaluation.task import check_tellable, embed_task, score
from fedss.models import Embedder, build_embedder, embed_pixels
from fedss.runs.findings import read_scores, write_scores
from tests import reference

DATA = reference.tiny_dataset()
QUERY = DATA.test.query


def precision(relevant: tuple[int, ...]) -> float:
    hits = np.cumsum(relevant[:10]) / np.arange(1, len(relevant[:10]) + 1)
    return float((hits * relevant[:10]).sum() / min(sum(relevant), 10))


@pytest.mark.parametrize(("relevant", "candidates"), [(1, 1), (1, 4), (2, 3), (3, 6), (4, 4)])
def test_chance_is_the_mean_over_all_orders(relevant, candidates):
    orders = set(itertools.permutations([1] * relevant + [0] * (candidates - relevant)))
    expected = np.mean([precision(order) for order in orders])
    assert expected_precision(np.array([relevant]), candidates) == pytest.approx([expected])


@pytest.mark.parametrize(("relevant", "candidates"), [(2, 40), (9, 12), (15, 60)])
def test_chance_is_what_simulation_gives(relevant, candidates):
    rng, order = np.random.default_rng(0), np.arange(candidates) < relevant
    found = [precision(tuple(rng.permutation(order).astype(int))) for _ in range(4000)]
    error = np.std(found) / np.sqrt(len(found))
    assert expected_precision(np.array([relevant]), candidates) == pytest.approx(
        [np.mean(found)], abs=4 * error
    )


def test_chance_of_a_task_is_that_of_random_embeddings():
    kept = np.r_[0:7, 10:20]
    query = dataclasses.replace(
        QUERY,
        pixels=QUERY.pixels[kept],
        labels=QUERY.labels[kept],
        clients=QUERY.clients[kept],
        names=[QUERY.names[i] for i in kept],
    )
    for task in (RetrievalTask(query), RetrievalTask(query, QUERY)):
        rng = torch.Generator().manual_seed(0)

        def guess(pixels: np.ndarray, rng: torch.Generator = rng) -> torch.Tensor:
            return torch.randn(len(pixels), 8, generator=rng)

        found = [score(task, *embed_task(guess, task)) for _ in range(300)]
        expected = chance(task)
        for value, values in (
            (expected.map_at_10, [m.map_at_10 for m in found]),
            (expected.map_at_10_C.mean(), [m.map_at_10_by_class for m in found]),
        ):
            error = np.std(values) / np.sqrt(len(values))
            assert value == pytest.approx(np.mean(values), abs=4 * error)


def test_pixels_are_averaged_down_less_their_mean():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 24, 24), np.uint8)
    small = pixels.reshape(5, 3, 12, 2, 12, 2).mean((3, 5)) / 255
    expected = small - small.mean((1, 2, 3), keepdims=True)
    assert np.allclose(pixel_vectors(pixels).numpy(), expected.reshape(5, -1), atol=1e-6)
    # Small images stay as they are; light makes no difference.
    tiny = np.clip(pixels[:, :, :5, :5], 0, 200)
    assert np.allclose(pixel_vectors(tiny), pixel_vectors(tiny + np.uint8(30)), atol=1e-6)
    assert pixel_vectors(tiny).shape == (5, 75)


def test_floors_are_figures_of_what_they_are_named_after():
    found = data_floors(DATA.test)
    assert found.map_at_10["pixels"] == pytest.approx(
        score(DATA.test, *embed_task(pixel_vectors, DATA.test)).map_at_10
    )
    assert found.map_at_10["chance"] == chance(DATA.test).map_at_10
    assert found.by_class["pixels"].names == tuple(sorted(QUERY.class_names))


def test_whitening_is_that_of_scikit_learn():
    from sklearn.decomposition import PCA

    rng = np.random.default_rng(0)
    rows = (rng.normal(size=(60, 6)) @ rng.normal(size=(6, 6))).astype(np.float32)
    ours = fit_whitening(torch.from_numpy(rows), 4)(torch.from_numpy(rows)).numpy()
    theirs = PCA(4, whiten=True).fit_transform(rows.astype(np.float64))
    assert np.allclose(np.abs(ours), np.abs(theirs), atol=1e-4)
    # What does not vary has no direction.
    flat = torch.from_numpy(np.c_[rows[:, :2], rows[:, :2]])
    assert fit_whitening(flat, 4)(flat).shape == (60, 2)


def features_of(embedder: Embedder) -> Callable[[Images, np.ndarray], torch.Tensor]:
    def features(images: Images, which: np.ndarray) -> torch.Tensor:
        with torch.no_grad():
            return embedder.features(torch.from_numpy(np.array(images.pixels[which])))

    return features


def test_a_trained_backbone_is_judged_without_its_random_projection():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with torch.no_grad():
        body[1].bias.add_(2.0)  # a direction that all images have in common
    made = {
        pretrained: build_embedder(
            body, channels=1, image_size=8, embedding_size=4, seed=0, pretrained=pretrained
        )
        for pretrained in (True, False)
    }
    before = {n: t.clone() for n, t in made[True].state_dict().items()}
    found = backbone_floors(made[True].spec, features_of(made[True]), DATA.test, DATA.train)
    assert found.map_at_10.keys() == {"frozen", "frozen_centred", "frozen_whitened"}

    def features(pixels: np.ndarray) -> torch.Tensor:
        with torch.no_grad():
            return body(torch.from_numpy(pixels / 255 * 2 - 1).float())

    def whitened(pixels: np.ndarray) -> torch.Tensor:
        unit = nn.functional.normalize(features(DATA.train.pixels))
        return fit_whitening(unit, 4)(nn.functional.normalize(features(pixels)))

    def centred(pixels: np.ndarray) -> torch.Tensor:
        unit, of_train = map(nn.functional.normalize, map(features, (pixels, DATA.train.pixels)))
        return unit - of_train.mean(0)

    assert found.map_at_10["frozen_centred"] != found.map_at_10["frozen"]
    for name, embed in (("frozen", features), ("frozen_centred", centred)):
        expected = score(DATA.test, *embed_task(embed, DATA.test)).map_at_10
        assert found.map_at_10[name] == pytest.approx(expected, abs=1e-9)
    assert found.map_at_10["frozen_whitened"] == pytest.approx(
        score(DATA.test, *embed_task(whitened, DATA.test)).map_at_10, abs=0.02
    )
    assert all(torch.equal(t, before[n]) for n, t in made[True].state_dict().items())
    assert embed_pixels(made[True], QUERY.pixels).shape == (20, 4)
    # A network that begins at random has no floor but its own first round.
    without = backbone_floors(made[False].spec, features_of(made[False]), DATA.test, DATA.train)
    assert without == Floors()


def frozen_floors(scale: float, pixels: np.ndarray) -> Floors:
    body = nn.Sequential(nn.Flatten(), *(nn.Linear(n, 10, bias=False) for n in (64, 10)))
    with torch.no_grad():
        for layer in [*body][1:]:
            layer.weight *= scale
    embedder = build_embedder(
        body, channels=1, image_size=8, embedding_size=4, seed=0, pretrained=True
    )
    train = dataclasses.replace(DATA.train, pixels=pixels)
    return backbone_floors(embedder.spec, features_of(embedder), DATA.test, train)


@pytest.mark.parametrize("scale", [1.0, 1e4, 1e-4])
def test_training_images_that_do_not_differ_leave_nothing_to_whiten(scale):
    same = np.broadcast_to(DATA.train.pixels[:1], DATA.train.pixels.shape)
    assert frozen_floors(scale, same).map_at_10.keys() == {"frozen"}
    assert frozen_floors(scale, DATA.train.pixels).map_at_10.keys() > {"frozen"}
    rows = torch.full((9, 3), 0.1) + torch.tensor([0.0, 1e-8, 0.0])
    assert fit_whitening(rows * scale, 3)(rows).shape == (9, 0)


def test_weights_that_give_no_features_are_refused():
    with pytest.raises(ConfigError, match=r"weights overflow: .*not finite.*expected"):
        frozen_floors(1e30, DATA.train.pixels)
    with pytest.raises(ConfigError, match=r"the same features for all .*expected"):
        frozen_floors(0.0, DATA.train.pixels)


def test_floors_come_back_from_their_file(tmp_path):
    found = data_floors(DATA.test)
    write_scores(tmp_path / "floors.json", found)
    again = read_scores(tmp_path / "floors.json")
    assert again.map_at_10 == found.map_at_10
    assert again.by_class.keys() == found.by_class.keys()
    for name, scores in again.by_class.items():
        assert scores.map_at_10 == found.by_class[name].map_at_10
    # A federation knows none of its classes.
    write_scores(tmp_path / "floors.json", Floors({"chance": 0.1}))
    assert read_scores(tmp_path / "floors.json") == Floors({"chance": 0.1})
    for damage in ("[]", '{"map_at_10": {"chance": 2}}', "{", '{"map_at_10": {}}'):
        (tmp_path / "floors.json").write_text(damage)
        with pytest.raises(RunFolderError, match="delete it"):
            read_scores(tmp_path / "floors.json")


def test_a_test_in_which_all_is_right_is_refused():
    one = dataclasses.replace(QUERY, labels=np.zeros(len(QUERY), np.int64))
    for task in (RetrievalTask(one), RetrievalTask(one, one)):
        with pytest.raises(DataError, match="one class"):
            check_tellable(task, "tiny", 0.2, "test")
    check_tellable(RetrievalTask(one, QUERY), "tiny", 0.2, "test")
    check_tellable(DATA.test, "tiny", 0.2, "test")
    assert floor("chance", chance(DATA.test)).map_at_10["chance"] < 0.5
