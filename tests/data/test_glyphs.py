"""Glyphs: what a class looks like depends on the seed and its number, and on nothing else."""

import numpy as np
import pytest

from fedss.data import seen_classes
from fedss.data.sets.glyphs import (
    _alphabet_sizes,
    _normal,
    _spline,
    _uniform,
    glyphs,
    glyphs_dataset,
)
from fedss.errors import DataError


def make_images(images):
    names = zip(images.names, images.pixels, strict=True)
    return {name: image.tobytes() for name, image in names}


def test_same_seed_same_bits_other_seed_other_images():
    first, again, other = (glyphs(40, 8, drawers=4, seed=seed) for seed in (3, 3, 4))
    assert first.pixels.tobytes() == again.pixels.tobytes()
    assert list(first.names) == list(again.names)
    assert other.pixels.tobytes() != first.pixels.tobytes()


def test_an_image_does_not_depend_on_how_many_there_are():
    # With as many clients as seats at an alphabet, each client draws every class in both worlds.
    few, many = glyphs(60, 8, seed=1), glyphs(300, 8, seed=1)
    small, large = make_images(few), make_images(many)
    assert set(small) <= set(large)
    assert all(large[name] == image for name, image in small.items())
    one = glyphs(60, 8, copies=1, seed=1)
    assert make_images(one).items() <= small.items()


def test_many_images_go_to_the_cache(tmp_path, monkeypatch):
    expected = glyphs(30, 8)
    monkeypatch.setattr("fedss.data.sets.glyphs._KEEP_IN_MEMORY", 1000)
    for _ in range(2):
        images = glyphs(30, 8, cache=tmp_path)
        assert isinstance(images.pixels, np.memmap)
        assert np.array_equal(images.pixels, expected.pixels)


def test_parts_share_nothing():
    train, test = (glyphs(30, 8, part=part) for part in ("train", "test"))
    assert not set(make_images(train).values()) & set(make_images(test).values())


def test_names_are_unique_over_all_parts():
    data = glyphs_dataset(100, 20)
    parts = (data.train, data.test.query, data.validation.query)
    for field in ("class_names", "client_names", "names"):
        names = [name for part in parts for name in getattr(part, field)]
        assert len(set(names)) == len(names)
    assert seen_classes(data) == 0


def test_every_client_draws_whole_alphabets_and_every_alphabet_has_its_drawers():
    images = glyphs(200, 60, drawers=5, copies=2)
    sizes = _alphabet_sizes(200, (0, 0))
    assert sizes.sum() == 200
    alphabet_of = np.repeat(np.arange(len(sizes)), sizes)
    drawn = np.zeros((60, 200), int)
    np.add.at(drawn, (images.clients, images.labels), 1)
    assert set(np.unique(drawn)) == {0, 2}
    assert drawn.any(axis=1).all()
    for alphabet in range(len(sizes)):
        block = drawn[:, alphabet_of == alphabet] > 0
        assert (block.all(axis=1) == block.any(axis=1)).all()
        assert block.all(axis=1).sum() >= 5


def test_more_alphabets_than_clients():
    images = glyphs(400, 3, drawers=2, copies=1)
    assert (np.bincount(images.labels, minlength=400) == 2).all()
    assert np.bincount(images.clients, minlength=3).min() > 0


def test_alphabets_have_14_to_55_characters_about_32_on_average():
    sizes = _alphabet_sizes(1_000_000, (0, 0))[:-1]
    assert sizes.min() == 14
    assert sizes.max() == 55
    assert 31 < sizes.mean() < 33


def test_rows_are_in_order_of_client_label_copy():
    images = glyphs(50, 8, drawers=4)
    keys = list(zip(images.clients, images.labels, images.names, strict=True))
    assert keys == sorted(keys)


@pytest.mark.parametrize("side", [16, 28, 64])
def test_ink_is_bright_on_black_centred_and_leaves_the_rim_free(side):
    images = glyphs(64, 8, image_size=side)
    assert images.pixels.dtype == np.uint8
    assert images.pixels.shape == (64 * 8 * 2, 1, side, side)
    ink = images.pixels[:, 0].astype(float)
    assert ink.max(axis=(1, 2)).min() > 120
    assert 0.02 < ink.mean() / 255 < 0.2
    rim = np.concatenate([ink[:, 0], ink[:, -1], ink[:, :, 0], ink[:, :, -1]], axis=1)
    assert rim.mean() < 2


def test_a_larger_image_shows_the_same_glyph():
    small, large = (glyphs(30, 8, image_size=side).pixels[:, 0] for side in (28, 56))
    pooled = large.reshape(len(large), 28, 2, 28, 2).mean(axis=(2, 4))
    assert np.abs(pooled - small).mean() < 3


def test_raw_pixels_find_little_but_more_than_chance():
    test = glyphs_dataset(320, 64).test.query
    rows = test.pixels.reshape(len(test), -1).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    scores = rows @ rows.T
    np.fill_diagonal(scores, -1.0)
    found = float(np.mean(test.labels[scores.argmax(axis=1)] == test.labels))
    assert len(test.class_names) == 64
    assert 0.2 < found < 0.7


def test_dataset_has_unseen_classes_of_ten_images():
    data = glyphs_dataset(100, 20, test_classes=0.3)
    assert len(data.train.class_names) == 70
    assert len(data.train.client_names) == 20
    assert data.validation is not None
    for task, count in ((data.test, 30), (data.validation, 15)):
        assert (np.bincount(task.query.labels, minlength=count) == 10).all()


def test_the_spline_passes_through_its_control_points():
    basis = _spline(11)
    np.testing.assert_allclose(basis.sum(axis=1), 1.0)
    np.testing.assert_allclose(basis[::2], np.eye(6), atol=1e-12)


def test_hashed_numbers_look_random_and_come_from_their_key_alone():
    uniform = _uniform(7, 5, np.arange(20_000))
    assert np.array_equal(uniform[123], _uniform(7, 5, np.array([123]))[0])
    assert 0 < uniform.min() < uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 0.003
    correlation = np.corrcoef(uniform.T) - np.eye(7)
    assert np.abs(correlation).max() < 0.03
    assert abs(np.corrcoef(uniform[:-1, 0], uniform[1:, 0])[0, 1]) < 0.03
    normal = _normal(7, 5, np.arange(20_000))
    assert abs(normal.mean()) < 0.01
    assert abs(normal.std() - 1) < 0.01


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"copies": 0}, "copies must be at least 1"),
        ({"num_clients": 3, "drawers": 4}, "3 clients cannot be 4 different drawers"),
    ],
)
def test_impossible_sizes(arguments, message):
    with pytest.raises(DataError, match=message):
        glyphs(**arguments)


def test_without_test_classes_nothing_could_be_evaluated():
    with pytest.raises(DataError, match="nothing could be evaluated"):
        glyphs_dataset(10, 8, test_classes=0.0)
    with pytest.raises(DataError, match="at least 2 classes"):
        glyphs_dataset(1, 8)
