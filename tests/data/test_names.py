"""Names by the million: made when they are asked for."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedss import Config, train
from fedss.core.algorithm import draw_cohort
from fedss.data import Dataset, LazyNames, RetrievalTask, count_own_classes, data_fingerprint
from fedss.errors import DataError
from tests.data.made import in_memory
from tests.reference import tiny_backbone, tiny_dataset


@given(st.integers(0, 9), st.slices(9), st.integers(-12, 12))
def test_lazy_names_are_the_list_of_them(length, part, index):
    expected = [f"client {i}" for i in range(length)]
    names = LazyNames(length, "client {}".format)
    assert list(names) == expected
    assert list(reversed(names)) == expected[::-1]
    assert (len(names), names[part]) == (length, expected[part])
    if -length <= index < length:
        at: Any = np.int64(index)
        assert names[index] == names[at] == expected[index]
        assert names[index] in names
    else:
        with pytest.raises(IndexError):
            names[index]
    assert "client -1" not in names


def lazily(images):
    """The same names, each made when it is asked for."""
    fields = ("class_names", "client_names", "names")
    made = {field: list(getattr(images, field)) for field in fields}
    lazy = {field: LazyNames(len(held), held.__getitem__) for field, held in made.items()}
    return dataclasses.replace(images, **lazy)


def test_made_up_names_give_the_run_that_lists_give(tmp_path):
    listed = tiny_dataset()
    lazy = Dataset("tiny", lazily(listed.train), RetrievalTask(lazily(listed.test.query)))
    assert data_fingerprint(lazy) == data_fingerprint(listed)
    config = Config(rounds=2, clients_per_round=3, sample_size=6, embedding_size=4, workers=1)
    runs = {}
    for name, data in (("listed", listed), ("lazy", lazy)):
        run = train(config, tmp_path / name, data=data, backbone=tiny_backbone())
        described = json.loads((run.folder / "config.json").read_text())["data"]
        runs[name] = (
            described,
            {key: value for key, value in run.summary.items() if not key.startswith("seconds")},
            (run.folder / "model" / "model.safetensors").read_bytes(),
        )
    assert runs["lazy"] == runs["listed"]


class Counted(np.ndarray):
    """An array that counts how many rows are read from it, one by one or all at once."""

    rows_read: list[int]

    def __new__(cls, values, rows_read):
        counted = values.view(cls)
        counted.rows_read = rows_read
        return counted

    def __getitem__(self, key):
        found = self.view(np.ndarray)[key]
        self.rows_read.append(len(found) if found.ndim else 1)
        return found

    def __array_ufunc__(self, ufunc, method, *inputs, **options):
        self.rows_read.append(len(self))
        return getattr(ufunc, method)(*map(plain, inputs), **options)

    def __array_function__(self, function, types, arguments, options):
        self.rows_read.append(len(self))
        return function(*map(plain, arguments), **options)


def plain(value):
    return value.view(np.ndarray) if isinstance(value, Counted) else value


@pytest.mark.parametrize("method", ["fedss", "moments"])
def test_a_round_reads_what_its_cohort_holds_whatever_the_number_of_clients(tmp_path, method):
    def rows_read_by_rounds(num_clients):
        images, read = in_memory(np.arange(3 * num_clients) % 20), []

        def made(i):
            read.append(1)
            return f"name {i}"

        counted = dataclasses.replace(
            images,
            pixels=Counted(np.tile(images.pixels, (1, 1, 2, 2)), read),
            labels=Counted(images.labels, read),
            clients=Counted(np.arange(3 * num_clients) // 3, read),
            class_names=LazyNames(20, made),
            client_names=LazyNames(num_clients, made),
            names=LazyNames(3 * num_clients, made),
        )
        config = Config(
            method=method,
            rounds=4,
            clients_per_round=5,
            sample_size=8,
            embedding_size=4,
            eval_every=0,
            workers=1,
        )
        at = []
        train(
            config,
            tmp_path / str(num_clients),
            data=Dataset("counted", counted, tiny_dataset().test),
            backbone=tiny_backbone(),
            on_round=lambda _: at.append(sum(read)),
        )
        assert at[0] > 3 * num_clients  # the start reads all of them
        return np.diff(at).tolist()

    few, many = rows_read_by_rounds(20), rows_read_by_rounds(2000)
    assert few == many
    assert 2 * 5 * 3 <= few[0] <= 4 * 5 * 3


def test_a_cohort_is_drawn_from_any_number_of_clients():
    # No array of so many could be made.
    cohort = draw_cohort(10**15, 1000, seed=0, round=3)
    assert len(np.unique(cohort)) == 1000
    assert (np.diff(cohort) > 0).all()
    assert cohort[0] >= 0
    assert cohort[-1] < 10**15
    assert 0.4 < np.median(cohort) / 10**15 < 0.6


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6)), max_size=40), st.integers(0, 3))
def test_own_classes_are_counted(held, without):
    clients, labels = (np.array([pair[i] for pair in held], np.int64) for i in (0, 1))
    images = in_memory(
        labels,
        [f"c{i}" for i in range(7)],
        clients=clients,
        client_names=[f"client{i}" for i in range(5 + without)],
    )
    expected = [len({label for k, label in held if k == client}) for client in range(5 + without)]
    assert count_own_classes(images).tolist() == expected


def test_names_whose_hashes_are_the_same_are_still_different():
    class Name(str):
        __slots__ = ()

        def __hash__(self):
            return 1

        def __eq__(self, other):
            return str(self) == str(other)

    assert len(in_memory([0, 1], [Name("a"), Name("b")])) == 2
    with pytest.raises(DataError, match="'a' occurs 2 times"):
        in_memory([0, 1], [Name("b"), Name("a"), Name("a")])
