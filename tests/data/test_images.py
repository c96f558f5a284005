"""Images in memory: what fits together, and the fingerprint of it."""

import dataclasses

import numpy as np
import pytest
import torch

from fedss.data import (
    Dataset,
    RetrievalTask,
    count_own_classes,
    data_fingerprint,
    rotate_classes,
    seen_classes,
    split_clients,
)
from fedss.errors import DataError
from tests import reference
from tests.data.made import in_memory
from tests.reference import tiny_dataset


def whole():
    tasks = [RetrievalTask(in_memory([0, 0, 1, 1]), in_memory([1, 0, 1])) for _ in range(2)]
    return Dataset("mine", in_memory([0, 1]), *tasks)


@pytest.mark.parametrize("part", ["train", "test.query", "test.gallery", "validation.gallery"])
@pytest.mark.parametrize(
    "field", ["pixels", "labels", "clients", "class_names", "client_names", "names"]
)
def test_the_fingerprint_covers_every_part(part, field):
    data = whole()
    assert data_fingerprint(data) == data_fingerprint(whole())
    outer, _, inner = part.partition(".")
    images = getattr(getattr(data, outer), inner) if inner else data.train
    value = getattr(images, field)
    if field in ("labels", "clients"):
        changed = value.copy()
        changed[-1] = 0
    elif field == "pixels":
        changed = 255 - value
    else:
        changed = [f"other {name}" for name in value]
    other = dataclasses.replace(images, **{field: changed})
    if field == "class_names" and outer != "train":
        # Queries are matched by name, so both change theirs.
        task = getattr(data, outer)
        pair = [dataclasses.replace(i, class_names=changed) for i in (task.query, task.gallery)]
        other = RetrievalTask(*pair)
    elif inner:
        other = dataclasses.replace(getattr(data, outer), **{inner: other})
    assert data_fingerprint(dataclasses.replace(data, **{outer: other})) != data_fingerprint(data)


def test_the_fingerprint_tells_which_part_is_missing():
    data = whole()
    alone = dataclasses.replace(data, validation=None)
    task = RetrievalTask(data.test.query)
    found = [data, alone, dataclasses.replace(alone, test=task)]
    found.append(dataclasses.replace(found[-1], validation=task))
    assert len({data_fingerprint(d) for d in found}) == 4
    assert data_fingerprint(dataclasses.replace(data, name="else")) == data_fingerprint(data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pixels": np.zeros((2, 1, 4, 4), np.float32)}, r"got float32 \[2, 1, 4, 4\]"),
        ({"pixels": np.zeros((2, 4, 4), np.uint8)}, r"uint8 \[N, C, H, W\], got uint8 \[2, 4, 4\]"),
        ({"pixels": [[0]]}, "expected a numpy array, .* got a list"),
        ({"pixels": np.zeros((2, 4, 4, 3), np.uint8)}, r"1 or 3 channels.* got \[2, 4, 4, 3\]"),
        ({"pixels": np.zeros((2, 1, 4, 5), np.uint8)}, "square images"),
        ({"labels": np.array([0, 2])}, "labels: expected numbers from 0 to 1, got 0 to 2"),
        ({"labels": np.array([-1, 0])}, "labels: expected numbers from 0 to 1, got -1 to 0"),
        (
            {"labels": np.array([0.0, 1.0])},
            r"labels: expected .*int64 \[N\], got float64 \[2\]; conv",
        ),
        ({"labels": [0, 1]}, "labels: expected a numpy array, .*got a list"),
        ({"labels": np.array([[0], [1]])}, r"got int64 \[2, 1\]"),
        ({"labels": np.array([0])}, "labels: expected 2 values, one per image, got 1"),
        ({"clients": np.array([0, 9])}, "clients: expected numbers from 0 to 1"),
        ({"clients": np.array([0, 1], np.int32)}, "clients: .*got int32"),
        ({"names": ["a"]}, "names: expected 2 values"),
        ({"class_names": ["a", "a"]}, "class_names: 'a' occurs 2 times"),
    ],
)
def test_images_that_do_not_fit_together_are_refused(changes, message):
    with pytest.raises(DataError, match=message):
        in_memory([0, 1], **changes)


def test_queries_that_nothing_could_match_are_refused():
    with pytest.raises(DataError, match=r"'2\.png': class 'c1' has a single image .*add a second"):
        RetrievalTask(in_memory([0, 0, 1]))
    with pytest.raises(DataError, match=r"'0\.png': class 'a' is not in the gallery"):
        RetrievalTask(in_memory([0, 1], ["a", "b"]), in_memory([0, 1], ["b", "c"]))
    with pytest.raises(DataError, match="without query images"):
        RetrievalTask(in_memory([]))
    # By name, not by number; and names that no image has do not count.
    RetrievalTask(in_memory([0, 0], ["a", "b"]), in_memory([1], ["b", "a"]))
    with pytest.raises(DataError, match="not in the gallery"):
        RetrievalTask(in_memory([0, 0], ["a", "b"]), in_memory([0], ["b", "a"]))


def test_parts_of_different_shapes_or_without_training_images_are_refused():
    data, wide = whole(), np.zeros((2, 3, 4, 4), np.uint8)
    with pytest.raises(DataError, match="'mine' has no training images"):
        dataclasses.replace(data, train=in_memory([]), test=None, validation=None)
    message = r"one shape .* train \[3, 4, 4\], test \[1, 4, 4\], validation \[1, 4, 4\]"
    with pytest.raises(DataError, match=message):
        dataclasses.replace(data, train=in_memory([0, 1], pixels=wide))
    with pytest.raises(DataError, match=r"query \[1, 4, 4\], gallery \[3, 4, 4\]"):
        RetrievalTask(in_memory([0, 1]), in_memory([0, 1], pixels=wide))


def test_seen_classes_are_counted_by_name():
    query = RetrievalTask(in_memory([0, 0, 1, 1], ["b", "c", "d"]))
    for names, seen in ((["a", "b"], 1), (["x", "y"], 0), (["c", "b"], 2), (["a", "d"], 0)):
        assert seen_classes(Dataset("mine", in_memory([0, 1], names), query)) == seen
    # Names that no image has do not count.
    assert seen_classes(Dataset("mine", in_memory([0], ["a", "b"]), query)) == 0
    assert seen_classes(reference.tiny_dataset()) == 0


def test_split_clients_keeps_images_and_bounds_classes():
    images = tiny_dataset(num_classes=12, num_clients=6).train
    split = split_clients(images, 2, seed=0)
    assert count_own_classes(split).max() == 2
    assert count_own_classes(split).min() >= 1
    assert split.pixels is images.pixels
    assert np.array_equal(split.labels, images.labels)
    parents = [split.client_names[c].split(" part ")[0] for c in split.clients]
    assert parents == [images.client_names[c] for c in images.clients]
    # A class of a client stays whole, and parts are even.
    before = {(c, label) for c, label in zip(images.clients, images.labels, strict=True)}
    after = {(c, label) for c, label in zip(split.clients, split.labels, strict=True)}
    assert len(before) == len(after)
    assert np.array_equal(split_clients(images, 2, seed=0).clients, split.clients)
    assert not np.array_equal(split_clients(images, 2, seed=1).clients, split.clients)
    same = split_clients(images, 99, seed=0)
    assert np.array_equal(same.clients, images.clients)
    assert list(same.client_names) == list(images.client_names)


def test_rotations_are_classes_and_clients_of_their_own():
    images = tiny_dataset().train
    turned = rotate_classes(images)
    n, k, count = len(images.class_names), len(images.client_names), len(images)
    assert [len(turned.class_names), len(turned.client_names)] == [4 * n, 4 * k]
    assert len(turned) == 4 * count
    for turns in range(4):
        part = slice(turns * count, (turns + 1) * count)
        assert np.array_equal(turned.labels[part], images.labels + turns * n)
        assert np.array_equal(turned.clients[part], images.clients + turns * k)
        expected = torch.rot90(torch.from_numpy(images.pixels[5]), turns, (1, 2))
        assert np.array_equal(turned.pixels[turns * count + 5], expected.numpy())
