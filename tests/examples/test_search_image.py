"""The examples draw queries and what is found, on photographs that one of them makes."""

import csv
import sys

import numpy as np
import torch
from PIL import Image

import fedss
from examples import made_up_photographs, search_image


def test_queries_are_taken_by_how_well_they_are_answered():
    right_QK = torch.tensor([[1, 1, 1], [0, 0, 0], [0, 1, 1], [0, 0, 1], [1, 1, 0]], dtype=bool)
    assert search_image.typical_queries(right_QK, (1.0, 0.75, 0.5, 0.25, 0.0)) == [0, 4, 2, 3, 1]


def test_it_draws_a_row_for_each_query(tmp_path, monkeypatch):
    photos, picture = tmp_path / "photographs", tmp_path / "search.png"
    words = ["--classes", "4", "--test-classes", "3", "--side", "24"]
    monkeypatch.setattr(sys, "argv", ["", str(photos), *words])
    made_up_photographs.main()
    with (photos / "photos.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["split"] for row in rows] == ["train"] * 36 + ["test"] * 27
    owners = {(row["label"], row["client"]) for row in rows[:36]}
    assert len(owners) == 2 * 4
    config = fedss.Config(
        data="csv",
        data_path=str(photos / "photos.csv"),
        image_size=24,
        backbone="conv4-4",
        rounds=1,
    )
    fedss.train(config, tmp_path / "run")
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "run"), str(picture)])
    search_image.main()
    with Image.open(picture) as image:
        assert image.width > image.height > 3 * search_image.TILE
        assert len(image.convert("L").getcolors()) > 20


def test_photographs_of_a_thing_are_alike_and_each_is_one_of_its_own():
    rng = np.random.default_rng(3)
    one, other = (made_up_photographs.make_thing(rng) for _ in range(2))
    first, again, second = (made_up_photographs.photograph(one, 20, seed) for seed in (0, 0, 1))
    assert first.shape == (20, 20, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, again)
    assert not np.array_equal(first, second)
    # The same table and light, another thing.
    assert not np.array_equal(first, made_up_photographs.photograph(other, 20, 0))
