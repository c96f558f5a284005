"""Photographs of made-up things, made by a program, as files with a CSV: to try fedss on.

    python examples/made_up_photographs.py PHOTOS            # a few minutes

A class is a thing: a few solids put together, with a pattern carved through them in colours of its
own. Things share solids, patterns and colours, so that neither tells the class alone. A photograph
is that thing on a table, seen from somewhere at some distance, in the light of a lamp and of what
is around it. The table has nothing to do with the thing.

Each training class is at two of eight clients; other classes are the test. ``PHOTOS/photos.csv``
lists all. Nothing here is downloaded, and the images are free to use.

Shape suffixes: Q rays of an image (several for a pixel), S those that hit something.
"""

import argparse
import csv
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import numpy as np
from PIL import Image

TRAIN, TEST, PER_CLASS, SIDE = 32, 24, 9, 160
CLIENTS = 8
_FINE = 2  # rays for a pixel, each way
_RAYS = 4  # towards the lamp, and as many to what is around, from where a ray ends
_COLOURS = np.array(
    [
        *([0.85, 0.15, 0.12], [0.95, 0.75, 0.1], [0.15, 0.5, 0.2], [0.12, 0.25, 0.7]),
        *([0.55, 0.2, 0.6], [0.92, 0.9, 0.85], [0.12, 0.12, 0.14], [0.45, 0.28, 0.15]),
    ]
)
_SOLIDS = ("ball", "box", "can")
_PATTERNS = ("stripes", "checks", "rings", "spots", "marble", "plain")


@dataclass(frozen=True)
class Thing:
    """Solids (kind, centre, half sizes), a pattern with its direction and pitch, two colours."""

    solids: tuple[tuple[str, np.ndarray, np.ndarray], ...]
    pattern: str
    direction: np.ndarray
    pitch: float
    colours: np.ndarray


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for the photographs and their CSV")
    parser.add_argument("--classes", type=int, default=TRAIN, help="to train with (default: 32)")
    parser.add_argument("--test-classes", type=int, default=TEST, help="others (default: 24)")
    parser.add_argument("--side", type=int, default=SIDE, help="in pixels (default: 160)")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rng, rows = np.random.default_rng(0), []
    things = [make_thing(rng) for _ in range(options.classes + options.test_classes)]
    numbers = range(len(things) * PER_CLASS)
    taken = [things[i // PER_CLASS] for i in numbers]
    with ProcessPoolExecutor() as pool:
        images = pool.map(photograph, taken, repeat(options.side), numbers, chunksize=4)
        for number, pixels in enumerate(images):
            label, of_class = divmod(number, PER_CLASS)
            name = f"thing-{label:02}-{of_class}.jpg"
            Image.fromarray(pixels).save(options.out / name, quality=92)
            split = "train" if label < options.classes else "test"
            client = (label * 5 + of_class % 2) % CLIENTS
            rows.append((name, f"thing {label:02}", f"client {client}", split))
    with (options.out / "photos.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("image", "label", "client", "split"), *rows])
    print(f"{len(rows)} photographs: {options.out / 'photos.csv'}")


def photograph(thing: Thing, side: int, seed: int) -> np.ndarray:
    """uint8 [side, side, 3]."""
    rng = np.random.default_rng([1, seed])
    fine = side * _FINE
    where = (np.arange(fine) + 0.5) / fine * 2 - 1
    y_Q, x_Q = (grid.ravel() for grid in np.meshgrid(where, where, indexing="ij"))
    turn = rotation(rng.uniform([-65, 16, -5], [65, 38, 5]))
    zoom, shift = rng.uniform(0.72, 1.0), rng.uniform(-0.15, 0.15, 2)
    from_Q3 = np.stack([(x_Q - shift[0]) / zoom, (y_Q - shift[1]) / zoom, 0 * x_Q - 6], 1) @ turn
    along_3 = np.array([0.0, 0.0, 1.0]) @ turn
    table = max(centre[1] + size[1] for _, centre, size in thing.solids)
    t_Q = (table - from_Q3[:, 1]) / along_3[1]
    normal_Q3 = np.tile([0.0, -1.0, 0.0], (len(t_Q), 1))
    on_thing_Q = np.zeros(len(t_Q), bool)
    for kind, centre, size in thing.solids:
        hit_Q, n_Q3 = hit(kind, (from_Q3 - centre) / size, along_3 / size)
        nearer_Q = hit_Q < t_Q
        t_Q[nearer_Q], normal_Q3[nearer_Q] = hit_Q[nearer_Q], (n_Q3 / size)[nearer_Q]
        on_thing_Q |= nearer_Q
    normal_Q3 /= np.linalg.norm(normal_Q3, axis=1, keepdims=True)
    point_Q3 = from_Q3 + t_Q[:, None] * along_3
    of_table_Q3 = _table(point_Q3[:, [0, 2]], rng)
    colour_Q3 = of_table_Q3.copy()
    colour_Q3[on_thing_Q] = colour_of(thing, point_Q3[on_thing_Q])
    lamp = np.array([rng.choice([-1, 1]) * rng.uniform(0.4, 0.9), -1.0, -rng.uniform(0.2, 0.7)])
    lamp_3 = (lamp / np.linalg.norm(lamp)) @ turn
    direct_Q, around_Q = _light(thing, point_Q3, normal_Q3, lamp_3, rng)
    halfway = lamp_3 - along_3
    gloss_Q = np.clip(normal_Q3 @ (halfway / np.linalg.norm(halfway)), 0, 1) ** 60 * on_thing_Q
    warm = rng.uniform([1.0, 0.9, 0.75], [1.0, 0.98, 0.95]) * rng.uniform(0.75, 0.95)
    cool = rng.uniform([0.85, 0.95, 1.0], [1.0, 0.95, 1.0]) * rng.uniform(0.45, 0.6)
    image_Q3 = colour_Q3 * (direct_Q[:, None] * warm + around_Q[:, None] * cool)
    image_Q3 += (0.4 * gloss_Q * (direct_Q > 0))[:, None]
    image_Q3 = _before_wall(image_Q3, point_Q3, along_3, on_thing_Q, x_Q, rng)
    image_Q3 *= (1 - 0.12 * (x_Q**2 + y_Q**2))[:, None]
    image = image_Q3.reshape(side, _FINE, side, _FINE, 3).mean((1, 3))
    noisy = image + rng.normal(0, rng.uniform(0.004, 0.012), image.shape)
    return np.asarray((np.clip(noisy, 0, 1) * 255).astype(np.uint8))


def _light(
    thing: Thing,
    point_Q3: np.ndarray,
    normal_Q3: np.ndarray,
    lamp_3: np.ndarray,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """What falls on points from the lamp, which is as large as a window, and from all around."""
    direct_Q, around_Q = np.zeros(len(point_Q3)), np.zeros(len(point_Q3))
    lifted_Q3 = point_Q3 + 2e-3 * normal_Q3
    for _ in range(_RAYS):
        towards_Q3 = lamp_3 + rng.normal(0, 0.12, point_Q3.shape)
        direct_Q += np.clip(normal_Q3 @ lamp_3, 0, 1) * ~_blocked(thing, lifted_Q3, towards_Q3)
        ball_Q3 = rng.normal(size=point_Q3.shape)
        towards_Q3 = normal_Q3 + ball_Q3 / np.linalg.norm(ball_Q3, axis=1, keepdims=True)
        # From below comes what the table throws back.
        bright_Q = np.where(towards_Q3[:, 1] < 0, 1.0, 0.45)
        around_Q += bright_Q * np.where(_blocked(thing, lifted_Q3, towards_Q3), 0.15, 1.0)
    return direct_Q / _RAYS, around_Q / _RAYS


def _blocked(thing: Thing, point_Q3: np.ndarray, towards_Q3: np.ndarray) -> np.ndarray:
    """Whether the thing is in the way, bool [Q]."""
    blocked_Q = np.zeros(len(point_Q3), bool)
    # Far from it nothing is.
    near_Q = np.linalg.norm(point_Q3, axis=1) < 4
    for kind, centre, size in thing.solids:
        t_S, _ = hit(kind, (point_Q3[near_Q] - centre) / size, towards_Q3[near_Q] / size)
        blocked_Q[near_Q] |= (t_S > 1e-3) & np.isfinite(t_S)
    return blocked_Q


def _table(place_Q2: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A table's colour at places on it, [Q, 3]: of boards, cloth, or stone."""
    angle = rng.uniform(0, np.pi)
    u_Q, v_Q = (place_Q2 @ [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]).T
    waves_Q = _waves(place_Q2, 3.0, rng)
    kind = rng.choice(["boards", "cloth", "stone"], p=[0.5, 0.25, 0.25])
    if kind == "boards":
        board_Q = np.floor(u_Q / 0.7 + 50).astype(int)
        tone_Q = rng.uniform(0.8, 1.1, 200)[np.clip(board_Q, 0, 199)]
        grain_Q = np.sin(26 * u_Q + 5 * waves_Q + 1.5 * v_Q + 7 * tone_Q)
        seam_Q = np.abs(u_Q / 0.7 % 1 - 0.5) > 0.485
        wood = rng.choice([[0.62, 0.44, 0.28], [0.42, 0.28, 0.18], [0.75, 0.62, 0.45]])
        return np.asarray(
            (tone_Q * (1 + 0.07 * grain_Q) * np.where(seam_Q, 0.5, 1.0))[:, None] * wood
        )
    if kind == "cloth":
        cloth = rng.choice([[0.82, 0.8, 0.74], [0.45, 0.52, 0.58], [0.7, 0.62, 0.52]])
        weave_Q = np.sin(70 * u_Q) * np.sin(70 * v_Q)
        return np.asarray((1 + 0.06 * weave_Q + 0.08 * waves_Q)[:, None] * cloth)
    stone = rng.choice([[0.6, 0.6, 0.6], [0.36, 0.37, 0.39], [0.8, 0.78, 0.76]])
    vein_Q = np.exp(-6 * np.abs(np.sin(2 * u_Q + 2.5 * waves_Q)))
    return np.asarray((1 + 0.1 * waves_Q - 0.18 * vein_Q)[:, None] * stone)


def _before_wall(
    image_Q3: np.ndarray,
    point_Q3: np.ndarray,
    along_3: np.ndarray,
    on_thing_Q: np.ndarray,
    x_Q: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """The same, and behind the table's edge, out of focus, a wall."""
    forward = along_3[[0, 2]] / np.linalg.norm(along_3[[0, 2]])
    beyond_Q = point_Q3[:, [0, 2]] @ forward - rng.uniform(1.5, 3.5)
    share_Q = np.where(on_thing_Q, 0, 1 / (1 + np.exp(-np.clip(beyond_Q / 0.12, -50, 50))))
    wall = rng.choice([[0.72, 0.7, 0.66], [0.5, 0.56, 0.58], [0.62, 0.54, 0.46]])
    bright_Q = 0.75 + 0.2 * np.tanh(beyond_Q / 3) + 0.12 * np.sin(2 * x_Q + rng.uniform(0, 6))
    return np.asarray((1 - share_Q[:, None]) * image_Q3 + (share_Q * bright_Q)[:, None] * wall)


def _waves(place_Q2: np.ndarray, pitch: float, rng: np.random.Generator) -> np.ndarray:
    """Smooth numbers from -1 to 1, [Q]."""
    directions, phases = rng.normal(0, pitch, (2, 5)), rng.uniform(0, 6, 5)
    return np.asarray(np.sin(place_Q2 @ directions + phases).mean(1))


def make_thing(rng: np.random.Generator) -> Thing:
    """A thing at random."""
    solids = []
    for number in range(rng.integers(1, 4)):
        centre = rng.uniform(-0.45, 0.45, 3) if number else np.zeros(3)
        size = rng.uniform(0.3, 0.75, 3) if number == 0 else rng.uniform(0.15, 0.4, 3)
        solids.append((str(rng.choice(_SOLIDS)), centre, size))
    direction = rng.normal(size=3)
    colours = _COLOURS[rng.choice(len(_COLOURS), 2, replace=False)]
    return Thing(
        tuple(solids),
        str(rng.choice(_PATTERNS)),
        direction / np.linalg.norm(direction),
        rng.uniform(5, 14),
        np.clip(colours + rng.normal(0, 0.05, (2, 3)), 0, 1),
    )


def hit(kind: str, o_Q3: np.ndarray, d_3: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far rays o + t d run until a solid of half size 1, infinity without end; and normals.

    ``d_3`` is one direction for all, or that of each, [Q, 3].
    """
    if kind == "box":
        step = np.where(np.abs(d_3) < 1e-9, 1e-9, d_3)
        near_Q3, far_Q3 = (-np.sign(step) - o_Q3) / step, (np.sign(step) - o_Q3) / step
        t_Q, axis_Q = near_Q3.max(1), near_Q3.argmax(1)
        n_Q3 = -np.eye(3)[axis_Q] * np.sign(step)
        return np.where(t_Q <= far_Q3.min(1), t_Q, np.inf), n_Q3
    keep = np.array([1.0, 1.0, 1.0]) if kind == "ball" else np.array([1.0, 0.0, 1.0])
    a, b_Q, c_Q = (d_3**2) @ keep, (o_Q3 * d_3) @ keep, (o_Q3**2) @ keep - 1
    root_Q = b_Q**2 - a * c_Q
    t_Q = (-b_Q - np.sqrt(np.maximum(root_Q, 0))) / a
    t_Q = np.where(root_Q >= 0, t_Q, np.inf)
    at_Q3 = o_Q3 + np.where(np.isfinite(t_Q), t_Q, 0)[:, None] * d_3
    n_Q3 = at_Q3 * keep
    if kind == "ball":
        return t_Q, n_Q3
    t_Q = np.where(np.abs(at_Q3[:, 1]) <= 1, t_Q, np.inf)
    slope = np.where(np.abs(d_3[..., 1]) > 1e-9, d_3[..., 1], 1e-9)
    lid_Q = (-np.sign(slope) - o_Q3[:, 1]) / slope
    on_lid_Q = ((o_Q3 + lid_Q[:, None] * d_3) ** 2 @ keep <= 1) & (lid_Q < t_Q)
    lid_Q3 = -np.sign(slope)[..., None] * [0.0, 1.0, 0.0]
    n_Q3 = np.where(on_lid_Q[:, None], lid_Q3, n_Q3)
    return np.where(on_lid_Q, lid_Q, t_Q), n_Q3


def colour_of(thing: Thing, point_S3: np.ndarray) -> np.ndarray:
    """The pattern where the surface cuts it, [S, 3]."""
    along_S = point_S3 @ thing.direction * thing.pitch
    mix_S = {
        "stripes": np.sin(along_S) > 0,
        "checks": (np.sin(point_S3 * thing.pitch) > 0).sum(1) % 2 == 1,
        "rings": np.sin(np.linalg.norm(point_S3, axis=1) * thing.pitch * 1.5) > 0,
        "spots": np.sin(point_S3 * thing.pitch).prod(1) > 0.25,
        "marble": 0.5 + 0.5 * np.sin(along_S + 2 * np.sin(point_S3 * 4).sum(1)),
        "plain": np.zeros(len(point_S3)),
    }[thing.pattern].astype(float)[:, None]
    return np.asarray((1 - mix_S) * thing.colours[0] + mix_S * thing.colours[1])


def rotation(degrees: np.ndarray) -> np.ndarray:
    """About the y, then the x, then the z axis."""
    (cy, cx, cz), (sy, sx, sz) = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return np.asarray(z @ x @ y)


if __name__ == "__main__":
    main()
