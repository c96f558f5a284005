"""Folders of images are the CSV that lists them."""

import random
import unicodedata
import zipfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedss.data import load_dataset
from fedss.data.folder import read_folder
from fedss.data.names import composed
from fedss.errors import DataError
from fedss.inference.embedding import list_images
from tests.data.made import load, load_folder, make_image, same, save, write_csv


def test_folders_are_the_csv_that_lists_them(folders, tmp_path):
    names = [path.relative_to(folders) for path in folders.glob("*/*/[0-9]*")]
    random.Random(0).shuffle(names)
    lines = [f"{name.as_posix()},{name.parts[1]},{name.parts[0]}" for name in names]
    path = write_csv(folders, lines, "image,label,client")
    data = load_folder(folders, tmp_path)
    assert same(data, load(path))
    assert len(data.train) + len(data.test.query) == 5
    assert data.test.query.class_names[0] in ("cat", "dog")
    assert data.train.pixels.shape[1:] == (3, 8, 8)


def test_names_are_compared_without_outer_spaces(folders, tmp_path):
    """By training on folders, training on a CSV and by search: nobody sees these spaces."""
    expected = load_folder(folders, tmp_path)
    (folders / "bob" / "dog").rename(folders / "bob" / " dog\u00a0")
    (folders / "ann").rename(folders / "ann ")
    save(folders / "ann" / "cat " / "5.png", make_image(9))
    data = load_folder(folders, tmp_path)
    parts = [data.train, data.test.query]
    assert {name for part in parts for name in part.class_names} == {"cat", "dog", "fox"}
    assert {name for part in parts for name in part.client_names} == {"ann", "bob"}
    assert len(data.train) + len(data.test.query) == 6
    assert set(list_images(folders).labels) == {"cat", "dog", "fox"}
    listing = read_folder(folders)
    lines = [f'"{row.name}"," {row.label} ",{row.client} ' for row in listing.rows]
    assert same(load(write_csv(folders, lines, "image,label,client")), data)
    assert list(expected.test.query.class_names) == list(data.test.query.class_names)


@pytest.mark.parametrize("place", ["ann/ /1.png", " /cat/1.png"])
def test_a_name_of_spaces_is_refused(folders, tmp_path, place):
    save(folders / place, make_image(0))
    with pytest.raises(DataError, match=f"{place}: a client or class whose name is nothing but"):
        load_folder(folders, tmp_path)


@given(st.text())
def test_the_rule_for_names_leaves_what_it_made(name):
    once = composed(name)
    assert composed(once) == once == once.strip() == unicodedata.normalize("NFC", once)
    for form in ("NFC", "NFD"):
        assert composed(f" {unicodedata.normalize(form, name)}\t") == once


def test_folders_may_be_links_even_in_circles(folders, tmp_path):
    expected = load_folder(folders, tmp_path)
    (folders / ".store").mkdir()
    (folders / "bob").rename(folders / ".store" / "bob")
    (folders / "bob").symlink_to(folders / ".store" / "bob")
    (folders / "ann" / "cat" / "loop").symlink_to(folders / "ann")
    assert same(load_folder(folders, tmp_path), expected)


def test_mistakes_in_folders(folders, tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        load_dataset("folder", tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no images found; expected images as .*client/class"):
        load_dataset("folder", tmp_path / "empty")
    (folders / "cid" / "cat").mkdir(parents=True)
    with pytest.raises(DataError, match="cid: a client without images"):
        load_dataset("folder", folders)
    save(folders / "cid" / "p.png", make_image(0))
    with pytest.raises(DataError, match=r"p\.png: an image at the wrong depth"):
        load_dataset("folder", folders)


@pytest.mark.parametrize("packed", [False, True])
def test_folders_of_classes_are_dealt_to_clients(tmp_path, packed):
    root = tmp_path / "classes"
    lines = []
    for i in range(12):
        label = ["cat", "dog", "elk", "fox"][i % 4]
        save(root / label / f"{i}.png", make_image(i))
        lines.append(f"{label}/{i}.png,{label},nobody")
    how = {"image_size": 8, "cache": tmp_path / "cache", "partition": "classes:1"}
    path = write_csv(root, lines, "image,label,client")
    expected = load_dataset("csv", path, **how)
    assert len(expected.train.client_names) == len(expected.train.class_names)
    place = root
    if packed:
        place = tmp_path / "classes.zip"
        with zipfile.ZipFile(place, "w") as archive:
            for file in root.glob("*/*.png"):
                archive.write(file, file.relative_to(root))
    assert same(load_dataset("folder", place, **how), expected)
    with pytest.raises(DataError, match=r"wrong depth; .*a partition deals .*\(--partition\)"):
        load_dataset("folder", place, image_size=8)
    if not packed:
        (root / "gnu").mkdir()
        with pytest.raises(DataError, match="gnu: a class without images"):
            load_dataset("folder", root, **how)
        save(root / "gnu" / "more" / "1.png", make_image(0))
        with pytest.raises(DataError, match=r"wrong depth; .* or as .*class/image"):
            load_dataset("folder", root, **how)
