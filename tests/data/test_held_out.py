"""Which classes are held out, on one machine and at each site."""

import os
from collections import Counter, defaultdict
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedss import Config, train
from fedss.data import seen_classes
from fedss.data.manifest import ListedImage, Listing
from fedss.data.splits import arrange, lot
from fedss.errors import DataError
from fedss.training.build import evaluation_task
from fedss.training.summary import describe
from tests.data.made import GOOD, load, lots, same, write_csv


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
        for actual, wanted in zip(held[1:], expected[1:], strict=True):
            # What is tested at a site is what one machine would test, but for images that have
            # no other one of their class at the site.
            for client, images in actual.items():
                assert images == [p for p in wanted[client] if p[0] not in data.unpaired]
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
    about = describe(config, data)
    assert about["test_queries"] == about["test_classes"] == about["test_classes_seen"] == 0
    assert about["test_gallery"] is None
    message = "nothing to evaluate: data set 'csv' has no test images.*it is 0"
    with pytest.raises(DataError, match=message):
        evaluation_task(config, data)
    with pytest.raises(DataError, match=message):
        train(Config(data="csv", sample_size=2), root / "run", data=data)


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
