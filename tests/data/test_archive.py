"""What is packed is read as if it was unpacked."""

import io
import os
import shutil
import stat
import tarfile
import zipfile

import numpy as np
import pytest

from fedss.data import data_fingerprint, load_dataset, locate
from fedss.data.archive import find_archive, find_manifest, open_archive
from fedss.errors import DataError
from tests.data.made import GOOD, make_image, save, write_csv


def pack(kind, folder, target, top=""):
    """All files below a folder, in an archive, as other programs make it."""
    if kind == "zip":
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(folder.rglob("*")):
                archive.write(path, os.path.join(top, path.relative_to(folder)))
    else:
        with tarfile.open(target, "w") as archive:
            archive.add(folder, arcname=top or ".")
    return target


def fingerprint(name, path, cache, **options):
    data = load_dataset(name, path, image_size=8, cache=cache, **options)
    return data_fingerprint(data), dict(data.passed_over), data.skipped, data.unpaired


@pytest.mark.parametrize("top", ["", "photos"])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_packed_folders_are_the_folders(folders, tmp_path, kind, top):
    save(folders / "ann" / "cat" / "deep" / "deeper" / "x.png", make_image(1))
    for name in ("a", "b"):
        (folders / ".git" / name).write_text("")
    path = pack(kind, folders, tmp_path / f"photos.{kind}", top)
    expected, over, *_ = fingerprint("folder", folders, tmp_path / "cache")
    assert locate(path) == ("folder", path)
    found, packed_over, *_ = fingerprint("folder", path, tmp_path / "cache")
    assert found == expected
    assert packed_over == over
    assert over["hidden folders"] == 1


@pytest.mark.parametrize("top", ["", "photos"])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_packed_csv_is_the_csv(root, tmp_path, kind, top):
    path = write_csv(root, GOOD)
    expected = fingerprint("csv", path, tmp_path / "cache")
    place = tmp_path.parent / f"{tmp_path.name}-packed"
    place.mkdir()
    archive = pack(kind, root, place / f"x.{kind}", top)
    shutil.rmtree(tmp_path / "cache")
    assert locate(archive) == ("csv", archive)
    assert fingerprint("csv", archive, place / "cache") == expected
    inner = archive / top / "images.csv"
    assert locate(inner) == ("csv", inner)
    assert fingerprint("csv", inner, place / "cache") == expected


def test_a_site_may_have_an_archive(folders, tmp_path):
    path = pack("zip", folders, tmp_path / "photos.zip")
    how = {"at_site": True, "test_classes": 0.5}
    expected = fingerprint("folder", folders, tmp_path / "cache", **how)
    assert fingerprint(*locate(path), tmp_path / "cache", **how)[0] == expected[0]


def test_pixels_are_decoded_once_until_the_archive_changes(folders, tmp_path, monkeypatch):
    path = pack("zip", folders, tmp_path / "x.zip")
    first = load_dataset("folder", path, image_size=8, cache=tmp_path / "cache")
    monkeypatch.setattr(zipfile.ZipFile, "read", None)
    again = load_dataset("folder", path, image_size=8, cache=tmp_path / "cache")
    assert np.array_equal(first.train.pixels, again.train.pixels)
    monkeypatch.undo()
    for file in folders.glob("*/*/[0-9]*"):
        save(file, make_image(len(file.name) + 90))
    os.remove(path)
    pack("zip", folders, path)
    changed = load_dataset("folder", path, image_size=8, cache=tmp_path / "cache")
    assert not np.array_equal(first.train.pixels, changed.train.pixels)


def test_missing_and_broken_images_in_an_archive_are_named(root, tmp_path):
    (root / "p1.png").write_bytes(b"hello")
    (root / "p3.png").unlink()
    write_csv(root, GOOD)
    archive = pack("zip", root, tmp_path / "x.zip")
    with pytest.raises(DataError, match=r"images.csv, line 5: no such image file: .*x.zip/p3.png"):
        load_dataset("csv", archive, image_size=8, cache=tmp_path / "cache", skip_broken=False)
    data = load_dataset(
        "csv", archive, image_size=8, cache=tmp_path / "cache", skip_broken=True, at_site=True
    )
    assert set(data.skipped) == {"p1.png", "p3.png"}
    save(root / "p3.png", make_image(3))
    archive = pack("zip", root, tmp_path / "y.zip")
    with pytest.raises(
        DataError, match=r"1 of 7 images cannot be read: .*y\.zip/p1\.png \(no image"
    ):
        load_dataset("csv", archive, image_size=8, cache=tmp_path / "cache")


def test_a_csv_in_an_archive_reaches_no_file_outside(root, tmp_path):
    save(tmp_path / "secret.png", make_image(0))
    for outside in (str(tmp_path / "secret.png"), "../secret.png"):
        place = tmp_path / "inner"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        write_csv(place, [f"{outside},cat,ann"], "image,label,client")
        archive = pack("zip", place, tmp_path / "x.zip")
        with pytest.raises(DataError, match="no such image file"):
            load_dataset("csv", archive, cache=tmp_path / "cache")


def test_links_are_passed_over(folders, tmp_path):
    with zipfile.ZipFile(pack("zip", folders, tmp_path / "x.zip"), "a") as archive:
        link = zipfile.ZipInfo("ann/cat/link.png")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
    os.symlink("/etc/passwd", folders / "ann" / "cat" / "link.png")
    tar = pack("tar", folders, tmp_path / "x.tar")
    for path in (tmp_path / "x.zip", tar):
        opened = open_archive(path)
        assert opened.links == 1
        assert not any("link" in name for name in opened.names)
        data = load_dataset("folder", path, image_size=8, cache=tmp_path / "cache")
        assert data.passed_over["links in the archive"] == 1


def test_names_of_members_are_made_plain(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in ("/a/1.png", "./b//2.png", "c/../3.png"):
            archive.writestr(name, name)
    opened = open_archive(tmp_path / "x.zip")
    assert [(name, opened.read(name).decode()) for name in opened.names] == [
        ("a/1.png", "/a/1.png"),
        ("b/2.png", "./b//2.png"),
        ("3.png", "c/../3.png"),
    ]


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["a.csv", "x/1.png"], "a.csv"),
        (["a.csv", "manifest.csv"], "manifest.csv"),
        (["top/a.csv", "top/x/1.png"], "top/a.csv"),
        (["x/a.csv", "y/1.png"], None),
        ([".a.csv", "x/1.png"], None),
        (["x/1.png"], None),
    ],
)
def test_which_csv_lists_the_images(tmp_path, names, found):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in names:
            archive.writestr(name, "")
    assert find_manifest(open_archive(tmp_path / "x.zip")) == found


def test_mistakes_with_archives_are_named(root, tmp_path):
    place = tmp_path / "two"
    place.mkdir()
    for name in ("a.csv", "b.csv"):
        (place / name).write_text("image,label,client\n")
    two = pack("zip", place, tmp_path / "two.zip")
    with pytest.raises(DataError, match=r"2 CSVs are in it; name one: .*two.zip/a.csv or .*b\.csv"):
        locate(two)
    with pytest.raises(DataError, match=r"expected a CSV .*; no c\.csv in it"):
        load_dataset("csv", two / "c.csv")
    with pytest.raises(DataError, match=r"two.zip/a.csv: no images"):
        load_dataset("csv", two / "a.csv")
    with zipfile.ZipFile(tmp_path / "none.zip", "w"):
        pass
    with pytest.raises(DataError, match="no images found"):
        load_dataset("folder", tmp_path / "none.zip")
    with pytest.raises(DataError, match="no CSV in it, not within folders"):
        load_dataset("csv", tmp_path / "none.zip")
    for name in ("bad.zip", "bad.tar"):
        (tmp_path / name).write_bytes(b"hello" * 200)
        with pytest.raises(DataError, match=rf"{name}: cannot be read as an archive: "):
            locate(tmp_path / name)
    (tmp_path / "x.tar.gz").write_bytes(b"")
    with pytest.raises(DataError, match="compressed tar can be read from its beginning alone"):
        locate(tmp_path / "x.tar.gz")
    (tmp_path / "folder.zip").mkdir()
    assert find_archive(tmp_path / "folder.zip" / "a.csv") is None


def test_a_member_of_gigabytes_is_not_read(tmp_path, monkeypatch):
    from fedss.data import archive

    monkeypatch.setattr(archive, "_MOST_BYTES", 9)
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as packed:
        packed.writestr("a", "0123456789")
    with pytest.raises(ValueError, match="10 bytes, above the limit of 9"):
        archive.open_archive(tmp_path / "x.zip").read("a")
    member = tarfile.TarInfo("a")
    member.size = 10
    with tarfile.open(tmp_path / "x.tar", "w") as pack_tar:
        pack_tar.addfile(member, io.BytesIO(b"0123456789"))
    with pytest.raises(ValueError, match="10 bytes, above the limit of 9"):
        archive.open_archive(tmp_path / "x.tar").read("a")
