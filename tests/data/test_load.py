"""Data sets by name, and what lies at a path."""

import pytest

from fedss.data import data_fingerprint, load_dataset, locate
from fedss.errors import DataError
from tests.data.made import GOOD, load, make_image, save, write_csv


def test_load_dataset_by_name(root, folders, small_omniglot, tmp_path):
    cache = tmp_path / "cache"
    path = write_csv(root, GOOD)
    assert load_dataset("csv", path, cache=cache).train.pixels.shape == (3, 3, 64, 64)
    assert (
        load_dataset("folder", str(folders), image_size=9, cache=cache).train.pixels.shape[2] == 9
    )
    assert load_dataset("omniglot", small_omniglot[0], cache=cache).name == "omniglot"
    data = load_dataset("glyphs", glyphs_classes=20, glyphs_clients=10)
    assert len(data.train.class_names) == 16
    assert data.train.pixels.shape[1:] == (1, 28, 28)


def test_what_lies_at_a_site_s_path_is_found(root, folders):
    path = write_csv(root, GOOD)
    assert locate(str(path)) == ("csv", path)
    assert locate(folders) == ("folder", folders)
    (folders / "photos.csv").write_text("")
    assert locate(folders) == ("folder", folders)
    path.rename(root / "manifest.csv")
    name, found = locate(root)
    assert load_dataset(name, found, cache=root / "cache", at_site=True).train.names[0] == "p0.png"
    assert found == root / "manifest.csv"
    with pytest.raises(DataError, match=r"none: expected a CSV file, .*found neither"):
        locate(root / "none")


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (
            ("omniglott",),
            {},
            r"unknown data set 'omniglott'; expected one of .*; is omniglot meant",
        ),
        (("zzz",), {}, "expected one of glyphs, omniglot, csv, folder, landmarks-user-160k.*100$"),
        (("csv",), {}, "'csv' needs a path: a CSV file"),
        (("folder",), {}, "'folder' needs a path: a folder"),
        (("glyphs", "x"), {}, "leave out the path x"),
        (("glyphs",), {"channels": 3}, "glyphs has 1 channel, got 3"),
        (("glyphs",), {"image_size": 0}, "image_size: expected at least 1"),
    ],
)
def test_mistakes_in_the_name_and_its_settings(arguments, options, message):
    with pytest.raises(DataError, match=message):
        load_dataset(*arguments, **options)


def test_the_fingerprint_tells_files_apart(root):
    path = write_csv(root, GOOD)
    first = data_fingerprint(load(path))
    assert first == data_fingerprint(load(path))
    assert len(first) == 64
    for old, new in (("dog", "elk"), ("fox", "elk"), ("bob", "rob"), ("test", "validation")):
        lines = [line.replace(old, new) for line in GOOD]
        assert data_fingerprint(load(write_csv(root, lines))) != first
    write_csv(root, GOOD)
    assert data_fingerprint(load(path, channels=1)) != first
    for name in ("p1.png", "p3.png"):
        before = data_fingerprint(load(path))
        save(root / name, make_image(77))
        assert data_fingerprint(load(path)) != before
