"""Files as they come: for each rule of docs/image-files.md what is read, or what is said."""

import io
import json
import os
import struct
import sys
import tempfile
import threading
import time
import unicodedata
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from fedss.cli import main
from fedss.data import decoding, load_dataset
from fedss.data.decoding import MAX_PIXELS, decode, open_image, quiet_pillow
from fedss.errors import ConfigError, DataError
from fedss.inference.embedding import embed_files, list_images
from fedss.models import build_embedder, load_embedder, save_embedder
from fedss.search import build_collection


def noise(seed, size=(24, 20), channels=3):
    depth = (channels,) if channels > 1 else ()
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (size[1], size[0], *depth), np.uint8)
    )


def save(path, image, *arguments, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, *arguments, **options)
    return path


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def read(content, size=16, channels=3):
    return decode(io.BytesIO(content), size, channels)


def png(width, height, depth, colour, lines, before=b""):
    """A PNG written by hand: Pillow writes no 16 bits in colour, and no false promises."""

    def chunk(kind, content):
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    size = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(lines, 1))
    header = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + before
    return header + pixels + chunk(b"IEND", b"")


# Rotation


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_rotated_photograph_is_read_upright(kind, orientation):
    turned = np.arange(36).reshape(6, 6)
    # What each number means is that row 0 and column 0 of what is stored are these sides of what
    # is to be seen (Exif 2.32, table 6): upright to stored.
    stored_of = {
        1: turned,
        2: turned[:, ::-1],
        3: turned[::-1, ::-1],
        4: turned[::-1],
        5: turned.T,
        6: np.rot90(turned),
        7: turned[::-1, ::-1].T,
        8: np.rot90(turned, -1),
    }
    # Large, so that a JPEG is decoded at a fraction of its size, and smooth, for little noise.
    small = np.random.default_rng(3).integers(0, 256, (6, 6), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}

    def photograph(pixels, exif):
        image = Image.fromarray(pixels).resize((320, 320), Image.Resampling.BICUBIC).convert("RGB")
        return encoded(image, kind, exif=exif, **options)

    upright = read(photograph(small, Image.Exif())).astype(int)
    stored = photograph(small.ravel()[stored_of[orientation]], exif)
    assert np.abs(read(stored) - upright).mean() < 2
    if orientation > 1:
        assert np.abs(read(photograph(small, exif)) - upright).mean() > 20


@pytest.mark.parametrize("orientation", [0, 9, 600])
def test_a_rotation_that_does_not_exist_is_none(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(read(encoded(noise(1), "PNG", exif=exif)), read(encoded(noise(1), "PNG")))


def test_damaged_exif_costs_the_rotation_alone():
    content = encoded(noise(1), "JPEG", exif=b"Exif\0\0MM\0\x2a\0\0\0\x08\0\xff\1\x12")
    with pytest.warns(UserWarning, match="Corrupt EXIF"):
        read(content)
    with quiet_pillow():
        assert np.array_equal(read(content), read(encoded(noise(1), "JPEG")))


# Colours and bits


@pytest.mark.parametrize("marked", [True, False])
def test_a_cmyk_jpeg_is_inverted_as_adobe_does_it(marked):
    content = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    marker = content.index(b"\xff\xee")
    (length,) = struct.unpack(">H", content[marker + 2 : marker + 4])
    assert content[marker + 4 : marker + 9] == b"Adobe"
    if not marked:
        content = content[:marker] + content[marker + 2 + length :]
    red, green, blue = read(content)[:, 8, 8].astype(int)
    assert (red > 240, green < 15, blue < 15) == (True, True, True)


EVERY_VALUE = np.arange(2**16, dtype=np.uint16).reshape(256, 256)


def sixteen_bits():
    """Each way to store all 65,536 values, and how many colours it has."""
    big = EVERY_VALUE.astype(">u2")
    lines = b"".join(b"\0" + line.tobytes() for line in big)
    in_colour = np.stack([big, big.T, big[::-1]], axis=2).astype(">u2")
    colour_lines = b"".join(b"\0" + line.tobytes() for line in in_colour)
    yield "PNG", png(256, 256, 16, 0, lines), 1
    yield "TIFF, little end first", encoded(Image.fromarray(EVERY_VALUE), "TIFF"), 1
    swapped = Image.frombytes("I;16B", (256, 256), big.tobytes())
    yield "TIFF, big end first", encoded(swapped, "TIFF"), 1
    yield "TIFF, 32 bits", encoded(Image.fromarray(EVERY_VALUE.astype(np.int32)), "TIFF"), 1
    yield "PGM", b"P5\n256 256\n65535\n" + big.tobytes(), 1
    yield "PNG in colour", png(256, 256, 16, 2, colour_lines), 3


@pytest.mark.parametrize("kind", [pytest.param(k[1:], id=k[0]) for k in sixteen_bits()])
def test_sixteen_bits_are_scaled_to_eight(kind):
    content, channels = kind
    expected = np.stack([EVERY_VALUE, EVERY_VALUE.T, EVERY_VALUE[::-1]])[:channels] // 256
    assert np.array_equal(read(content, 256, channels), expected)


@pytest.mark.parametrize("values", [[0, 65536], [-1, 5]])
def test_integers_of_no_known_range_are_refused(values):
    content = encoded(Image.fromarray(np.array([values] * 2, np.int32)), "TIFF")
    with pytest.raises(ValueError, match=f"integers from {values[0]} to {values[1]} .*8 or 16"):
        read(content)


def test_what_is_transparent_is_white():
    # A value of its own, in 16 bits.
    key = struct.pack(">I", 2) + b"tRNS" + struct.pack(">H", 0)
    key += struct.pack(">I", zlib.crc32(key[4:]))
    lines = b"".join(b"\0" + line.tobytes() for line in EVERY_VALUE.astype(">u2"))
    got = read(png(256, 256, 16, 0, lines, key), 256, 1)[0]
    assert got[0, :3].tolist() == [255, 0, 0]
    # A palette whose colours are transparent to different degrees.
    image = Image.fromarray(np.tile(np.arange(4, dtype=np.uint8), (4, 1))).convert("P")
    image.putpalette([0, 0, 0] * 4)
    content = encoded(image, "PNG", transparency=bytes([0, 64, 128, 255]))
    assert read(content, 4, 1)[0, 0].tolist() == [255, 191, 127, 0]
    for mode, colour in (("LA", (0, 64)), ("RGBA", (0, 0, 0, 64))):
        for kind in ("PNG", "TIFF", "WEBP"):
            options = {"lossless": True} if kind == "WEBP" else {}
            assert (read(encoded(Image.new(mode, (9, 9), colour), kind, **options)) == 191).all()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "AVIF", "TIFF", "MPO"])
def test_of_several_images_the_first_counts(kind):
    first, *others = [Image.new("RGB", (32, 32), c) for c in ("red", "lime", "blue")]
    content = encoded(first, kind, save_all=True, append_images=others)
    with Image.open(io.BytesIO(content)) as image:
        assert getattr(image, "n_frames", 1) == 3
    red, green, blue = read(content)[:, 8, 8].astype(int)
    assert (red > 240, green < 15, blue < 15) == (True, True, True)


# Damage


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("GIF", {}),
        ("WEBP", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("AVIF", {}),
    ],
    ids=str,
)
def test_a_truncated_image_is_whole_or_broken_never_half(kind, options):
    content = encoded(noise(1, (160, 120)), kind, **options)
    whole, broken = read(content), 0
    cuts = {*range(0, len(content), len(content) // 20), *range(len(content) - 20, len(content))}
    with quiet_pillow():
        for cut in cuts:
            try:
                assert np.array_equal(read(content[:cut]), whole)
            except AssertionError:
                raise
            except Exception:
                broken += 1
    assert broken >= 20


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "an empty file"),
        (b"words, not an image", r"no image, it begins with b'words, not a'"),
        (b"<!DOCTYPE html><html>", "no image: it is a web page: download the file itself"),
        (b"\xef\xbb\xbf\r\n<HTML>", "no image: it is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "no image: it is a pointer of Git LFS"),
        (encoded(noise(1), "EPS"), "PostScript is a program"),
    ],
)
def test_what_is_no_image_is_named(tmp_path, content, message):
    path = tmp_path / "x.jpg"
    path.write_bytes(content)
    for image in (path, str(path), io.BytesIO(content)):
        with pytest.raises((OSError, ValueError), match=message):
            decode(image, 8, 3)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_model_that_is_something_else_is_called_so(tmp_path, name):
    for content, message in (
        (b"", r"it is empty \(0 bytes\)"),
        (b"version https://git-lfs.github.com/spec/v1\n", "it is a pointer of Git LFS"),
        (b"\xef\xbb\xbf<html>", "it is a web page"),
    ):
        save_embedder(MODEL, tmp_path / "model", {})
        (tmp_path / "model" / name).write_bytes(content)
        with pytest.raises(ConfigError, match=f"cannot read .*{name}: {message}"):
            load_embedder(tmp_path / "model")


HEIC = b"\0\0\0\x1cftypheic\0\0\0\0mif1heicmiaf"


def test_heic_without_its_package_says_which(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pi_heif", None)
    root = tmp_path / "root"
    for name in "abc":
        save(root / "ann" / name / "0.png", noise(1))
    save(root / "ann" / "a" / "1.png", noise(2))
    (root / "ann" / "a" / "IMG_1.HEIC").write_bytes(HEIC)
    message = r"IMG_1.HEIC \(HEIC, which needs .*pip install \"fedss\[heic\]\""
    with pytest.raises(DataError, match=message):
        load(root)
    assert load(root, skip_broken=True).skipped == ("ann/a/IMG_1.HEIC",)
    # Once it is installed, the image is looked at again.
    assert not list((tmp_path / "cache").glob("broken-*"))


def test_heic_is_read_as_the_camera_meant_it():
    """Red above blue, stored as red beside blue with a quarter turn; made with pillow-heif."""
    red, _, blue = read((Path(__file__).parents[1] / "files" / "rotated.heic").read_bytes(), 8)
    assert (red[0] > 200).all()
    assert (blue[-1] > 200).all()


def test_images_above_the_limit_are_not_decoded(monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ValueError, match=r"^10,000,000,000 pixels, above the limit of 134,217,728"):
        read(png(100_000, 100_000, 8, 2, b""))
    real = png(30_000, 30_000, 1, 0, bytes(30_000 * (1 + 30_000 // 8)))
    with pytest.raises(ValueError, match=r"^900,000,000 pixels, above the limit of 134,217,728"):
        read(real)
    # Below the limit, and above what Pillow warns of: as some telephones take them.
    with quiet_pillow(), open_image(io.BytesIO(png(12_000, 9_000, 8, 2, b""))) as image:
        assert image.size == (12_000, 9_000)


def test_the_limit_holds_whatever_pillows_own_is(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    side = 12_000
    assert side * side > MAX_PIXELS
    with pytest.raises(ValueError, match=r"12,000 x 12,000 = 144,000,000 pixels, above the limit"):
        read(png(side, side, 8, 0, b""))
    monkeypatch.setattr(decoding, "MAX_PIXELS", 480)
    assert read(encoded(noise(1, (24, 20)), "PNG")).shape == (3, 16, 16)
    with pytest.raises(ValueError, match=r"24 x 21 = 504 pixels, above the limit of 480: save"):
        read(encoded(noise(1, (24, 21)), "PNG"))


# Files that are none


@pytest.fixture
def folders(tmp_path):
    """Two clients of three classes, two images each, all different."""
    for i in range(12):
        save(tmp_path / "root" / "ab"[i // 6] / "xyz"[i // 2 % 3] / f"{i % 2}.png", noise(i))
    return tmp_path / "root"


def load(root, **options):
    return load_dataset("folder", root, image_size=8, cache=root.parent / "cache", **options)


def make_images(data):
    parts = [data.train, data.test.query]
    return {
        (name, part.class_names[label], pixels.tobytes())
        for part in parts
        for name, label, pixels in zip(part.names, part.labels, part.pixels, strict=True)
    }


def as_csv(root, names):
    lines = [f"{name},{name.split('/')[1]},{name.split('/')[0]}" for name in names]
    path = root / "images.csv"
    path.write_text("\n".join(["image,label,client", *lines]) + "\n")
    return path


def test_one_file_name_in_many_places_is_as_many_images(folders):
    found = make_images(load(folders))
    assert {name for name, _, _ in found} == {
        f"{client}/{label}/{i}.png" for client in "ab" for label in "xyz" for i in (0, 1)
    }
    assert len({pixels for _, _, pixels in found}) == 12


MODEL = build_embedder("conv4-4", channels=3, image_size=8, embedding_size=4, seed=0)


@pytest.mark.parametrize("what", ["pipe", "folder", "dangling", "circle"])
def test_what_is_called_an_image_and_is_no_file_is_missing(folders, what):
    expected = make_images(load(folders))
    path = folders / "a" / "x" / "9.jpg"
    if what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    else:
        path.symlink_to("9.jpg" if what == "circle" else "none.jpg")
    # Nothing below waits for a writer to the pipe.
    if what != "folder":
        with pytest.raises(DataError, match=r"a/x/9\.jpg: no such image file: .*1 of 13 are"):
            load(folders)
        left = load(folders, skip_broken=True)
        assert left.skipped == ("a/x/9.jpg",)
        assert make_images(left) == expected
    else:
        assert make_images(load(folders)) == expected
    path_of_csv = as_csv(folders, ["a/x/0.png", "a/x/1.png", "a/y/0.png", "a/x/9.jpg"])
    with pytest.raises(DataError, match=r"line 5: no such image file.*Paths are relative to the"):
        load_dataset("csv", path_of_csv, cache=folders.parent / "cache")
    with pytest.raises(DataError, match=r"cannot read image .*9\.jpg: "):
        embed_files(MODEL, [path])
    assert embed_files(MODEL, [folders / "a/x/0.png", path], skip_broken=True).skipped == (
        str(path),
    )


def test_links_within_the_folder_are_followed(folders):
    (folders / ".store").mkdir()
    (folders / "a" / "x").rename(folders / ".store" / "x")
    (folders / "a" / "x").symlink_to("../.store/x")
    (folders / "b" / "y" / "1.png").rename(folders / ".store" / "77")
    (folders / "b" / "y" / "1.png").symlink_to(folders / ".store" / "77")
    found = {name for name, _, _ in make_images(load(folders))}
    assert {"a/x/0.png", "b/y/1.png"} <= found
    assert len(found) == 12
    # The folder itself may be a link.
    (folders.parent / "link").symlink_to(folders)
    assert {name for name, _, _ in make_images(load(folders.parent / "link"))} == found


@pytest.mark.parametrize("place", ["a/x/9.png", "a/w", "c", "notes.txt"])
def test_links_out_of_the_folder_are_refused(folders, place):
    outside = folders.parent / "rooted"  # begins as the folder does
    target = save(outside / "w" / "w" / "0.png", noise(1))
    link = folders / place
    link.symlink_to(target if "." in place else target.parent.parent)
    with pytest.raises(DataError, match=rf"{place}: a link out of .*to {outside}.*list.* a CSV"):
        load(folders, skip_broken=True)
    # A CSV says what it means, one by one.
    names = ["a/x/0.png", "a/x/1.png", "a/y/0.png", "../rooted/w/w/0.png"]
    data = load_dataset("csv", as_csv(folders, names), image_size=8, cache=folders.parent / "cache")
    assert str(target) in {*data.train.names, *data.test.query.names}


@pytest.fixture
def unprivileged():
    """The rights of nobody in particular: root may read everything."""
    Image.init()
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_place():
    """A folder that anybody may use."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        yield Path(folder)


def test_what_may_not_be_read_is_named_and_tried_again(open_place, request):
    root = open_place / "root"
    for i in range(6):
        save(root / "a" / "xyz"[i % 3] / f"{i}.png", noise(i))
    (open_place / "cache").mkdir()
    (open_place / "cache").chmod(0o777)
    shut = root / "a" / "x" / "3.png"
    shut.chmod(0)
    request.getfixturevalue("unprivileged")
    with pytest.raises(DataError, match=r"1 of 6 .*3\.png \(.*Permission denied"):
        load(root)
    assert load(root, skip_broken=True).skipped == ("a/x/3.png",)
    assert not list((open_place / "cache").glob("broken-*"))


def test_a_folder_that_may_not_be_read_is_named(open_place, request):
    root = open_place / "root"
    save(root / "a" / "x" / "0.png", noise(0))
    save(root / "a" / "y" / "0.png", noise(0))
    (root / "a" / "y").chmod(0)
    request.getfixturevalue("unprivileged")
    with pytest.raises(DataError, match=r"a/y: cannot read this folder: Permission denied"):
        load(root)


# What is passed over, and what is meant


def test_every_ending_of_an_image_that_can_be_read_is_found(tmp_path):
    """Saved by Pillow under each name that it knows, in training and in search."""
    Image.init()
    made = 0
    for ending, kind in sorted(Image.registered_extensions().items()):
        image, file = noise(made, (32, 32)), io.BytesIO()
        mode = {"XBM": "1", "MSP": "1", "PALM": "P", "BLP": "P"}.get(kind, "RGB")
        try:
            image.convert(mode).save(file, kind)
            read(file.getvalue())
        except Exception:
            continue
        for client in "ab":
            path = tmp_path / "root" / client / f"class {kind}" / f"{made}{ending.upper()}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file.getvalue())
        made += 1
    assert made > 40
    data = load(tmp_path / "root")
    assert len(data.train) + len(data.test.query) == 2 * made
    assert len(list_images(tmp_path / "root").names) == 2 * made


def clutter(root):
    """What cameras, NAS, systems and people leave beside images; how it is counted."""
    thumbnail = root / "a" / "x" / "@eaDir" / "0.png" / "SYNOPHOTO_THUMB_M.jpg"
    for path in (
        thumbnail,
        root / "@eaDir" / "a" / "x" / "t.jpg",
        root / "__MACOSX" / "a" / "x" / "t.jpg",
        root / "a" / "#recycle" / "t.jpg",
        root / "a" / ".thumbnails" / "t.jpg",
        root / "$RECYCLE.BIN" / "t.jpg",
        root / "FOUND.001" / "t.jpg",
        root / "a" / "~snapshot" / "t.jpg",
        root / "a" / "x" / "@__thumb" / "t.jpg",
    ):
        save(path, noise(99))
    for name in ("a/x/notes.txt", "b/y/old.TXT", "a/x/IMG_1.CR2", "a/README", "a/x/._0.png"):
        (root / name).write_bytes(b"")
    return {
        "system folders @eaDir": 2,
        "system folders __MACOSX": 1,
        "system folders #recycle": 1,
        "system folders $RECYCLE.BIN": 1,
        "system folders FOUND.001": 1,
        "system folders ~snapshot": 1,
        "system folders @__thumb": 1,
        "hidden folders": 1,
        "hidden files": 1,
        ".txt files": 2,
        ".cr2 files": 1,
        "files without an ending": 1,
    }


def test_what_is_passed_over_is_counted_the_same_everywhere(folders, capsys, monkeypatch):
    before, names = make_images(load(folders)), list_images(folders).names
    expected = clutter(folders)
    data, found = load(folders), list_images(folders)
    assert make_images(data) == before
    assert found.names == names
    assert data.passed_over == found.passed_over == expected
    monkeypatch.setenv("FEDSS_CACHE", str(folders.parent / "cache"))
    words = ["info", "--data", "folder", "--data-path", str(folders), "--sample-size", "2"]
    assert main([*words, "--image-size", "8"]) == 0
    said = capsys.readouterr().err
    assert said.startswith("passed over: ")
    for kind, count in expected.items():
        assert f"{kind} ({count})" in said
    save_embedder(MODEL, folders.parent / "run" / "model", {})
    for words in (["embed", "--out", str(folders.parent / "e.npy")], ["index"]):
        command, *options = words
        assert main([command, str(folders.parent / "run"), str(folders), *options]) == 0
        assert capsys.readouterr().err == said


def test_folders_below_those_of_classes_are_counted(folders):
    save(folders / "a" / "x" / "more" / "still" / "1.png", noise(1))
    assert load(folders).passed_over == {"folders below those of classes": 1}


def test_nothing_but_what_is_passed_over_says_so(tmp_path):
    save(tmp_path / "root" / "a" / "x" / "1.png", noise(1)).rename(tmp_path / "root/a/x/1.raw")
    message = r"no images? found; passed over: \.raw files \(1\)"
    with pytest.raises(DataError, match=message):
        load(tmp_path / "root")
    with pytest.raises(DataError, match=message):
        list_images(tmp_path / "root")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("a\\x\\0.png", "there with '/' in place of"),
        (".\\a\\x\\0.png", "there with '/' in place of"),
        ("C:\\photos\\0.png", "write '/' in place of"),
        ("a/x/0.PNG", "there is .*a/x/0.png: upper and lower case"),
        ("A/X/0.png", "there is .*a/x/0.png: upper and lower case"),
        ("A\\X\\0.PNG", "there is .*a/x/0.png: upper and lower case"),
        ("a/x/\u200b0.png", "there is .*a/x/0.png: .* unseen characters"),
        ("~/photos/0.png", "'~' stands for no folder"),
        ("~ann/0.png", "'~' stands for no folder"),
        ("https://example.org/0.png", "this is a URL"),
        ("file:///a/x/0.png", "this is a URL"),
        ("a/x%2F0.png", "there as .*a/x/0.png: write it without %"),
        ("root/a/x/0.png", "root/a/x/0.png is there from the folder that you are in"),
    ],
)
def test_a_missing_image_has_a_hint_in_training_and_in_search(
    folders, name, hint, monkeypatch, capsys
):
    monkeypatch.chdir(folders.parent)
    path = as_csv(folders, ["a/x/1.png", "a/y/0.png"])
    path.write_text(path.read_text() + f"{name},x,a\n")
    with pytest.raises(DataError, match=rf"line 4: no such image file: .*{hint}"):
        load_dataset("csv", path, cache=folders.parent / "cache")
    found = list_images(path)
    with pytest.raises(DataError, match=rf"cannot read image .*{hint}"):
        embed_files(MODEL, found.paths, names=found.names)
    save_embedder(MODEL, folders.parent / "run" / "model", {})
    run, out = str(folders.parent / "run"), str(folders.parent / "e.npy")
    assert main(["embed", run, str(path), "--out", out]) == 2
    assert f"{path}, line 4: cannot read image" in capsys.readouterr().err
    with pytest.raises(DataError, match=rf"line 4: cannot read image .*{hint}"):
        build_collection(folders.parent / "run", path)


# The cache


def rewritten(folders, how):
    """Other images under the names, sizes and times of the old ones; the new ones by name."""
    files = sorted(folders.glob("*/*/*.bmp"))
    contents = [file.read_bytes() for file in files]
    for file, content in zip(files, contents[1:] + contents[:1], strict=True):
        before = file.stat()
        if how == "in place":
            file.write_bytes(content)
            os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        else:  # as rsync and tar do it
            beside = file.with_name(".beside")
            beside.write_bytes(content)
            os.utime(beside, ns=(before.st_atime_ns, before.st_mtime_ns))
            beside.replace(file)
        assert (file.stat().st_size, file.stat().st_mtime_ns) == (
            before.st_size,
            before.st_mtime_ns,
        )


@pytest.mark.parametrize("how", ["in place", "put in place", "another folder"])
def test_other_images_of_the_same_name_size_and_time_are_seen(tmp_path, how):
    root, other = tmp_path / "root", tmp_path / "other"
    for i in range(12):
        for place in (root, other):
            j = (i + 1) % 12 if place == other else i
            file = save(place / "ab"[i // 6] / "xyz"[i // 2 % 3] / f"{i % 2}.bmp", noise(j))
            os.utime(file, (315532800, 315532800))  # as a ZIP without times
    run = tmp_path / "run"
    save_embedder(MODEL, run / "model", {})
    load(root)
    assert build_collection(run, root).embedded == 12
    assert build_collection(run, root).embedded == 0
    if how == "another folder":
        root.rename(tmp_path / "old")
        other.rename(root)
    else:
        rewritten(root, how)
    assert_read_as_they_are_now(root, run, root, changed=12)


def assert_read_as_they_are_now(root, run, indexed, changed):
    """In training, and in an index, which embeds those again that have changed."""
    data = load(root)
    for part in (data.train, data.test.query):
        for name, pixels in zip(part.names, part.pixels, strict=True):
            assert np.array_equal(pixels, decode(root / name, 8, 3))
    again = build_collection(run, indexed)
    assert again.embedded == changed
    expected = embed_files(MODEL, list_images(indexed).paths).embeddings_ND
    assert np.allclose(again.vectors_ND, expected, atol=1e-6)


def of_one_moment(files):
    """Give files one ctime, as an archive does that is unpacked within a tick of the clock."""
    for _ in range(100):  # kernels with finer times never do it
        for file in files:
            file.chmod(0o644)
        if len({file.stat().st_ctime_ns for file in files}) == 1:
            return


@pytest.mark.parametrize("how", ["folders", "links"])
def test_images_of_one_moment_that_change_places_are_seen(tmp_path, how):
    """Swapped by what changes no image's own times: renamed folders above, links."""
    root = tmp_path / "root"
    for i in range(12):
        path = root / "ab"[i // 6] / "xyz"[i // 2 % 3] / f"{i % 2}.bmp"
        kept = root / ".store" / f"{i}.bmp" if how == "links" else path
        os.utime(save(kept, noise(i)), (315532800, 315532800))
        if how == "links":
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(kept)
    of_one_moment([file for file in root.rglob("*.bmp") if not file.is_symlink()])
    listed = as_csv(root, [f"a/{label}/{i}.bmp" for label in "xyz" for i in (0, 1)])
    run = tmp_path / "run"
    save_embedder(MODEL, run / "model", {})
    load(root)
    assert build_collection(run, listed).embedded == 6
    if how == "folders":
        (root / "a" / "x").rename(root / "t")
        (root / "a" / "y").rename(root / "a" / "x")
        (root / "t").rename(root / "a" / "y")
    else:
        for i in (0, 1):
            pair = [root / "a" / label / f"{i}.bmp" for label in "xy"]
            for link, target in zip(pair, [file.resolve() for file in reversed(pair)], strict=True):
                link.unlink()
                link.symlink_to(target)
    assert_read_as_they_are_now(root, run, listed, changed=4)


# Memory


def test_all_threads_together_hold_the_pixels_of_one_large_image(monkeypatch):
    """Eight images of a third of the bound each, and one above half of it, in nine threads."""
    monkeypatch.setattr(decoding, "MAX_PIXELS", 3 * 400)
    sizes = [(20, 20)] * 8 + [(30, 30)]
    contents = [encoded(noise(1, size), "PNG") for size in sizes]
    held, most, lock = [], [], threading.Lock()
    plain = decoding._upright

    def watched(image):
        pixels = image.width * image.height
        with lock:
            held.append(pixels)
            most.append(sum(held))
        time.sleep(0.02)
        try:
            return plain(image)
        finally:
            with lock:
                held.remove(pixels)

    monkeypatch.setattr(decoding, "_upright", watched)
    with ThreadPoolExecutor(9) as pool:
        shapes = [found.shape for found in pool.map(read, contents * 3)]
    assert shapes == [(3, 16, 16)] * 27
    assert 800 <= max(most) <= 1200
    # An image that cannot be decoded gives its room back.
    with pytest.raises(OSError, match="truncated"):
        read(contents[0][:-30])
    assert decoding._held == 0


def test_of_a_jpeg_what_is_decoded_counts(monkeypatch):
    monkeypatch.setattr(decoding, "MAX_PIXELS", 640 * 640)
    asked = []
    monkeypatch.setattr(decoding, "_room", lambda pixels: asked.append(pixels) or nullcontext())
    smooth = noise(1, (8, 8)).resize((640, 640))
    read(encoded(smooth, "JPEG"))
    read(encoded(smooth, "JPEG", progressive=True))
    assert asked == [80 * 80, 640 * 640]


# Names

NAMES = (
    "Москва",
    "東京",
    "חתול",
    "👩‍🚀",
    "two\nlines",
    "\x1b[31mred",
    "\u202egnp",
    '"a",<b>',
    os.fsdecode(b"caf\xe9"),
)


def test_names_in_any_script_go_all_the_way(tmp_path, capsys):
    root, run = tmp_path / "root", tmp_path / "run"
    for i, name in enumerate(NAMES):
        for k in range(2):
            # Each has a byte that is no UTF-8, so that whichever is held out reaches the report.
            label = os.fsdecode(f"{name} {k}".encode("utf-8", "surrogateescape") + b"\xe9")
            for copy in range(2):
                save(root / name / label / f"{name}{copy}.png", noise(10 * i + k, (12, 12)))
    arguments = ["--data", "folder", "--data-path", str(root), "--image-size", "8"]
    small = ["--rounds", "1", "--clients-per-round", "3", "--sample-size", "6", "--workers", "1"]
    assert main(["info", *arguments, "--sample-size", "6"]) == 0
    assert main(["train", *arguments, *small, "--backbone", "conv4-4", "--out", str(run)]) == 0
    assert (run / "report.html").stat().st_size > 10_000
    assert main(["evaluate", str(run)]) == 0
    out = tmp_path / "e.npy"
    assert main(["embed", str(run), str(root), "--out", str(out)]) == 0
    assert len(np.load(out)) == 4 * len(NAMES)
    names = json.loads((tmp_path / "e.names.json").read_text())
    assert {Path(name).parts[0] for name in names} == set(NAMES)
    capsys.readouterr()
    for name in NAMES:
        next((root / name).glob("*/*")).write_bytes(b"")
    assert main(["info", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.strip().isprintable()
    assert main(["info", *arguments, "--sample-size", "6", "--skip-broken"]) == 0
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith(f"left out {len(NAMES)} unreadable images: ")
    assert all(line.isprintable() for line in said)


def test_composed_and_decomposed_names_are_one_name(tmp_path):
    """macOS writes names of files in the other form."""
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    assert composed != decomposed
    root = tmp_path / "root"
    for i, name in enumerate((composed, decomposed)):
        save(root / "ann" / name / f"{i}.png", noise(i))
        save(root / name / "dog" / f"{i}.png", noise(2 + i))
    data = load(root)
    parts = (data.train, data.test.query)
    assert {name for part in parts for name in part.class_names} == {composed, "dog"}
    assert {name for part in parts for name in part.client_names} == {"ann", composed}
    lines = [f"{name}/dog/{i}.png,{name},{name}" for i, name in enumerate((composed, decomposed))]
    lines.append("ann/x.png,dog,ann")
    csv = save(root / "ann" / "x.png", noise(5)).parents[1] / "p.csv"
    csv.write_text("\n".join(["image,label,client", *lines]) + "\n")
    listed = load_dataset("csv", csv, image_size=8, cache=tmp_path / "cache", test_classes=0)
    assert list(listed.train.class_names) == [composed, "dog"]
    assert list(listed.train.client_names) == ["ann", composed]
    # Files have the names that they have.
    csv.write_text(f"image,label,client\nann/{composed}/1.png,a,b\n")
    with pytest.raises(DataError, match="no such image file"):
        load_dataset("csv", csv)
    save(root / f"{decomposed}.png", noise(6))
    csv.write_text(f"image,label,client\n{composed}.png,a,b\n")
    with pytest.raises(DataError, match="under the same name in another Unicode form, NFD"):
        load_dataset("csv", csv)


def test_upper_and_lower_case_are_different_names(tmp_path):
    for i, name in enumerate(("Cat", "cat", "dog")):
        for k in range(2):
            save(tmp_path / "root" / "ann" / name / f"{k}.png", noise(2 * i + k))
    data = load(tmp_path / "root")
    assert {*data.train.class_names, *data.test.query.class_names} == {"Cat", "cat", "dog"}
