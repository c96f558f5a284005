"""The image of who holds what: it is drawn from the numbers alone, whatever they are."""

import io

import numpy as np
import pytest
from PIL import Image

from fedss.report import clients_figure
from fedss.report.clients import clients_png
from fedss.report.figures import _light


def pairs(clients, labels):
    found, counts = np.unique(np.stack([clients, labels]), axis=1, return_counts=True)
    return found[0], found[1], counts


def many(seed):
    rng = np.random.default_rng(seed)
    clients = np.repeat(np.arange(150), 1 + rng.integers(0, 400, 150))
    return pairs(clients, (clients * 7 + rng.integers(0, 50, len(clients))) % 700)


@pytest.mark.parametrize(
    "held",
    [
        pairs(np.array([0]), np.array([0])),
        pairs(np.array([0, 0, 2]), np.array([0, 1, 5])),
        pairs(np.arange(5).repeat(4), np.tile(np.arange(4), 5)),
        many(0),
    ],
    ids=["one image", "gaps in the numbers", "all alike", "many"],
)
def test_whatever_is_held_is_drawn(held):
    with Image.open(io.BytesIO(clients_figure(held, "a $title_ with & signs"))) as image:
        assert image.format == "PNG"
        assert image.size == (2444, 1833)


def test_the_same_numbers_give_the_same_bytes():
    image = clients_figure(many(1), "")
    assert image == clients_figure(many(1), "")
    assert image != clients_figure(many(2), "")


def test_the_matrix_is_in_the_colours_of_the_page():
    # One client, one class: a single cell in the full colour, on the lower right.
    colors = {**_light(), "accent": "#ff0000"}
    with Image.open(io.BytesIO(clients_png(pairs(np.array([0]), np.array([0])), "", colors))) as im:
        pixels = np.asarray(im.convert("RGB"))
    lower_right = pixels[1833 // 2 + 200 : -250, 2444 // 2 + 200 : -150]
    assert (lower_right == (255, 0, 0)).all()
