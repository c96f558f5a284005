"""Images from files: they equal what Pillow decodes, and each mistake has its message."""

import dataclasses
import hashlib
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import time
import unicodedata
import zipfile
import zlib
from collections import Counter, defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from fedss import Config, train
from fedss.core.algorithm import draw_cohort
from fedss.data import (
    Dataset,
    Images,
    LazyNames,
    RetrievalTask,
    count_own_classes,
    data_fingerprint,
    load_dataset,
    locate,
    omniglot_dataset,
    rotate_classes,
    seen_classes,
    split_clients,
)
from fedss.data.cache import cache_folder, cached_array, in_threads
from fedss.data.decoding import decode
from fedss.data.folder import read_folder
from fedss.data.manifest import ListedImage, Listing
from fedss.data.names import composed
from fedss.data.splits import arrange, lot
from fedss.errors import DataError
from fedss.inference.embedding import list_images
from fedss.training.build import evaluation_task
from fedss.training.summary import describe
from tests import reference
from tests.reference import tiny_backbone, tiny_dataset


def make_image(seed, size=(20, 20), mode="RGB"):
    depth = () if mode == "L" else (3,)
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], *depth), np.uint8)
    return Image.fromarray(noise)


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def write_csv(root, lines, header="image,label,client,split"):
    path = root / "images.csv"
    path.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def root(tmp_path):
    """Nine images p0.png to p8.png, in colour."""
    for i in range(9):
        save(tmp_path / f"p{i}.png", make_image(i))
    return tmp_path


GOOD = [
    "p0.png,cat,ann,train",
    "p1.png,dog,ann,train",
    "p2.png,cat,bob,train",
    "p3.png,fox,bob,test",
    "p4.png,fox,ann,test",
    "p5.png,owl,cid,test",
    "p6.png,owl,cid,test",
]


def load(path, **options):
    return load_dataset("csv", path, image_size=8, cache=path.parent / "cache", **options)


def load_folder(path, tmp_path):
    return load_dataset("folder", path, image_size=8, cache=tmp_path / "cache")


def same(left, right):
    queries = [data.test and data.test.query for data in (left, right)]
    for a, b in ((left.train, right.train), queries):
        assert (a is None) == (b is None)
        assert a is None or np.array_equal(a.pixels, b.pixels)
    assert data_fingerprint(left) == data_fingerprint(right)
    return True


# A CSV, line by line


def test_csv(root):
    data = load(write_csv(root, GOOD))
    train, test = data.train, data.test.query
    assert train.class_names == ["cat", "dog"]
    assert train.client_names == ["ann", "bob"]
    assert train.names == ["p0.png", "p1.png", "p2.png"]
    assert train.labels.tolist() == [0, 1, 0]
    assert train.clients.tolist() == [0, 0, 1]
    assert train.labels.dtype == train.clients.dtype == np.int64
    assert test.class_names == ["fox", "owl"]
    assert test.names == ["p4.png", "p3.png", "p5.png", "p6.png"]
    assert data.test.gallery is None
    assert data.validation is None
    assert data.skipped == ()
    assert isinstance(train.pixels, np.memmap)
    assert not train.pixels.flags.writeable
    for images in (train, test):
        for name, pixels in zip(images.names, images.pixels, strict=True):
            with Image.open(root / name) as image:
                expected = np.asarray(image.resize((8, 8), Image.Resampling.BILINEAR))
            assert np.array_equal(pixels.transpose(1, 2, 0), expected)


def test_query_and_gallery_number_classes_alike(root):
    lines = ["p0.png,cat,ann,train", "p1.png,owl,bob,query", "p2.png,owl,cid,gallery"]
    data = load(write_csv(root, [*lines, "p3.png,bat,cid,gallery"]))
    query, gallery = data.test.query, data.test.gallery
    assert query.class_names == gallery.class_names == ["bat", "owl"]
    assert query.labels.tolist() == [1]
    assert gallery.labels.tolist() == [0, 1]


def test_validation_split(root):
    lines = ["p7.png,elk,ann,validation", "p8.png,elk,bob,validation"]
    data = load(write_csv(root, GOOD + lines))
    assert data.validation.query.names == ["p7.png", "p8.png"]


def test_absolute_paths_byte_order_mark_blank_lines_and_spaces(root):
    lines = [line.replace("p0.png", str(root / "p0.png")) for line in GOOD]
    lines[3:3] = ["", " , , , "]
    lines[1] = lines[1].replace(",", " , ")
    plain = load(write_csv(root, GOOD))
    path = write_csv(root, lines)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert same(load(path), plain)


@settings(
    max_examples=20,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(order=st.permutations(range(9)))
def test_the_order_of_lines_does_not_matter(root, order):
    lines = [f"p{i}.png,class{i % 4},client{i % 3}" for i in range(9)]
    expected = load(write_csv(root, lines, "image,label,client"))
    shuffled = write_csv(root, [lines[i] for i in order], "image,label,client")
    assert same(load(shuffled), expected)


# Which classes are held out


def lots(labels, seed):
    """Each class's number from 0 to 1, as the rule says it."""
    digest = {label: hashlib.sha256(f"{seed}:{label}".encode()).hexdigest() for label in labels}
    return {label: int(digest[label], 16) / 16**64 for label in labels}


def unsplit(labels):
    """A listing, without a column split, of one image per label."""
    rows = [ListedImage("x", label, f"p{i}.png", None, i + 2) for i, label in enumerate(labels)]
    return Listing(Path("some.csv"), "", rows)


def sides(listing, share, seed, at_site):
    """Classes trained on, tested, and held out though they cannot be tested."""
    splits, unpaired = arrange(listing, share, seed, at_site=at_site)
    assert splits.keys() <= {"train", "test"}
    parts = (splits["train"], splits.get("test", []), unpaired)
    # Every image is somewhere, once.
    assert sorted(row for part in parts for row in part) == sorted(listing.rows)
    return tuple({row.label for row in part} for part in parts)


LABELS = st.lists(st.sampled_from("abcdefghij"), min_size=1, max_size=16)
SHARES = st.sampled_from([0.0, 0.1, 0.2, 0.5, 0.9, 0.999])


@given(LABELS, SHARES, st.integers(0, 99))
def test_a_class_is_held_out_if_its_lot_is_below_the_share(labels, share, seed):
    lot_of, count = lots(set(labels), seed), Counter(labels)
    assert all(lot(seed, label) == pytest.approx(lot_of[label], rel=1e-15) for label in count)
    below = {label for label in count if lot_of[label] < share}
    paired = {label for label in below if count[label] > 1}
    expected = (set(count) - below, paired, below - paired)
    if expected[0]:
        assert sides(unsplit(labels), share, seed, at_site=True) == expected
        if paired or share == 0:
            assert sides(unsplit(labels), share, seed, at_site=False) == expected
    else:
        with pytest.raises(
            DataError, match=rf"its classes \({len(count)}\) .* test_classes = {share}"
        ):
            sides(unsplit(labels), share, seed, at_site=True)


@given(LABELS, SHARES, st.integers(0, 99))
def test_one_machine_always_trains_on_a_class_and_tests_one(labels, share, seed):
    lot_of, count = lots(set(labels), seed), Counter(labels)
    two = [label for label in count if count[label] > 1]
    if share == 0:
        assert sides(unsplit(labels), share, seed, at_site=False) == (set(count), set(), set())
        return
    if len(count) < 2 or not two:
        with pytest.raises(DataError, match=f"cannot hold out .*got {len(count)} .* {len(two)} of"):
            arrange(unsplit(labels), share, seed, at_site=False)
        return
    trained, tested, alone = sides(unsplit(labels), share, seed, at_site=False)
    assert trained
    assert min(two, key=lot_of.get) in tested
    assert trained.isdisjoint(tested | alone)
    # At most one class is forced onto each side, and it is the next one.
    below = {label for label in count if lot_of[label] < share}
    assert tested | alone <= below | {min(two, key=lot_of.get)}
    if forced := trained & below:
        assert forced == {max(below - {min(two, key=lot_of.get)}, key=lot_of.get)} == trained


@given(LABELS, LABELS, SHARES, st.integers(0, 99))
def test_a_class_stays_on_its_side_however_the_data_grows(labels, more, share, seed):
    with suppress(DataError):
        trained, tested, alone = sides(unsplit(labels), share, seed, at_site=True)
        grown = sides(unsplit(labels + more), share, seed, at_site=True)
        assert trained <= grown[0]
        assert tested <= grown[1]
        assert alone <= grown[1] | grown[2]


def test_the_share_of_many_classes_is_the_one_asked_for():
    labels = [f"class {i}" for i in range(10_000)]
    below = [sum(lot(seed, label) < 0.2 for label in labels) for seed in range(5)]
    assert len(set(below)) == 5
    # Five standard deviations of a binomial.
    assert all(abs(count - 2000) < 200 for count in below)


def test_a_folder_s_name_that_is_no_utf8_has_a_lot():
    assert 0 < lot(0, os.fsdecode(b"caf\xe9")) < 1


@st.composite
def federations(draw):
    """Rows of a listing, some with a column split, and the site of each client."""
    tasks = [("train", "train", "test", "validation"), ("train", "train", "query", "gallery")]
    split = st.sampled_from(draw(st.sampled_from([(None,), *tasks])))
    row = st.tuples(st.sampled_from("abcdef"), st.integers(0, 4), split)
    rows = draw(st.lists(row, min_size=1, max_size=9))
    return rows, draw(st.lists(st.integers(0, 2), min_size=5, max_size=5))


def listed(root, rows):
    column = rows[0][1][2] is not None
    lines = [
        f"p{i}.png,{label},client {client}" + (f",{split}" if column else "")
        for i, (label, client, split) in rows
    ]
    return write_csv(root, lines, "image,label,client" + (",split" if column else ""))


def contents(images):
    """For each client what it holds, in order: file, class and pixels."""
    held = defaultdict(list)
    if images is not None:
        for name, label, client, pixels in zip(
            images.names, images.labels, images.clients, images.pixels, strict=True
        ):
            image = (name, images.class_names[label], pixels.tobytes())
            held[images.client_names[client]].append(image)
    return held


def parts_of(data):
    """What is in each part of a data set, and that every image is in one at most."""
    tasks = [data.test, data.validation]
    images = [data.train, *(t and t.query for t in tasks), data.test and data.test.gallery]
    held = [contents(i) for i in images]
    names = [p[0] for part in held for images in part.values() for p in images]
    assert len(set(names) | set(data.unpaired)) == len(names) + len(data.unpaired)
    return held, {*names, *data.unpaired}


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(federations(), SHARES, st.integers(0, 5))
def test_sites_together_hold_what_one_machine_would(root, federation, share, seed):
    drawn, site_of = federation
    rows = list(enumerate(drawn))
    lot_of = lots("abcdef", seed)
    options = {"test_classes": share, "seed": seed}

    def at_site(own):
        """What a site with these rows loads; None if it has nothing to train on."""
        if any(lot_of[label] >= share if s is None else s == "train" for _, (label, _, s) in own):
            return load(listed(root, own), **options, at_site=True)
        with pytest.raises(DataError, match=r"no training images|nothing to train on"):
            load(listed(root, own), **options, at_site=True)
        return None

    whole = at_site(rows)
    expected = parts_of(whole)[0] if whole else [{}, {}, {}, {}]
    trained = {}
    for site in range(3):
        own = [row for row in rows if site_of[row[1][1]] == site]
        data = at_site(own) if own else None
        if data is None:
            continue
        held, names = parts_of(data)
        assert names == {f"p{i}.png" for i, _ in own}
        assert trained.keys().isdisjoint(held[0])
        trained |= held[0]
        for here, there in zip(held[1:], expected[1:], strict=True):
            # What is tested at a site is what one machine would test, but for images that have
            # no other one of their class at the site.
            for client, images in here.items():
                assert images == [p for p in there[client] if p[0] not in data.unpaired]
        labels = {f"p{i}.png": (label, split) for i, (label, _, split) in own}
        for name in data.unpaired:
            label, split = labels[name]
            others = [labels[n] for n in labels if n != name]
            if split == "query":
                assert (label, "gallery") not in others
            elif split == "gallery":
                assert data.test is None
            else:
                assert (label, split) not in others
    assert trained == expected[0]

    # Where nothing was forced, one machine agrees with a site that holds all.
    if whole and drawn[0][2] is None and (whole.test or share == 0):
        assert same(load(listed(root, rows), **options), whole)


def test_a_site_s_split_is_the_last_word(root):
    """Another site may hold the test."""
    path = write_csv(root, [line for line in GOOD if line.endswith("train")])
    data = load(path, test_classes=0.9, at_site=True)
    assert len(data.train) == 3
    assert data.test is None
    assert data.unpaired == ()
    lines = ["p0.png,a,x,train", "p1.png,b,x,query", "p2.png,c,x,query", "p3.png,c,x,gallery"]
    data = load(write_csv(root, lines), at_site=True)
    assert data.test.query.names == ["p2.png"]
    assert data.unpaired == ("p1.png",)
    for alone in (lines[1:3], lines[3:]):
        data = load(write_csv(root, [lines[0], *alone]), at_site=True)
        assert data.test is None
        assert set(data.unpaired) == {line.split(",")[0] for line in alone}


def test_data_without_a_test(root):
    path = write_csv(root, [f"p{i}.png,{label},x" for i, label in enumerate("aabb")])
    path.write_text(path.read_text().replace(",split", ""))
    data = load(path, test_classes=0)
    assert data.test is None
    assert len(data.train) == 4
    assert seen_classes(data) == 0
    config = Config(data="csv", test_classes=0, sample_size=2)
    facts = describe(config, data)
    assert facts["test_queries"] == facts["test_classes"] == facts["test_classes_seen"] == 0
    assert facts["test_gallery"] is None
    message = "nothing to evaluate: data set 'csv' has no test images.*it is 0"
    with pytest.raises(DataError, match=message):
        evaluation_task(config, data)
    with pytest.raises(DataError, match=message):
        train(config, root / "run", data=data)


def test_images_that_are_alone_in_a_held_out_class_are_named(root):
    labels = "aabbccdefg"
    low = lots(labels, 0)
    share = sorted(low.values())[5]
    held = {label for label in low if low[label] < share}
    lines = [f"p{i}.png,{label},x" for i, label in enumerate(labels[:9])]
    data = load(write_csv(root, lines, "image,label,client"), test_classes=share)
    expected = [f"p{labels.index(label)}.png" for label in sorted(held & set("def"))]
    assert expected
    assert list(data.unpaired) == expected
    assert describe(Config(data="csv"), data)["unpaired_pictures"] == len(expected)


def test_only_train_and_validation_rows_still_hold_out_a_test(root):
    lines = [f"p{i}.png,{label},x,train" for i, label in enumerate("aabbcc")]
    lines += ["p6.png,v,x,validation", "p7.png,v,x,validation"]
    data = load(write_csv(root, lines))
    assert len(data.test.query.class_names) == 1
    assert data.validation.query.class_names == ["v"]


@pytest.mark.parametrize(
    ("header", "lines", "message"),
    [
        ("image,labels,client", [], r"line 1: .*missing: label; found: image, labels, client; "
         r"is 'labels' meant as 'label'\?"),
        ("Image,label,client", [], "is 'Image' meant as 'image'"),
        ("image;label;client", [], "missing: image, label, client.*separate .* with commas"),
        ("image,label,client", [], "no images"),
        ("", [], "empty; expected a header line"),
        (None, ["p0.png,,ann,train"], "line 2: empty label"),
        (None, ["p0.png,cat,ann,train", "p1.png,cat, ,train"], "line 3: empty client"),
        (None, [",cat,ann,train"], "line 2: empty image"),
        (None, ["p0.png,cat"], "line 2: empty client"),
        (None, ["p0.png,cat,ann,trian"], r"line 2: .*one of train.*got 'trian'; is 'train' meant"),
        (None, ["p0.png,cat,ann,"], "line 2: .*got ''"),
        (None, ["p0.png,cat,ann,train,x"], "line 2: expected 4 cells, got 5; .*double quotes"),
        (None, ["p0.png,cat,ann,train", "", "./p0.png,dog,bob,train"],
         "line 4: p0.png is listed already in line 2"),
        (None, ["p0.png,a,x,train", "./p0.png,b,x,train"],
         "line 3: p0.png is listed already in line 2"),
        (None, ["q.png,cat,ann,train", *GOOD], r"line 2: no such image file: .*q\.png \(1 of 8"),
        (None, [*GOOD, "p7.png,elk,ann,test"], "line 9, split 'test': class 'elk' has a single "
         "image .*add a second"),
        (None, [*GOOD, "p7.png,elk,ann,validation"],
         "line 9, split 'validation': class 'elk' has a single"),
        (None, [*GOOD, "p7.png,elk,ann,query"], "both 'test' and 'query' rows"),
        (None, ["p0.png,a,x,train", "p1.png,b,x,query"], "'query' rows but no 'gallery' rows"),
        (None, ["p0.png,a,x,train", "p1.png,b,x,gallery"], "'gallery' rows but no 'query' rows"),
        (None, ["p0.png,a,x,train", "p1.png,b,x,gallery", "p2.png,c,x,query"],
         "line 4, split 'query': class 'c' is not in the gallery"),
        ("image,label,client", ["p0.png,a,x", "p1.png,a,x"], "cannot hold out .*got 1 class,"),
        ("image,label,client", ["p0.png,a,x", "p1.png,b,x"], "cannot hold out .*0 of them"),
    ],
)  # fmt: skip
def test_each_mistake_in_a_csv_is_named(root, header, lines, message):
    path = write_csv(root, lines, "image,label,client,split" if header is None else header)
    with pytest.raises(DataError, match=message):
        load(path)


def test_mistakes_about_the_file_itself(root):
    with pytest.raises(DataError, match=r"none\.csv: expected a CSV file .*No such file"):
        load_dataset("csv", root / "none.csv")
    path = root / "latin.csv"
    path.write_bytes("image,label,client\np0.png,café,ann\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"expected text in UTF-8, got byte 0xe9 .*Save"):
        load(path)
    empty = root / "empty.csv"
    empty.write_bytes(b"")
    with pytest.raises(DataError, match="empty"):
        load(empty)


def test_mistakes_in_the_settings(root):
    path = write_csv(root, ["p0.png,a,x", "p1.png,a,x", "p2.png,b,x"], "image,label,client")
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(DataError, match=f"test_classes.*below 1, got {share}"):
            load(path, test_classes=share)
    with pytest.raises(DataError, match=r"channels: expected 1 .* or 3 .*, got 4"):
        load(path, channels=4)
    with pytest.raises(DataError, match="image_size: expected at least 1, got 0"):
        load_dataset("csv", path, image_size=0)


# Broken images


def bomb():
    """A PNG of a few bytes that claims ten thousand million pixels."""

    def chunk(kind, content):
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    size = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("default")
def test_broken_images_are_all_counted_and_can_be_left_out(root):
    lines = [f"p{i}.png,{label},x" for i, label in enumerate("aabbccdde")]
    path = write_csv(root, lines, "image,label,client")
    whole = (root / "p0.png").read_bytes()
    (root / "p0.png").write_bytes(whole[: len(whole) // 2])
    (root / "p2.png").write_text("not an image")
    (root / "p4.png").write_bytes(b"")
    (root / "p6.png").write_bytes(bomb())
    message = r"4 of 9 images cannot be read: .*p0\.png .*p2\.png .*p4\.png .*p6\.png .*skip_brok"
    with pytest.raises(DataError, match=message) as caught:
        load(path)
    assert "above the limit of 134,217,728" in str(caught.value)

    (root / "p8.png").unlink()
    with pytest.raises(DataError, match="1 of 9 are missing"):
        load(path)
    save(root / "q.png", make_image(99))
    path = write_csv(root, [*lines, "q.png,a,x"], "image,label,client")
    kept = write_csv(root, [lines[i] for i in (1, 3, 5, 7)] + ["q.png,a,x"], "image,label,client")
    expected = load(kept)
    path = write_csv(root, [*lines, "q.png,a,x"], "image,label,client")
    for _ in range(2):
        data = load(path, skip_broken=True)
        assert same(data, expected)
        assert data.skipped == ("p0.png", "p2.png", "p4.png", "p6.png", "p8.png")
    # A mended image is another file.
    (root / "p0.png").write_bytes(whole)
    assert "p0.png" not in load(path, skip_broken=True).skipped


def test_nothing_readable(root):
    (root / "p0.png").write_text("x")
    (root / "p1.png").write_text("x")
    path = write_csv(root, ["p0.png,a,x", "p1.png,b,x", "p0b.png,a,x"], "image,label,client")
    (root / "p0b.png").write_text("x")
    with pytest.raises(DataError, match="none of the 3 images"):
        load(path, skip_broken=True)
    path = write_csv(root, ["u.png,a,x,test", "v.png,a,x,train"])
    with pytest.raises(DataError, match="none of the 2 images"):
        load(path, skip_broken=True)


# Decoding


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "gif", "tiff"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", [(30, 30), (40, 31), (13, 50)])
def test_decode_is_what_pillow_decodes(tmp_path, suffix, mode, size):
    path = tmp_path / f"p.{suffix}"
    save(path, make_image(7, size, mode))
    for channels, wanted in ((1, "L"), (3, "RGB")):
        with Image.open(path) as image:
            # Independently of ImageOps.fit: the central square of the shorter side.
            side, (w, h) = min(size), size
            box = ((w - side) / 2, (h - side) / 2, (w + side) / 2, (h + side) / 2)
            square = image.convert(wanted).resize((24, 24), Image.Resampling.BILINEAR, box)
        expected = np.asarray(square).reshape(24, 24, channels).transpose(2, 0, 1)
        got = decode(path, 24, channels)
        assert got.dtype == np.uint8
        assert np.array_equal(got, expected)


def test_a_large_jpeg_decodes_at_a_fraction_of_its_size_to_nearly_the_same(tmp_path):
    smooth = make_image(1, (8, 6)).resize((800, 600), Image.Resampling.BICUBIC)
    save(tmp_path / "p.jpg", smooth, quality=95)
    expected = np.asarray(ImageOps.fit(smooth, (32, 32), Image.Resampling.BILINEAR))
    got = decode(tmp_path / "p.jpg", 32, 3).transpose(1, 2, 0)
    assert np.abs(got.astype(int) - expected).mean() < 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_cameras_rotation_is_undone(tmp_path, orientation):
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # as numbered by Image.Transpose
    stored = make_image(5, (16, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    save(tmp_path / "p.png", stored, exif=exif)
    upright = stored.transpose(undo[orientation]) if orientation > 1 else stored
    assert np.array_equal(decode(tmp_path / "p.png", 16, 3).transpose(1, 2, 0), upright)


def test_transparency_is_laid_on_white(tmp_path):
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[:2, :, 3] = 255
    save(tmp_path / "p.png", Image.fromarray(pixels))
    got = decode(tmp_path / "p.png", 4, 3)
    assert (got[:, :2] == 0).all()
    assert (got[:, 2:] == 255).all()
    palette = Image.fromarray(np.tile(np.array([0, 1], np.uint8), (4, 2))).convert("P")
    palette.putpalette([255, 0, 0, 0, 0, 255])
    save(tmp_path / "q.gif", palette, transparency=1)
    got = decode(tmp_path / "q.gif", 4, 3).transpose(1, 2, 0)
    assert got[0, :2].tolist() == [[255, 0, 0], [255, 255, 255]]


def test_sixteen_bits_black_and_white_and_cmyk(tmp_path):
    wide = np.array([[0, 255, 256], [32768, 40000, 65535], [1, 2, 3]], np.uint16)
    save(tmp_path / "wide.png", Image.fromarray(wide))
    assert np.array_equal(decode(tmp_path / "wide.png", 3, 1)[0], wide // 256)
    save(tmp_path / "bits.png", Image.fromarray(wide > 255).convert("1"))
    assert np.array_equal(decode(tmp_path / "bits.png", 3, 1)[0], 255 * (wide > 255))
    save(tmp_path / "ink.tiff", Image.new("CMYK", (3, 3), (0, 255, 255, 0)))
    red = decode(tmp_path / "ink.tiff", 3, 3)[:, 0, 0].astype(int)
    assert red[0] > 200
    assert max(red[1:]) < 60
    save(tmp_path / "float.tiff", Image.fromarray(np.ones((3, 3), np.float32)))
    with pytest.raises(ValueError, match="no known range"):
        decode(tmp_path / "float.tiff", 3, 1)


def test_channels_are_one_if_every_image_is_gray(root):
    for i in range(7):
        save(root / f"p{i}.png", make_image(i, mode="L"))
    path = write_csv(root, GOOD)
    for _ in range(2):
        assert load(path).train.pixels.shape == (3, 1, 8, 8)
    assert load(path, channels=3).train.pixels.shape == (3, 3, 8, 8)
    save(root / "p6.png", make_image(6))
    assert load(path).train.pixels.shape == (3, 3, 8, 8)
    assert load(path, channels=1).train.pixels.shape == (3, 1, 8, 8)


# The cache


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


# Folders


@pytest.fixture
def folders(tmp_path):
    root = tmp_path / "root"
    for i, (client, label) in enumerate(
        [("ann", "cat"), ("ann", "cat"), ("ann", "dog"), ("bob", "dog"), ("bob", "fox")]
    ):
        suffix = ["png", "JPG", "webp"][i % 3]
        save(root / client / label / f"{i}.{suffix}", make_image(i, (10 + i, 12)))
    (root / "ann" / "cat" / "notes.txt").write_text("not an image")
    (root / "ann" / "cat" / ".hidden.png").write_text("not an image")
    (root / ".git").mkdir()
    return root


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


# Omniglot


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


@pytest.fixture
def small_omniglot(tmp_path):
    """Two background and eight evaluation alphabets, of two characters by three drawers."""
    place = tmp_path / "place"
    place.mkdir()
    number = 0
    for name, alphabets in (("images_background", 2), ("images_evaluation", 8)):
        with zipfile.ZipFile(place / f"{name}.zip", "w") as pack:
            for alphabet in range(alphabets):
                for character in (1, 2):
                    number += 1
                    for drawer in (1, 2, 3):
                        inner = (
                            f"{name}/Alphabet_{alphabet}/character{character:02d}/"
                            f"{number:04d}_{drawer:02d}.png"
                        )
                        image = make_image(number * 10 + drawer, (35, 35), "L").convert("1")
                        file = tmp_path / "unpacked" / inner
                        save(file, image)
                        pack.write(file, inner)
    return place, tmp_path / "unpacked"


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


# By name


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
        (
            ("zzz",),
            {},
            "expected one of glyphs, omniglot, csv, folder, landmarks-user-160k.*100$",
        ),
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


# Names by the million


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


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6)), max_size=40),
    st.integers(0, 3),
)
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


# In memory


def in_memory(labels, names=None, /, **changes):
    """Images with these labels, for class names c0, c1 and so on; each at its own client."""
    count = len(labels)
    names = names or [f"c{i}" for i in range(max(labels, default=0) + 1)]
    fields = {
        "pixels": np.random.default_rng(count).integers(0, 256, (count, 1, 4, 4), np.uint8),
        "labels": np.array(labels, np.int64),
        "clients": np.arange(count),
        "class_names": names,
        "client_names": [f"client{i}" for i in range(count)],
        "names": [f"{i}.png" for i in range(count)],
    }
    return Images(**{**fields, **changes})


def whole():
    tasks = [RetrievalTask(in_memory([0, 0, 1, 1]), in_memory([1, 0, 1])) for _ in range(2)]
    return Dataset("mine", in_memory([0, 1]), *tasks)


@pytest.mark.parametrize("part", ["train", "test.query", "test.gallery", "validation.gallery"])
@pytest.mark.parametrize(
    "field", ["pixels", "labels", "clients", "class_names", "client_names", "names"]
)
def test_the_fingerprint_covers_every_part(part, field):
    data = whole()
    assert data_fingerprint(data) == data_fingerprint(whole())
    outer, _, inner = part.partition(".")
    images = getattr(getattr(data, outer), inner) if inner else data.train
    value = getattr(images, field)
    if field in ("labels", "clients"):
        changed = value.copy()
        changed[-1] = 0
    elif field == "pixels":
        changed = 255 - value
    else:
        changed = [f"other {name}" for name in value]
    other = dataclasses.replace(images, **{field: changed})
    if field == "class_names" and outer != "train":
        # Queries are matched by name, so both change theirs.
        task = getattr(data, outer)
        pair = [dataclasses.replace(i, class_names=changed) for i in (task.query, task.gallery)]
        other = RetrievalTask(*pair)
    elif inner:
        other = dataclasses.replace(getattr(data, outer), **{inner: other})
    assert data_fingerprint(dataclasses.replace(data, **{outer: other})) != data_fingerprint(data)


def test_the_fingerprint_tells_which_part_is_missing():
    data = whole()
    alone = dataclasses.replace(data, validation=None)
    task = RetrievalTask(data.test.query)
    found = [data, alone, dataclasses.replace(alone, test=task)]
    found.append(dataclasses.replace(found[-1], validation=task))
    assert len({data_fingerprint(d) for d in found}) == 4
    assert data_fingerprint(dataclasses.replace(data, name="else")) == data_fingerprint(data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pixels": np.zeros((2, 1, 4, 4), np.float32)}, r"got float32 \[2, 1, 4, 4\]"),
        ({"pixels": np.zeros((2, 4, 4), np.uint8)}, r"uint8 \[N, C, H, W\], got uint8 \[2, 4, 4\]"),
        ({"pixels": [[0]]}, "expected a numpy array, .* got a list"),
        ({"pixels": np.zeros((2, 4, 4, 3), np.uint8)}, r"1 or 3 channels.* got \[2, 4, 4, 3\]"),
        ({"pixels": np.zeros((2, 1, 4, 5), np.uint8)}, "square images"),
        ({"labels": np.array([0, 2])}, "labels: expected numbers from 0 to 1, got 0 to 2"),
        ({"labels": np.array([-1, 0])}, "labels: expected numbers from 0 to 1, got -1 to 0"),
        (
            {"labels": np.array([0.0, 1.0])},
            r"labels: expected .*int64 \[N\], got float64 \[2\]; conv",
        ),
        ({"labels": [0, 1]}, "labels: expected a numpy array, .*got a list"),
        ({"labels": np.array([[0], [1]])}, r"got int64 \[2, 1\]"),
        ({"labels": np.array([0])}, "labels: expected 2 values, one per image, got 1"),
        ({"clients": np.array([0, 9])}, "clients: expected numbers from 0 to 1"),
        ({"clients": np.array([0, 1], np.int32)}, "clients: .*got int32"),
        ({"names": ["a"]}, "names: expected 2 values"),
        ({"class_names": ["a", "a"]}, "class_names: 'a' occurs 2 times"),
    ],
)
def test_images_that_do_not_fit_together_are_refused(changes, message):
    with pytest.raises(DataError, match=message):
        in_memory([0, 1], **changes)


def test_queries_that_nothing_could_match_are_refused():
    with pytest.raises(DataError, match=r"'2\.png': class 'c1' has a single image .*add a second"):
        RetrievalTask(in_memory([0, 0, 1]))
    with pytest.raises(DataError, match=r"'0\.png': class 'a' is not in the gallery"):
        RetrievalTask(in_memory([0, 1], ["a", "b"]), in_memory([0, 1], ["b", "c"]))
    with pytest.raises(DataError, match="without query images"):
        RetrievalTask(in_memory([]))
    # By name, not by number; and names that no image has do not count.
    RetrievalTask(in_memory([0, 0], ["a", "b"]), in_memory([1], ["b", "a"]))
    with pytest.raises(DataError, match="not in the gallery"):
        RetrievalTask(in_memory([0, 0], ["a", "b"]), in_memory([0], ["b", "a"]))


def test_parts_of_different_shapes_or_without_training_images_are_refused():
    data, wide = whole(), np.zeros((2, 3, 4, 4), np.uint8)
    with pytest.raises(DataError, match="'mine' has no training images"):
        dataclasses.replace(data, train=in_memory([]), test=None, validation=None)
    message = r"one shape .* train \[3, 4, 4\], test \[1, 4, 4\], validation \[1, 4, 4\]"
    with pytest.raises(DataError, match=message):
        dataclasses.replace(data, train=in_memory([0, 1], pixels=wide))
    with pytest.raises(DataError, match=r"query \[1, 4, 4\], gallery \[3, 4, 4\]"):
        RetrievalTask(in_memory([0, 1]), in_memory([0, 1], pixels=wide))


def test_seen_classes_are_counted_by_name():
    query = RetrievalTask(in_memory([0, 0, 1, 1], ["b", "c", "d"]))
    for names, seen in ((["a", "b"], 1), (["x", "y"], 0), (["c", "b"], 2), (["a", "d"], 0)):
        assert seen_classes(Dataset("mine", in_memory([0, 1], names), query)) == seen
    # Names that no image has do not count.
    assert seen_classes(Dataset("mine", in_memory([0], ["a", "b"]), query)) == 0
    assert seen_classes(reference.tiny_dataset()) == 0


def test_split_clients_keeps_images_and_bounds_classes():
    images = tiny_dataset(num_classes=12, num_clients=6).train
    split = split_clients(images, 2, seed=0)
    assert count_own_classes(split).max() == 2
    assert count_own_classes(split).min() >= 1
    assert split.pixels is images.pixels
    assert np.array_equal(split.labels, images.labels)
    parents = [split.client_names[c].split(" part ")[0] for c in split.clients]
    assert parents == [images.client_names[c] for c in images.clients]
    # A class of a client stays whole, and parts are even.
    before = {(c, label) for c, label in zip(images.clients, images.labels, strict=True)}
    after = {(c, label) for c, label in zip(split.clients, split.labels, strict=True)}
    assert len(before) == len(after)
    assert np.array_equal(split_clients(images, 2, seed=0).clients, split.clients)
    assert not np.array_equal(split_clients(images, 2, seed=1).clients, split.clients)
    same = split_clients(images, 99, seed=0)
    assert np.array_equal(same.clients, images.clients)
    assert list(same.client_names) == list(images.client_names)


def test_rotations_are_classes_and_clients_of_their_own():
    images = tiny_dataset().train
    turned = rotate_classes(images)
    n, k, count = len(images.class_names), len(images.client_names), len(images)
    assert [len(turned.class_names), len(turned.client_names)] == [4 * n, 4 * k]
    assert len(turned) == 4 * count
    for turns in range(4):
        part = slice(turns * count, (turns + 1) * count)
        assert np.array_equal(turned.labels[part], images.labels + turns * n)
        assert np.array_equal(turned.clients[part], images.clients + turns * k)
        expected = torch.rot90(torch.from_numpy(images.pixels[5]), turns, (1, 2))
        assert np.array_equal(turned.pixels[turns * count + 5], expected.numpy())


def test_images_that_the_disk_has_no_room_for_are_not_drawn(tmp_path, monkeypatch):
    def batches():
        raise AssertionError("drawn all the same")
        yield

    free = shutil.disk_usage(tmp_path)._replace(free=5_000)
    monkeypatch.setattr("fedss.data.cache.shutil.disk_usage", lambda path: free)
    with pytest.raises(DataError, match=r"100 images of 8 x 8 pixels take .*--image-size"):
        cached_array(("k",), (100, 1, 8, 8), batches(), cache=tmp_path, title="glyphs")
    assert not list(tmp_path.iterdir())
