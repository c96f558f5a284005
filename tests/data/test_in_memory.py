"""One image of any form becomes the pixels that its file would."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from fedss.data.decoding import decode
from fedss.data.in_memory import as_nchw, read_image, to_uint8
from fedss.errors import DataError
from tests.data.made import make_image, save

FORMS = {
    "pillow": lambda image: image,
    "HWC": np.asarray,
    "CHW": lambda image: np.asarray(image).transpose(2, 0, 1),
    "tensor": lambda image: torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy()),
    "floats": lambda image: (np.asarray(image) / 255.0).astype(np.float32),
    "bfloat": lambda image: torch.tensor(np.asarray(image).transpose(2, 0, 1) / 255.0),
    "bytes": lambda image: _png(image),
    "dict": lambda image: {"bytes": _png(image), "path": None},
}


def _png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("size", "side"), [((20, 20), 20), ((20, 20), 8), ((31, 20), 16)])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_form_of_an_image_gives_the_pixels_of_its_file(tmp_path, form, size, side, channels):
    image = make_image(3, size)
    save(tmp_path / "image.png", image)
    expected = decode(tmp_path / "image.png", side, channels)
    assert np.array_equal(read_image(FORMS[form](image), side, channels), expected)
    assert np.array_equal(
        read_image({"path": str(tmp_path / "image.png")}, side, channels), expected
    )
    if isinstance(FORMS[form](image), Image.Image):
        image.load()  # still open


def test_without_a_size_images_stay_as_they_are():
    gray, colour = make_image(1, (9, 9), "L"), make_image(1, (9, 9))
    assert np.array_equal(read_image(gray, None, None)[0], np.asarray(gray))
    assert np.array_equal(read_image(colour, None, None), np.asarray(colour).transpose(2, 0, 1))
    assert read_image(gray.convert("LA"), None, None).shape == (1, 9, 9)
    assert read_image(np.asarray(gray), None, None).shape == (1, 9, 9)
    with pytest.raises(DataError, match=r"9 x 8 pixels.*image_size="):
        read_image(make_image(1, (9, 8)), None, None)


def test_views_of_arrays_by_their_layout():
    array = np.zeros((5, 3, 7, 7), np.uint8)
    assert as_nchw(array) is array
    last = np.zeros((5, 7, 7, 3), np.uint8)
    assert as_nchw(last).shape == (5, 3, 7, 7)
    assert np.shares_memory(as_nchw(last), last)
    assert as_nchw(last[..., 0]).shape == (5, 1, 7, 7)
    with pytest.raises(DataError, match=r"got \[5, 7, 7, 4\]; lay RGBA"):
        as_nchw(np.zeros((5, 7, 7, 4), np.uint8))


def test_numbers_of_every_type_become_bytes():
    every = np.arange(256, dtype=np.uint8)
    assert to_uint8(every) is every
    for kind in (np.float32, np.float64):
        assert np.array_equal(to_uint8(every.astype(kind) / kind(255)), every)
    assert to_uint8(np.array([0.4, 0.6, 254.6]) / 255).tolist() == [0, 1, 255]
    assert to_uint8(np.array([False, True])).tolist() == [0, 255]
    with pytest.raises(DataError, match=r"float32 from -1 to 2.*normalizes"):
        to_uint8(np.array([-1, 2], np.float32))
    with pytest.raises(DataError, match=r"nan"):
        to_uint8(np.array([0.5, np.nan]))
    with pytest.raises(DataError, match=r"got int64: where they are 0 to 255, convert"):
        to_uint8(np.array([7]))


def test_what_is_no_image_is_refused():
    with pytest.raises(DataError, match=r"encoded bytes or a file; got a int"):
        read_image(7, None, None)
    with pytest.raises(OSError, match=r"no image"):
        read_image(b"hello there", None, None)
