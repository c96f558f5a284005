"""Decoded images equal what Pillow decodes."""

import numpy as np
import pytest
from PIL import Image, ImageOps

from fedss.data.decoding import decode
from tests.data.made import GOOD, load, make_image, save, write_csv


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
            how = Image.Resampling.BICUBIC if side < 24 else Image.Resampling.BILINEAR
            square = image.convert(wanted).resize((24, 24), how, box)
        expected = np.asarray(square).reshape(24, 24, channels).transpose(2, 0, 1)
        got = decode(path, 24, channels)
        assert got.dtype == np.uint8
        assert np.array_equal(got, expected)


@pytest.mark.parametrize(
    ("size", "how"),
    [
        ((9, 40), Image.Resampling.BICUBIC),
        ((40, 15), Image.Resampling.BICUBIC),  # its shorter side is enlarged
        ((16, 16), None),
        ((17, 40), Image.Resampling.BILINEAR),
        ((90, 33), Image.Resampling.BILINEAR),
    ],
    ids=str,
)
def test_smaller_images_are_enlarged_and_larger_ones_reduced(tmp_path, size, how):
    image, (w, h), side = make_image(3, size), size, min(size)
    save(tmp_path / "p.png", image)
    got = decode(tmp_path / "p.png", 16, 3).transpose(1, 2, 0)
    box = ((w - side) / 2, (h - side) / 2, (w + side) / 2, (h + side) / 2)
    if how is None:
        assert np.array_equal(got, np.asarray(image))
        return
    both = {
        each: np.asarray(image.resize((16, 16), each, box))
        for each in (Image.Resampling.BICUBIC, Image.Resampling.BILINEAR)
    }
    assert [each for each, pixels in both.items() if np.array_equal(got, pixels)] == [how]


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
