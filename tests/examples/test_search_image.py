"""The example draws queries and what is found."""

import sys

import torch
from PIL import Image

import fedss
from examples import search_image


def test_queries_are_taken_by_how_well_they_are_answered():
    right_QK = torch.tensor([[1, 1, 1], [0, 0, 0], [0, 1, 1], [0, 0, 1], [1, 1, 0]], dtype=bool)
    assert search_image.typical_queries(right_QK, (1.0, 0.75, 0.5, 0.25, 0.0)) == [0, 4, 2, 3, 1]


def test_it_draws_a_row_for_each_query(tmp_path, monkeypatch):
    small = {"glyphs_classes": 40, "glyphs_clients": 8}
    config, load = fedss.Config, fedss.load_dataset
    monkeypatch.setattr(fedss, "Config", lambda **given: config(**given, **small))
    monkeypatch.setattr(fedss, "load_dataset", lambda name, **given: load(name, **given | small))
    image = tmp_path / "search.png"
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "run"), str(image), "--rounds", "1"])
    search_image.main()
    with Image.open(image) as image:
        assert image.width > image.height > 3 * search_image.TILE
        assert len(image.getcolors()) > 20
