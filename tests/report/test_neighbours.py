"""Queries and their neighbours in the report."""

import re
from pathlib import Path

import numpy as np
import pytest

from fedss.report import write_report
from tests.report.made import Page, fake_comparison, fake_run, read, single


def test_without_neighbours(tmp_path: Path) -> None:
    single(tmp_path, rounds=10)
    (tmp_path / "retrieval.npz").unlink()
    _, page = read(tmp_path)
    assert "img" not in page.tags
    assert "What is found" not in page.words


def test_comparison_shows_the_same_queries(comparison_page: tuple[str, Page]) -> None:
    _, page = comparison_page
    queries = [i for i, alt in enumerate(page.alts) if alt.startswith("Query: ")]
    assert len(queries) >= 4
    assert np.diff([*queries, len(page.alts)]).tolist() == [1 + 4 * 5] * len(queries)
    assert "Where the methods differ" in page.words


def test_large_colour_images_stay_small(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 4, 3, 160, 120), dtype=np.uint8)
    for method in ("full", "fedss", "pos-only", "central"):
        fake_run(tmp_path / method, method, rounds=5, pixels=pixels)
    html, _ = read(tmp_path)
    assert "data:image/jpeg" in html
    assert len(html) < 2_000_000


@pytest.mark.parametrize(
    ("depth", "words"),
    [
        (1, "its nearest neighbour, with its cosine"),
        (3, "its three nearest neighbours, with their cosine"),
        (7, "its 7 nearest neighbours, with their cosine"),
    ],
)
def test_any_number_of_neighbours(tmp_path: Path, depth: int, words: str) -> None:
    fake_comparison(tmp_path, ["full", "fedss"], rounds=5, depth=depth)
    _, page = read(tmp_path)
    assert words in page.words
    queries = [i for i, alt in enumerate(page.alts) if alt.startswith("Query: ")]
    assert queries
    assert set(np.diff([*queries, len(page.alts)])) == {1 + 2 * depth}
    counts = [int(n) for n in re.findall(rf"(\d+) of {depth} right", page.words)]
    assert len(counts) == 2 * len(queries)
    assert sum(counts) == sum(alt.startswith("Right: ") for alt in page.alts)


def test_methods_with_different_numbers_of_neighbours(tmp_path: Path) -> None:
    fake_run(tmp_path / "full", "full", rounds=5, depth=5)
    fake_run(tmp_path / "fedss", "fedss", rounds=5, depth=2)
    assert "its two nearest neighbours" in read(tmp_path)[1].words


def test_fewer_neighbours_than_five(tmp_path: Path) -> None:
    """A small test set has fewer others to find; the panels show those."""
    folder = tmp_path / "few"
    fake_comparison(folder, ["full", "fedss"])
    for path in folder.glob("*/retrieval.npz"):
        panels = dict(np.load(path))
        for name, keep in (("pixels", 3), ("labels", 3), ("class_names", 3), ("scores", 2)):
            panels[name] = panels[name][:, :keep]
        np.savez_compressed(path, **panels)
    text = write_report(folder).read_text()
    assert "of 2 right" in text
    assert "of 5 right" not in text
