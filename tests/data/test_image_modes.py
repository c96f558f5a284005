"""What pixels mean: files written bit by bit here, and what numpy says they show.

Each way to store an image (colour type, bits, transparency, photometric interpretation) in a
matrix. The files are made without Pillow, and what is expected is worked out from the same samples
by the specifications' own words (PNG, third edition; TIFF 6.0).
"""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from fedss.data.decoding import decode

SIDE = 16


def read(content, channels):
    return decode(io.BytesIO(content), SIDE, channels).transpose(1, 2, 0)


def read_gray(content):
    """As one channel; in three it has to be the same."""
    gray = read(content, 1)[..., 0]
    assert np.array_equal(read(content, 3), np.repeat(gray[..., None], 3, 2))
    return gray


def samples(bits, channels=1):
    """Every value of few bits, and of many bits some whose upper halves are the same."""
    rng = np.random.default_rng(bits)
    values = rng.integers(0, 2**bits, (SIDE, SIDE, channels))
    if bits == 16:
        values[::2] = values[0, 0] // 256 * 256 + rng.integers(0, 256, (SIDE // 2, SIDE, channels))
    values[1, 1] = values[3, 7] = values[0, 0]
    return values


def packed(values, bits, order=">"):
    """Rows of samples as bytes, each row to a whole byte."""
    if bits == 16:
        return [row.astype(f"{order}u2").tobytes() for row in values]
    if bits == 8:
        return [row.astype(np.uint8).tobytes() for row in values]
    shifts = np.arange(bits - 1, -1, -1)
    return [np.packbits((row.reshape(-1, 1) >> shifts) & 1).tobytes() for row in values]


def eight(values, bits):
    """Scaled to 8 bits: of 16 the upper ones, fewer so that the largest becomes 255."""
    return values >> 8 if bits == 16 else values * (255 // (2**bits - 1))


def on_white(values, alpha):
    """Laid on white, within rounding."""
    return np.round((values * alpha + 255.0 * (255 - alpha)) / 255)


# PNG


def png(values, bits, colour, *chunks, interlaced=False):
    def chunk(kind, content):
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    header = struct.pack(">IIBBBBB", SIDE, SIDE, bits, colour, 0, 0, int(interlaced))
    # Adam7: where each pass begins and how far apart its pixels are, rows first.
    passes = ["0088", "0488", "4084", "0244", "2042", "0122", "1021"] if interlaced else ["0011"]
    lines = b""
    for row, column, down, across in (map(int, numbers) for numbers in passes):
        lines += b"".join(b"\0" + line for line in packed(values[row::down, column::across], bits))
    body = b"".join(chunk(*one) for one in (*chunks, (b"IDAT", zlib.compress(lines))))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("key", [None, "there", 0, 1])
def test_a_gray_png_with_one_transparent_value(bits, key, interlaced):
    values = samples(bits)
    key = int(values[0, 0, 0]) if key == "there" else key
    chunks = [] if key is None else [(b"tRNS", struct.pack(">H", key))]
    expected = eight(values, bits)
    if key is not None:
        expected = np.where(values == key, 255, expected)
    found = read_gray(png(values, bits, 0, *chunks, interlaced=interlaced))
    assert np.array_equal(found, expected[..., 0])


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("keyed", [False, True])
def test_a_png_in_colour_with_one_transparent_value(bits, keyed, interlaced):
    values = samples(bits, 3)
    key = values[0, 0]
    chunks = [(b"tRNS", key.astype(">u2").tobytes())] if keyed else []
    hidden = (values == key).all(2, keepdims=True) & keyed
    assert not keyed or 3 <= hidden.sum() < 10
    expected = np.where(hidden, 255, eight(values, bits))
    assert np.array_equal(read(png(values, bits, 2, *chunks, interlaced=interlaced), 3), expected)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("alphas", [None, "one", "all"])
def test_a_png_with_a_palette(bits, alphas):
    values, rng = samples(bits), np.random.default_rng(0)
    palette = rng.integers(0, 256, (2**bits, 3))
    alpha = np.full(2**bits, 255)
    if alphas == "one":
        alpha[values[0, 0, 0]] = 0
    elif alphas == "all":
        alpha = rng.integers(0, 256, 2**bits)
    chunks = [(b"PLTE", palette.astype(np.uint8).tobytes())]
    if alphas:
        chunks.append((b"tRNS", alpha.astype(np.uint8).tobytes()))
    expected = on_white(palette[values[..., 0]], alpha[values])
    found = read(png(values, bits, 3, *chunks), 3)
    assert np.abs(found - expected).max() <= 1
    assert np.array_equal(
        found[alpha[values[..., 0]] == 0], found[alpha[values[..., 0]] == 0] | 255
    )


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("colour", [4, 6])
def test_a_png_with_alpha(bits, colour):
    values = samples(bits, 2 if colour == 4 else 4)
    seen = eight(values, bits)
    expected = on_white(seen[..., :-1], seen[..., -1:])
    content = png(values, bits, colour)
    found = read(content, 3) if colour == 6 else read_gray(content)[..., None]
    assert np.abs(found - expected).max() <= 1


# TIFF


def tiff(planes, bits, photometric, order, *tags, planar=1, compression=1):
    """Uncompressed or deflated, in one strip (or one for each plane)."""
    strips = [b"".join(packed(plane, bits, order)) for plane in planes]
    if compression == 8:
        strips = [zlib.compress(strip) for strip in strips]
    per_pixel = sum(plane.shape[2] for plane in planes)
    entries = [
        (256, 3, [SIDE]),
        (257, 3, [SIDE]),
        (258, 3, [bits] * per_pixel),
        (259, 3, [compression]),
        (262, 3, [photometric]),
        (277, 3, [per_pixel]),
        (278, 3, [SIDE]),
        (279, 4, [len(strip) for strip in strips]),
        (284, 3, [planar]),
        *tags,
    ]
    start = 8 + 2 + 12 * (len(entries) + 1) + 4
    values = b""

    def entry(tag, kind, numbers):
        nonlocal values
        content = b"".join(struct.pack(order + {3: "H", 4: "I"}[kind], n) for n in numbers)
        if len(content) > 4:
            place, values = start + len(values), values + content
            content = struct.pack(order + "I", place)
        return struct.pack(order + "HHI", tag, kind, len(numbers)) + content.ljust(4, b"\0")

    # The places of strips depend on what is written before them.
    size = (
        start
        + sum(
            len(n) * {3: 2, 4: 4}[kind] for _, kind, n in entries if len(n) * {3: 2, 4: 4}[kind] > 4
        )
        + (4 * len(strips) if len(strips) > 1 else 0)
    )
    places = [size + sum(map(len, strips[:i])) for i in range(len(strips))]
    written = b"".join(entry(*e) for e in sorted([*entries, (273, 4, places)]))
    header = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8)
    directory = struct.pack(order + "H", len(entries) + 1) + written + struct.pack(order + "I", 0)
    assert len(header + directory) == start
    assert start + len(values) == size
    return header + directory + values + b"".join(strips)


EITHER_END = pytest.mark.parametrize("order", ["<", ">"])


@EITHER_END
@pytest.mark.parametrize("compression", [1, 8])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("white", [0, 1])
def test_a_gray_tiff_whose_zero_is_white_or_black(bits, white, order, compression):
    values = samples(bits)
    content = tiff([values], bits, white, order, compression=compression)
    expected = eight(values if white else 2**bits - 1 - values, bits)[..., 0]
    if (bits, white, order) == (16, 0, ">"):
        with pytest.raises(Exception, match="a TIFF of a kind that cannot"):  # by Pillow
            read_gray(content)
    else:
        assert np.array_equal(read_gray(content), expected)


@EITHER_END
@pytest.mark.parametrize(("planar", "compression"), [(1, 1), (1, 8), (2, 1), (2, 8)])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("extra", [None, 0, 1, 2])
def test_a_tiff_in_colour_with_and_without_alpha(bits, extra, planar, compression, order):
    values = samples(bits, 3 if extra is None else 4)
    seen = eight(values, bits)
    expected = seen[..., :3]
    if extra == 2:  # alpha beside the colours
        expected = on_white(expected, seen[..., 3:])
    elif extra == 1:  # alpha that is in the colours already
        values[..., :3] = values[..., :3] * values[..., 3:] // (2**bits - 1)
        seen = eight(values, bits)
        expected = seen[..., :3] + 255 - seen[..., 3:]
    planes = [values] if planar == 1 else [values[..., i : i + 1] for i in range(values.shape[2])]
    tags = [] if extra is None else [(338, 3, [extra])]
    content = tiff(planes, bits, 2, order, *tags, planar=planar, compression=compression)
    if (planar, compression) == (2, 1) and (bits == 16 or extra in (0, 1)):
        with pytest.raises(
            (OSError, ValueError), match=r"channel after channel|a TIFF of a kind|raw mode"
        ):
            read(content, 3)
    else:
        assert np.abs(read(content, 3) - expected).max() <= (2 if extra == 1 else 1)


@EITHER_END
@pytest.mark.parametrize("extra", [0, 1, 2])
def test_a_gray_tiff_with_alpha(extra, order):
    values = samples(8, 2)
    expected = values[..., 0]
    if extra == 2:
        expected = on_white(values[..., 0], values[..., 1])
    elif extra == 1:
        values[..., 0] = values[..., 0] * values[..., 1] // 255
        expected = values[..., 0] + 255 - values[..., 1]
    found = read_gray(tiff([values], 8, 1, order, (338, 3, [extra])))
    assert np.abs(found - expected).max() <= (2 if extra == 1 else 1)


@EITHER_END
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_tiff_with_a_palette(bits, order):
    values = samples(bits)
    palette = np.random.default_rng(0).integers(0, 2**16, (3, 2**bits))
    content = tiff([values], bits, 3, order, (320, 3, palette.ravel().tolist()))
    assert np.array_equal(read(content, 3), (palette.T >> 8)[values[..., 0]])


@EITHER_END
@pytest.mark.parametrize("bits", [8, 16])
def test_a_tiff_of_inks(bits, order):
    values = samples(bits, 4)
    seen = eight(values, bits)
    expected = (255 - seen[..., :3]) * (255 - seen[..., 3:]) / 255
    assert np.abs(read(tiff([values], bits, 5, order), 3) - expected).max() <= 1
    planes = [values[..., i : i + 1] for i in range(4)]
    if bits == 16:
        with pytest.raises(ValueError, match="channel after channel"):
            read(tiff(planes, bits, 5, order, planar=2), 3)
    else:
        assert np.abs(read(tiff(planes, bits, 5, order, planar=2), 3) - expected).max() <= 1


@EITHER_END
@pytest.mark.parametrize("bits", [8, 16])
def test_a_tiff_of_signed_integers_is_read_if_none_is_negative(bits, order):
    values = samples(bits) >> 1
    signed = (339, 3, [2])
    found = read_gray(tiff([values], bits, 1, order, signed))
    assert np.array_equal(found, eight(values, bits)[..., 0])
    values[5, 5] = 2**bits - 1
    with pytest.raises(ValueError, match=r"integers (from -1|below 0).* have no known range"):
        read_gray(tiff([values], bits, 1, order, signed))


def test_twelve_bits_that_say_so_are_scaled():
    values = np.random.default_rng(1).integers(0, 2**12, (SIDE, SIDE))
    bits = (values.reshape(-1, 1) >> np.arange(11, -1, -1)) & 1
    rows = np.packbits(bits).reshape(SIDE, -1, 1)
    content = tiff([rows], 8, 1, "<").replace(
        struct.pack("<HHIHH", 258, 3, 1, 8, 0), struct.pack("<HHIHH", 258, 3, 1, 12, 0)
    )
    assert np.array_equal(read_gray(content), values >> 4)


@pytest.mark.parametrize(("bits", "photometric", "channels"), [(12, 0, 1), (16, 1, 2)])
def test_a_tiff_that_cannot_be_read_is_called_so(bits, photometric, channels):
    alpha = [(338, 3, [2])] if channels == 2 else []
    with pytest.raises(OSError, match=r"^a TIFF of a kind that cannot be read, .* save it as PNG"):
        read_gray(tiff([samples(bits, channels)], bits, photometric, "<", *alpha))


# Others


@pytest.mark.parametrize("gray", [True, False])
@pytest.mark.parametrize("key", [None, 0, 3, 200])
def test_a_gif_with_one_transparent_value(gray, key):
    values = samples(8)[..., 0]
    palette = np.random.default_rng(0).integers(0, 256, (256, 3))
    if gray:
        palette = np.repeat(np.arange(256)[:, None], 3, 1)
    image = Image.fromarray(values.astype(np.uint8))
    image.putpalette(palette.astype(np.uint8).tobytes())
    file = io.BytesIO()
    image.save(file, "GIF", **({} if key is None else {"transparency": key}))
    expected = palette[values]
    if key is not None:
        expected = np.where((values == key)[..., None], 255, expected)
    assert np.array_equal(read(file.getvalue(), 3), expected)


@pytest.mark.parametrize("most", [1, 3, 100, 255, 256, 1000, 4095, 65535])
def test_a_pgm_and_a_ppm_of_any_largest_value(most):
    for kind, channels in (("5", 1), ("6", 3)):
        values = np.random.default_rng(most).integers(0, most + 1, (SIDE, SIDE, channels))
        content = f"P{kind} {SIDE} {SIDE} {most}\n".encode()
        content += values.astype(">u2" if most > 255 else np.uint8).tobytes()
        assert np.abs(read(content, channels) - values * 255 / most).max() <= 1
