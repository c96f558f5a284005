"""Omniglot: published counts, archives or folders, and what can be wrong with them."""

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedss.data import load_dataset, omniglot_dataset
from fedss.errors import DataError
from tests.data.made import same


def place_of_omniglot():
    beside = Path(__file__).resolve().parents[2] / ".." / "shared" / "data" / "omniglot"
    return Path(os.environ.get("FEDSS_OMNIGLOT", beside))


@pytest.mark.skipif(
    not (place_of_omniglot() / "images_background.zip").is_file(),
    reason="no Omniglot archives beside the repository nor at FEDSS_OMNIGLOT",
)
def test_omniglot_has_the_published_counts(tmp_path):
    place = place_of_omniglot()
    data = omniglot_dataset(place, cache=tmp_path)
    parts = (data.train, data.validation.query, data.test.query)
    assert [len(part) for part in parts] == [19_280, 3_000, 10_180]
    assert [len(part.class_names) for part in parts] == [964, 150, 509]
    assert [len(part.client_names) for part in parts] == [600, 120, 280]
    for part in parts:
        assert (np.bincount(part.labels) == 20).all()
        drawn = np.bincount(part.clients)
        assert drawn.min() >= 14
        assert drawn.max() <= 55
        assert 0.01 < part.pixels.mean() / 255 < 0.2
    with zipfile.ZipFile(place / "images_evaluation.zip") as pack:
        row = 4321
        with pack.open(data.test.query.names[row]) as file, Image.open(file) as image:
            inked = np.asarray(image.convert("L").resize((28, 28), Image.Resampling.BILINEAR))
    assert np.array_equal(data.test.query.pixels[row, 0], 255 - inked)


def test_omniglot_zipped_and_unpacked_are_the_same(small_omniglot, tmp_path):
    zipped, unpacked = (omniglot_dataset(p, cache=tmp_path / "cache") for p in small_omniglot)
    assert same(zipped, unpacked)
    assert zipped.train.names[:2] == [
        "images_background/Alphabet_0/character01/0001_01.png",
        "images_background/Alphabet_0/character02/0002_01.png",
    ]
    assert zipped.train.client_names[0] == "Alphabet_0/drawer01"
    assert len(zipped.train.client_names) == 6
    alphabets = {name.split("/")[0] for name in zipped.test.query.class_names}
    assert alphabets == {"Alphabet_6", "Alphabet_7"}
    assert len(zipped.validation.query.class_names) == 12
    with Image.open(small_omniglot[1] / zipped.train.names[0]) as image:
        inked = np.asarray(image.convert("L").resize((28, 28), Image.Resampling.BILINEAR))
    assert np.array_equal(zipped.train.pixels[0, 0], 255 - inked)


def test_omniglot_that_is_broken_or_of_another_layout(small_omniglot, tmp_path):
    zipped, unpacked = small_omniglot
    broken = next(unpacked.glob("images_background/*/*/*.png"))
    broken.write_bytes(broken.read_bytes()[:40])
    with pytest.raises(DataError, match=f"{broken.name} cannot be read"):
        omniglot_dataset(unpacked, cache=tmp_path)
    with zipfile.ZipFile(zipped / "images_background.zip", "w") as pack:
        pack.writestr("elsewhere/p.png", b"")
    with pytest.raises(DataError, match="expected images images_background/<alphabet>"):
        omniglot_dataset(zipped, cache=tmp_path)
    (zipped / "images_background.zip").write_bytes(b"PK no more")
    with pytest.raises(DataError, match="not a whole zip archive"):
        omniglot_dataset(zipped, cache=tmp_path)


def test_omniglot_that_cannot_be_fetched(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    message = r"expected images_background\.zip or the folder .*no network.*put them there"
    with pytest.raises(DataError, match=message):
        omniglot_dataset(tmp_path / "place")


def test_a_fetched_archive_with_a_wrong_checksum_is_not_kept(small_omniglot, tmp_path, monkeypatch):
    archive = small_omniglot[0] / "images_background.zip"
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: archive.open("rb"))
    with pytest.raises(DataError, match="expected MD5 68d2efa1"):
        load_dataset("omniglot", cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.zip"))
