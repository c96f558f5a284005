"""Images are decoded once: workers, damage, kills and full disks."""

import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from fedss.data import load_dataset
from fedss.data.cache import cache_folder, cached_array, in_threads
from fedss.data.decoding import decode
from fedss.errors import DataError
from tests.data.made import GOOD, load, make_image, same, save, write_csv


def many(root, count):
    """A CSV of ``count`` images, more than a worker takes at a time."""
    for i in range(count):
        save(root / f"q{i:03d}.png", make_image(i, (5, 5)))
    lines = [f"q{i:03d}.png,class {i},x,train" for i in range(count)]
    return write_csv(root, [*lines, "p0.png,t,x,test", "p1.png,t,x,test"])


def test_images_keep_their_order_whoever_decodes_them(root):
    train = load(many(root, 150)).train
    assert [train.class_names[label] for label in train.labels] == [
        f"class {i}" for i in sorted(range(150), key=str)
    ]
    for name, pixels in zip(train.names, train.pixels, strict=True):
        assert np.array_equal(pixels, decode(root / name, 8, 3))


def test_broken_images_are_found_in_every_worker_s_share(root):
    path, broken = many(root, 150), (3, 40, 149)
    for i in broken:
        (root / f"q{i:03d}.png").write_text("not an image")
    with pytest.raises(DataError, match=r"3 of 152 .*q003\.png .*q040\.png .*q149\.png"):
        load(path)
    data = load(path, skip_broken=True)
    assert set(data.skipped) == {f"q{i:03d}.png" for i in broken}
    assert len(data.train) == 147


def test_workers_do_not_run_ahead_of_what_is_written():
    begun = []
    results = in_threads(lambda some: begun.append(some) or len(some), 10_000)
    assert next(results) == 32
    assert len(begun) <= 2 * os.cpu_count() + 1
    assert sum(results) == 10_000 - 32
    assert sorted(i for some in begun for i in some) == list(range(10_000))


def test_the_same_relative_path_elsewhere_is_another_file(tmp_path, monkeypatch):
    found = []
    for place, number in (("here", 1), ("there", 2)):
        for label in ("a", "b"):
            for i in range(2):
                file = tmp_path / place / "root" / "x" / label / f"{i}.bmp"
                save(file, make_image(number, (8, 8)))
                os.utime(file, (0, 0))
        monkeypatch.chdir(tmp_path / place)
        found.append(load_dataset("folder", "root", image_size=8, cache=tmp_path / "cache"))
    assert not np.array_equal(found[0].train.pixels, found[1].train.pixels)


def test_images_are_decoded_once_until_they_change(root, monkeypatch):
    path = write_csv(root, GOOD)
    first = load(path)
    with monkeypatch.context() as patch:
        patch.setattr("fedss.data.cache.decode", lambda *_: pytest.fail("decoded again"))
        assert same(load(path), first)
    save(root / "p0.png", make_image(1000))
    assert not np.array_equal(load(path).train.pixels[0], first.train.pixels[0])


def test_where_the_cache_is(tmp_path, monkeypatch):
    monkeypatch.delenv("FEDSS_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "fedss"
    monkeypatch.setenv("FEDSS_CACHE", str(tmp_path / "named"))
    assert cache_folder() == tmp_path / "named"
    assert cache_folder(tmp_path / "given") == tmp_path / "given"


def test_a_user_without_a_home_has_a_cache_of_the_user_s_own(tmp_path, monkeypatch, caplog):
    monkeypatch.delenv("FEDSS_CACHE", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "home").write_text("a file")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    place = tmp_path / f"fedss-cache-{os.getuid()}"
    assert cache_folder() == place / "fedss"
    assert place.stat().st_mode & 0o777 == 0o700
    assert caplog.text.count(str(place)) == 1
    cache_folder()
    assert caplog.text.count(str(place)) == 1
    place.rmdir()
    place.symlink_to(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home" / "of another"))
    with pytest.raises(DataError, match="belongs to somebody else"):
        cache_folder()


def rows(count):
    return iter([np.full((count, 2), 7, np.uint8)])


def test_a_damaged_cache_file_is_made_anew(tmp_path):
    made = cached_array(("k",), (4, 2), rows(4), cache=tmp_path, title="")
    (file,) = tmp_path.iterdir()
    del made
    file.write_bytes(file.read_bytes()[:-3])
    again = cached_array(("k",), (4, 2), rows(4), cache=tmp_path, title="")
    assert (np.asarray(again) == 7).all()


def test_a_writer_killed_midway_leaves_nothing_that_is_believed(tmp_path):
    script = f"""
import os, signal, numpy as np
from pathlib import Path
from fedss.data.cache import cached_array
def batches():
    yield np.zeros((2, 2), np.uint8)
    os.kill(os.getpid(), signal.SIGKILL)
cached_array(("k",), (4, 2), batches(), cache=Path({str(tmp_path)!r}), title="")
"""
    done = subprocess.run([sys.executable, "-c", script], check=False)
    assert done.returncode == -9
    assert not list(tmp_path.glob("*.npy"))
    made = cached_array(("k",), (4, 2), rows(4), cache=tmp_path, title="")
    assert (np.asarray(made) == 7).all()


def test_two_writers_at_once(tmp_path):
    def batches():
        first = cached_array(("k",), (4, 2), rows(4), cache=tmp_path, title="")
        yield np.asarray(first)

    made = cached_array(("k",), (4, 2), batches(), cache=tmp_path, title="")
    assert (np.asarray(made) == 7).all()
    assert len(list(tmp_path.iterdir())) == 1


def test_litter_of_kills_is_removed_after_a_day(tmp_path):
    old, young = tmp_path / ".a.npy.0123abcd.tmp", tmp_path / ".b.npy.0123abcd.tmp"
    for file in (old, young):
        file.write_bytes(b"")
    os.utime(old, (time.time() - 25 * 3600,) * 2)
    cached_array(("k",), (4, 2), rows(4), cache=tmp_path, title="")
    assert not old.exists()
    assert young.exists()


def test_an_error_midway_leaves_no_file(tmp_path):
    def batches():
        yield np.zeros((2, 2), np.uint8)
        raise DataError("no more")

    with pytest.raises(DataError, match="no more"):
        cached_array(("k",), (4, 2), batches(), cache=tmp_path, title="")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_or_an_impossible_folder_is_named(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("fedss.data.cache.os.fsync", full)
        message = f"cannot write .*{tmp_path}.*No space left on device.*FEDSS_CACHE"
        with pytest.raises(DataError, match=message):
            cached_array(("k",), (4, 2), rows(4), cache=tmp_path, title="")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="FEDSS_CACHE"):
        cached_array(("k",), (4, 2), rows(4), cache=tmp_path / "file" / "in", title="")


def test_images_that_the_disk_has_no_room_for_are_not_drawn(tmp_path, monkeypatch):
    def batches():
        raise AssertionError("drawn all the same")
        yield

    free = shutil.disk_usage(tmp_path)._replace(free=5_000)
    monkeypatch.setattr("fedss.data.cache.shutil.disk_usage", lambda path: free)
    with pytest.raises(
        DataError, match=r"100 images, each of 1 x 8 x 8 numbers, take .*--image-size"
    ):
        cached_array(("k",), (100, 1, 8, 8), batches(), cache=tmp_path, title="glyphs")
    assert not list(tmp_path.iterdir())
