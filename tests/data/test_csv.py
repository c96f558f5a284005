"""A CSV is read line by line, and each mistake in it has its message."""

import struct
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from fedss.config import Config
from fedss.data import load_dataset
from fedss.errors import ConfigError, DataError
from tests.data.made import GOOD, load, make_image, same, save, write_csv


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


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations(range(9)))
def test_the_order_of_lines_does_not_matter(root, order):
    lines = [f"p{i}.png,class{i % 4},client{i % 3}" for i in range(9)]
    expected = load(write_csv(root, lines, "image,label,client"))
    shuffled = write_csv(root, [lines[i] for i in order], "image,label,client")
    assert same(load(shuffled), expected)


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


def test_without_a_column_of_clients_a_partition_deals_the_images(root):
    lines = [f"p{i}.png,{'abc'[i % 3]}" for i in range(9)]
    with_clients = write_csv(root, [f"{line},nobody" for line in lines], "image,label,client")
    expected = load(with_clients, partition="classes:1", partition_clients=2)
    path = write_csv(root, lines, "image,label")
    assert same(load(path, partition="classes:1", partition_clients=2), expected)
    with pytest.raises(DataError, match=r"missing: client; .*a partition deals .*--partition"):
        load(path)
    path = write_csv(root, [*lines, "p9.png,a,"], "image,label,client")
    with pytest.raises(DataError, match="line 2: empty client"):
        load(path, partition="class")


def test_columns_may_be_called_otherwise(root):
    expected = load(write_csv(root, GOOD))
    how = {"columns": "image=path, label=species,client=Phone,split=for"}
    path = write_csv(root, GOOD, "path,species,Phone,for")
    assert same(load(path, **how), expected)
    rotated = [",".join([line.split(",")[1], line]) for line in GOOD]
    # A column with the name of one that is called otherwise is not read, and that is said.
    data = load(write_csv(root, rotated, "image,path,label,client,split"), columns="image=path")
    assert same(data, expected)
    assert data.remarks == ("columns not read: image of the file",)
    with pytest.raises(DataError, match=r"one column 'file', as columns says image=file"):
        load(write_csv(root, GOOD, "path,species,Phone,for"), columns="image=file")
    with pytest.raises(DataError, match="expected one column 'x'"):
        load(write_csv(root, GOOD, "x,x,label,client"), columns="image=x")
    with pytest.raises(DataError, match="columns: folder is no CSV"):
        load_dataset("folder", root, columns="image=x")


@pytest.mark.parametrize(
    "text", ["", "image", "image=", "picture=x", "image=a,image=b", "image=a,label=a", "image=a,"]
)
def test_columns_that_cannot_be_are_refused(root, text):
    with pytest.raises(ConfigError, match="columns: expected"):
        load(write_csv(root, GOOD), columns=text)
    with pytest.raises(ConfigError, match="columns: expected"):
        Config(columns=text)
