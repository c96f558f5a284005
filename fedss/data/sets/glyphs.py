"""Glyphs: handwritten characters of scripts that nobody writes, made by a program.

Like Omniglot, and for any number of classes: a class is a motor program of 2 to 5 pen strokes, an
alphabet is a group of classes with a common look, a client is a drawer with a handwriting, and
each image adds the hand's own jitter. Each number is a hash of (seed, part, purpose, id), so a
class looks the same whatever the number of classes. (On another kind of machine a pixel may differ
by one level, by the rounding of its exp and log.)

Shape suffixes: N images (or classes, or drawers), S strokes, K control points of a stroke,
H = W the image's side, 2 = (x, y).
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from fedss.data.cache import cached_array
from fedss.data.images import Dataset, Images, LazyNames, RetrievalTask
from fedss.errors import DataError

Part = Literal["train", "test", "validation"]

_PARTS: tuple[Part, ...] = ("train", "test", "validation")
_ALPHABET, _CLASS, _DRAWER, _IMAGE = range(4)

_STROKES = 5
_CONTROLS = 6
_BATCH = 256
_PIXELS_AT_ONCE = 1 << 24
_KEEP_IN_MEMORY = 1 << 30

# How the heading of a stroke's five segments departs from its main direction, as a fraction of
# the stroke's turn: line, arc, ring, hook, corner, wave.
_BENDS = np.array(
    [
        [0.0, 0.0, 0.0, 0.0, 0.0],
        [-0.5, -0.25, 0.0, 0.25, 0.5],
        [-0.4, -0.2, 0.0, 0.2, 0.4],
        [0.0, 0.0, 0.0, 0.5, 1.0],
        [-0.5, -0.5, 0.0, 0.5, 0.5],
        [-0.5, 0.0, 0.5, 0.0, -0.5],
    ]
)
_TURN_MIN = np.radians([0.0, 80.0, 300.0, 100.0, 70.0, 110.0])
_TURN_MAX = np.radians([0.0, 210.0, 360.0, 190.0, 140.0, 190.0])
_COMMON = np.array([2.0, 1.5, 0.5, 1.0, 1.2, 0.5])
_PLACES = 4
_LENGTH_MIN = np.array([0.6, 0.7, 1.4, 0.8, 0.9, 0.9])
_LENGTH_MAX = np.array([1.6, 1.7, 2.8, 1.7, 1.8, 1.8])


def _mix(state: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea, Flood 2014): a bijection of uint64 arrays."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(state ^ (state >> np.uint64(31)))


_STEP = np.uint64(0x9E3779B97F4A7C15)


def _uniform(count: int, *key: int | np.ndarray) -> np.ndarray:
    """Numbers in (0, 1), float64 [N, count], each row a pure function of its key."""
    state = np.zeros(1, np.uint64)
    for part in key:
        word = np.atleast_1d(np.asarray(part)).astype(np.uint64)
        state = _mix(state + word + _STEP)
    columns = _STEP * np.arange(1, count + 1, dtype=np.uint64)
    bits = _mix(state[:, None] + columns) >> np.uint64(11)
    return (bits.astype(np.float64) + 0.5) * 2.0**-53


def _normal(count: int, *key: int | np.ndarray) -> np.ndarray:
    """Standard normal numbers, float64 [N, count], by Box and Muller's transform."""
    half = (count + 1) // 2
    uniform = _uniform(2 * half, *key)
    radius = np.sqrt(-2.0 * np.log(uniform[:, :half]))
    angle = 2.0 * np.pi * uniform[:, half:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)[:, :count]


def _alphabet_sizes(num_classes: int, world: tuple[int, int]) -> np.ndarray:
    """Sizes, int64, of the alphabets that hold ``num_classes``; 14 to 55, about 32 on average.

    The last one is cut short, so the sizes before it do not depend on ``num_classes``.
    """
    most = num_classes // 14 + 1
    sizes = 14 + np.floor(42 * _uniform(1, *world, _ALPHABET, np.arange(most))[:, 0] ** 1.3)
    ends = np.minimum(np.cumsum(sizes.astype(np.int64)), num_classes)
    ends = ends[: int(np.searchsorted(ends, num_classes)) + 1]
    return np.diff(ends, prepend=0)


def _programs(classes: np.ndarray, alphabets: np.ndarray, world: tuple[int, int]) -> np.ndarray:
    """Control points of each class, float64 [N, S, K, 2] in about [-1, 1]; NaN: no such stroke."""
    count = len(classes)
    look = _uniform(8, *world, _ALPHABET, alphabets)[:, 1:]
    dice = iter(_uniform(160, *world, _CLASS, classes).T)

    strokes = 2 + np.floor(4.0 * next(dice) ** (1.0 + look[:, 0])).astype(np.int64)
    # An alphabet prefers some kinds of stroke, and hangs strokes together more or less.
    taste = np.cumsum(_COMMON * (0.1 + look[:, 1:] ** 2), axis=1)
    attach = 0.7 + 0.3 * look[:, 0]

    points = np.full((count, _STROKES, _CONTROLS, 2), np.nan)
    rows = np.arange(count)
    for stroke in range(_STROKES):
        kind = (next(dice)[:, None] * taste[:, -1:] > taste).sum(axis=1)
        heading = np.floor(4.0 * next(dice)) * (np.pi / 2) + 0.3 * (next(dice) - 0.5)
        heading += np.where(next(dice) < 0.3, np.pi / 4, 0.0)
        side = np.where(next(dice) < 0.5, -1.0, 1.0)
        turn = side * (_TURN_MIN[kind] + (_TURN_MAX - _TURN_MIN)[kind] * next(dice))
        length = _LENGTH_MIN[kind] + (_LENGTH_MAX - _LENGTH_MIN)[kind] * next(dice)
        angles = heading[:, None] + turn[:, None] * _BENDS[kind]
        steps = np.stack([np.cos(angles), np.sin(angles)], axis=2)
        path = np.concatenate([np.zeros((count, 1, 2)), np.cumsum(steps, axis=1)], axis=1)
        path *= (length / (_CONTROLS - 1))[:, None, None]

        hang = (next(dice) < attach)[:, None]
        # Of a few places the least crowded one, so that strokes seldom run over each other.
        best = np.full(count, np.inf)
        chosen = path
        for _ in range(_PLACES if stroke else 1):
            place = 1.4 * np.stack([next(dice), next(dice)], axis=1) - 0.7 - path.mean(axis=1)
            if stroke:
                earlier = np.floor(np.minimum(stroke, strokes) * next(dice)).astype(np.int64)
                theirs = _pick(next(dice), 0, 0, 1, 2, 3, 4, 5, 5)
                mine = _pick(next(dice), 0, 0, 0, 2, 3, 5)
                hung = points[rows, earlier, theirs] - path[rows, mine]
                place = np.where(hang, hung, place)
            moved = path + place[:, None]
            gaps = points[:, :, :, None] - moved[:, None, None]
            crowd = np.nansum(np.exp((gaps**2).sum(axis=4) * -12.0), axis=(1, 2, 3))
            # A place far outside the box would shrink the whole glyph.
            crowd += 3.0 * np.maximum(np.abs(moved).max(axis=(1, 2)) - 1.0, 0.0)
            better = crowd < best
            chosen = np.where(better[:, None, None], moved, chosen)
            best = np.where(better, crowd, best)
        points[:, stroke] = np.where((stroke < strokes)[:, None, None], chosen, np.nan)

    low, high = np.nanmin(points, axis=(1, 2)), np.nanmax(points, axis=(1, 2))
    # Fill the box, yet let a bar stay a bar.
    extent = np.maximum((high - low) / 2.0, 0.6 * (high - low).max(axis=1, keepdims=True) / 2.0)
    points -= ((low + high) / 2.0)[:, None, None]
    points /= extent[:, None, None]
    return points


def _pick(dice: np.ndarray, *values: int) -> np.ndarray:
    """One of the values, each as likely as it is often listed."""
    return np.asarray(np.array(values)[np.floor(len(values) * dice).astype(np.int64)])


def _spline(samples: int) -> np.ndarray:
    """Catmull-Rom weights, float64 [samples, K]: pen positions from control points."""
    t = np.linspace(0.0, _CONTROLS - 1, samples)
    segment = np.minimum(t.astype(np.int64), _CONTROLS - 2)
    f = t - segment
    weights = np.stack(
        [
            -0.5 * f + f**2 - 0.5 * f**3,
            1.0 - 2.5 * f**2 + 1.5 * f**3,
            0.5 * f + 2.0 * f**2 - 1.5 * f**3,
            -0.5 * f**2 + 0.5 * f**3,
        ]
    )
    basis = np.zeros((samples, _CONTROLS))
    for offset, weight in enumerate(weights, start=-1):
        np.add.at(basis, (np.arange(samples), np.clip(segment + offset, 0, _CONTROLS - 1)), weight)
    return basis


def _write_glyphs(
    programs: np.ndarray,
    drawers: np.ndarray,
    classes: np.ndarray,
    copies: np.ndarray,
    world: tuple[int, int],
) -> tuple[np.ndarray, np.ndarray]:
    """Each drawer's writing of each program: control points [N, S, K, 2], pen radius [N]."""
    count = len(programs)
    hand = _normal(10, *world, _DRAWER, drawers)
    jitter = _normal(76, *world, _IMAGE, drawers, classes, copies)
    shake = jitter[:, :60].reshape(count, _STROKES, _CONTROLS, 2)
    shift = jitter[:, 60:70].reshape(count, _STROKES, 1, 2)
    more = jitter[:, 70:]
    unsteady = np.exp(0.3 * hand[:, 0])[:, None, None, None]
    # Neighbouring control points move together, as a hand that is off stays off for a while.
    drift = np.cumsum(shake, axis=2)
    drift -= drift.mean(axis=2, keepdims=True)
    points = programs + unsteady * (0.02 * shake + 0.05 * drift + 0.11 * shift)

    tilt = 0.10 * hand[:, 1] + 0.06 * more[:, 0]
    slant = 0.16 * hand[:, 2] + 0.06 * more[:, 1]
    wide = np.exp(0.15 * hand[:, 3] + 0.10 * more[:, 2])
    cos, sin = np.cos(tilt), np.sin(tilt)
    matrix = np.stack(
        [np.stack([wide * cos, -sin + slant], 1), np.stack([wide * sin, cos], 1)], axis=1
    )
    points = np.einsum("nij,nskj->nski", matrix, points)
    bow = 0.06 * hand[:, 4:8].reshape(count, 1, 1, 2, 2)
    points = points + (bow * (points**2)[:, :, :, None, :]).sum(axis=-1)

    low, high = np.nanmin(points, axis=(1, 2)), np.nanmax(points, axis=(1, 2))
    size = 0.70 * np.exp(0.12 * np.tanh(hand[:, 9]) + 0.08 * np.tanh(more[:, 3]))
    scale = size / np.maximum((high - low).max(axis=1) / 2.0, 1e-9)
    centre = (low + high) / 2.0 - 0.08 * np.tanh(more[:, 4:6]) / scale[:, None]
    points = (points - centre[:, None, None]) * scale[:, None, None, None]
    return points, 0.044 * np.exp(0.16 * np.tanh(hand[:, 8]))


def _ink(points: np.ndarray, radius: np.ndarray, side: int) -> np.ndarray:
    """Images, uint8 [N, 1, H, W]: a soft round pen drawn along each stroke."""
    # The pen's mark is a product of a profile across and one down, so a piece of a stroke is a
    # matrix product. Pieces this small stay below the size where OpenBLAS wakes its threads.
    piece = max(1, min(40, 2**18 // side**2))
    pieces = -(-(10 * side // 7) // piece)
    drawn, stroke = np.nonzero(~np.isnan(points[:, :, 0, 0]))
    pen = _spline(piece * pieces).astype(np.float32) @ points[drawn, stroke].astype(np.float32)
    moves = np.sqrt((np.diff(pen, axis=1) ** 2).sum(axis=2))
    # Ink by length, so that neither slow nor fast stretches are darker.
    weight = np.zeros(pen.shape[:2], np.float32)
    weight[:, 1:] += moves / 2.0
    weight[:, :-1] += moves / 2.0
    thin = radius[drawn].astype(np.float32)[:, None, None]
    weight /= thin[:, :, 0] * np.float32(np.sqrt(2.0 * np.pi))

    grid = (2.0 * np.arange(side, dtype=np.float32) + 1.0) / side - 1.0
    sharp = np.float32(np.sqrt(0.5)) / thin
    across = np.exp(-(((grid - pen[:, :, :1]) * sharp) ** 2)).reshape(-1, piece, side)
    down = np.exp(-(((grid - pen[:, :, 1:]) * sharp) ** 2)) * weight[:, :, None]
    marks = np.matmul(down.reshape(-1, piece, side).transpose(0, 2, 1), across)
    starts = pieces * np.searchsorted(drawn, np.arange(len(points)))
    ink = np.add.reduceat(marks, starts, axis=0)
    return np.asarray(255.0 * (1.0 - np.exp(-1.6 * ink)) + 0.5).astype(np.uint8)[:, None]


def _who_draws_what(
    sizes: np.ndarray, num_clients: int, drawers: int, copies: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Client, class and number of the copy of each image, int64 [N], sorted by these."""
    first = np.cumsum(sizes) - sizes
    seats = max(drawers, -(-num_clients // len(sizes)))
    # One entry per seat, then one per (seat, class), then one per image.
    seat_alphabet = np.repeat(np.arange(len(sizes)), seats)
    seat_client = np.arange(len(seat_alphabet)) % num_clients
    seat_size = sizes[seat_alphabet]
    within = np.arange(seat_size.sum()) - np.repeat(np.cumsum(seat_size) - seat_size, seat_size)
    labels = np.repeat(np.repeat(first[seat_alphabet], seat_size) + within, copies)
    clients = np.repeat(np.repeat(seat_client, seat_size), copies)
    copy = np.tile(np.arange(copies), len(within))
    order = np.lexsort((copy, labels, clients))
    return clients[order], labels[order], copy[order]


def glyphs(
    num_classes: int = 1024,
    num_clients: int = 256,
    *,
    part: Part = "train",
    drawers: int = 8,
    copies: int = 2,
    image_size: int = 28,
    seed: int = 0,
    cache: Path | None = None,
) -> Images:
    """Handwritten characters of unknown scripts: bright ink (up to 255) on 0, one channel.

    Clients sit down at alphabets in turn: at least ``drawers`` different ones at each alphabet,
    more where there are more clients than seats. A client draws every class of each of its
    alphabets ``copies`` times. So clients share classes as Omniglot's drawers do.

    Class i and the hand of drawer k are the same however many of them there are. Each part has
    scripts and drawers of its own, and so has each seed. Pixels that take more than 1 GiB are kept
    in the ``cache`` (see ``cache_folder``).

    Returns:
        Images with pixels uint8 [N, 1, image_size, image_size], rows by (client, label, copy).

    Raises:
        DataError: A size below 1, or fewer clients than an alphabet has drawers.
    """
    for name, value in (
        ("num_classes", num_classes),
        ("num_clients", num_clients),
        ("drawers", drawers),
        ("copies", copies),
        ("image_size", image_size),
    ):
        if value < 1:
            raise DataError(f"glyphs: {name} must be at least 1, got {value}")
    if num_clients < drawers:
        raise DataError(
            f"glyphs: {num_clients} clients cannot be {drawers} different drawers of an alphabet; "
            f"ask for at least {drawers} clients"
        )

    world = (seed % 2**64, _PARTS.index(part))
    sizes = _alphabet_sizes(num_classes, world)
    first = np.cumsum(sizes) - sizes
    alphabet_of = np.repeat(np.arange(len(sizes)), sizes)
    clients, labels, copy = _who_draws_what(sizes, num_clients, drawers, copies)

    # Large images are drawn fewer at a time.
    many = max(1, min(_BATCH, _PIXELS_AT_ONCE // image_size**2))

    def batches() -> Iterator[np.ndarray]:
        for start in range(0, len(labels), many):
            rows = slice(start, start + many)
            classes, which = np.unique(labels[rows], return_inverse=True)
            programs = _programs(classes, alphabet_of[classes], world)[which]
            writing = _write_glyphs(programs, clients[rows], labels[rows], copy[rows], world)
            yield _ink(*writing, image_size)

    shape = (len(labels), 1, image_size, image_size)
    if np.prod(shape, dtype=np.int64) > _KEEP_IN_MEMORY:
        key = ("glyphs", *world, num_classes, num_clients, drawers, copies, image_size)
        pixels = cached_array(key, shape, batches(), cache=cache, title=f"glyphs: {part}")
    else:
        pixels = np.empty(shape, np.uint8)
        for start, batch in zip(range(0, len(labels), many), batches(), strict=True):
            pixels[start : start + many] = batch

    # The parts have scripts and drawers of their own, so names of their own too.
    def character(label: int) -> str:
        alphabet = alphabet_of[label]
        return f"{alphabet:05d}/{label - first[alphabet]:02d}"

    def drawer(client: int) -> str:
        return f"{part}/drawer{client:05d}"

    return Images(
        pixels,
        labels,
        clients,
        LazyNames(num_classes, lambda label: f"{part}/{character(label)}"),
        LazyNames(num_clients, drawer),
        LazyNames(len(labels), lambda i: f"{drawer(clients[i])}/{character(labels[i])}_{copy[i]}"),
    )


def glyphs_dataset(
    num_classes: int = 1280,
    num_clients: int = 256,
    *,
    test_classes: float = 0.2,
    drawers: int = 8,
    copies: int = 2,
    image_size: int = 28,
    seed: int = 0,
    cache: Path | None = None,
) -> Dataset:
    """Glyphs to train on, and glyphs of other scripts by other drawers to retrieve.

    By default 1,024 training classes at 256 clients (about 64 images each), 256 test classes
    and 128 validation classes; each test or validation class has 10 images, one a drawer.

    Args:
        num_classes: Training and test classes together. Validation adds half as many as test.
        num_clients: Training clients.
        test_classes: Share of ``num_classes`` that is for testing, at least one.
        drawers: For training, at least so many clients draw each alphabet.
        copies: For training, images of a class by one client.
        image_size: Side of the images.
        seed: Another seed, other scripts and drawers.
        cache: Folder for pixels that take more than 1 GiB; see ``cache_folder``.

    Raises:
        DataError: Sizes that cannot be.
    """
    if not 0.0 < test_classes < 1.0:
        raise DataError(
            f"test_classes: expected a share between 0 and 1, got {test_classes}: "
            "without test classes nothing could be evaluated"
        )
    if num_classes < 2:
        raise DataError(
            f"glyphs: expected at least 2 classes, one to train on, one to test, got {num_classes}"
        )
    unseen = min(max(1, round(num_classes * test_classes)), num_classes - 1)

    draw = partial(glyphs, image_size=image_size, seed=seed, cache=cache)

    def unseen_task(part: Part, count: int) -> RetrievalTask:
        alphabets = len(_alphabet_sizes(count, (seed % 2**64, _PARTS.index(part))))
        return RetrievalTask(draw(count, 10 * alphabets, part=part, drawers=10, copies=1))

    return Dataset(
        "glyphs",
        train=draw(num_classes - unseen, num_clients, drawers=drawers, copies=copies),
        test=unseen_task("test", unseen),
        validation=unseen_task("validation", max(1, unseen // 2)),
    )
