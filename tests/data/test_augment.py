"""Changes of training images: against Pillow's and torchvision's, and who may see which."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

import fedss
from fedss import Config, RunFolderError
from fedss.core.client import prepare
from fedss.data.augment import AUGMENTATIONS, change, draw_parameters, preview
from fedss.seeds import generator
from tests.core.test_algorithm import plan
from tests.engines.test_stacked import assert_near, ragged, train, work
from tests.installed import needs_torchvision

PHOTOS, DRAWINGS = AUGMENTATIONS["photos"], AUGMENTATIONS["drawings"]
BOTH = pytest.mark.parametrize("augmentation", [PHOTOS, DRAWINGS], ids=["photos", "drawings"])


def make_images(count: int, channels: int = 3, side: int = 20, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (count, channels, side, side), dtype=np.uint8))


def letter(side: int = 28) -> torch.Tensor:
    """An F, black on white: another letter in a mirror."""
    image = np.full((side, side), 255, np.uint8)
    image[4:24, 8:11] = image[4:7, 8:20] = image[12:15, 8:17] = 0
    return torch.from_numpy(image)[None]


@BOTH
@given(st.integers(0, 2**32), st.sampled_from([1, 3]), st.integers(8, 40), st.integers(1, 4))
def test_images_stay_images_and_each_depends_on_its_own_draw(
    augmentation, seed, channels, side, count
):
    pixels = make_images(count, channels, side, seed)
    drawn = draw_parameters(augmentation, count, np.random.default_rng(seed))
    for values, (low, high) in zip(drawn.T, augmentation.ranges, strict=True):
        assert ((low <= values) & (values <= high)).all()
    before, state = pixels.clone(), torch.get_rng_state()
    together = change(augmentation, pixels, drawn)
    assert together.dtype == torch.uint8
    assert together.shape == pixels.shape
    assert torch.equal(pixels, before)
    assert torch.equal(torch.get_rng_state(), state)
    for i in range(count):
        alone = change(augmentation, pixels[i : i + 1], drawn[i : i + 1])
        assert torch.equal(together[i : i + 1], alone)
    stacked = change(augmentation, torch.stack([pixels, pixels]), np.stack([drawn, drawn]))
    assert torch.equal(stacked, torch.stack([together, together]))


def test_the_ranges_are_the_documented_ones():
    """docs/backbones.md has them in words."""
    assert [tuple(np.round(r, 9)) for r in PHOTOS.ranges] == [
        (0.5, 1.0),
        tuple(np.round(np.log([3 / 4, 4 / 3]), 9)),
        *[(0.0, 1.0)] * 3,
        *[(0.8, 1.2)] * 3,
    ]
    assert [tuple(np.round(r, 9)) for r in DRAWINGS.ranges] == [
        (-10.0, 10.0),
        *[(-0.07, 0.07)] * 2,
        tuple(np.round(np.log([0.85, 1.15]), 9)),
        *[(-8.0, 8.0)] * 2,
    ]


def test_no_change_is_the_same_bits():
    pixels = make_images(2)
    assert torch.equal(change(DRAWINGS, pixels, np.zeros((2, 6))), pixels)
    as_it_is = np.array([1.0, 0, 0.5, 0.5, 1.0, 1, 1, 1])
    assert torch.equal(change(PHOTOS, pixels, np.stack([as_it_is] * 2)), pixels)
    mirrored = np.array([1.0, 0, 0.5, 0.5, 0.0, 1, 1, 1])
    assert torch.equal(change(PHOTOS, pixels, np.stack([mirrored] * 2)), pixels.flip(-1))


def test_photos_are_what_pillow_makes_of_these_numbers():
    pixels = make_images(1)
    drawn = np.array([[0.5, np.log(1.2), 0.3, 0.9, 0.2, 1.1, 0.85, 1.15]])
    width, height = round(20 * (0.5 * 1.2) ** 0.5), round(20 * (0.5 / 1.2) ** 0.5)
    top, left = int(0.9 * (21 - height)), int(0.3 * (21 - width))
    image = Image.fromarray(pixels[0].permute(1, 2, 0).numpy())
    part = image.crop((left, top, left + width, top + height)).resize(
        (20, 20), Image.Resampling.BILINEAR
    )
    part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    part = ImageEnhance.Contrast(ImageEnhance.Brightness(part).enhance(1.1)).enhance(0.85)
    expected = torch.from_numpy(np.array(ImageEnhance.Color(part).enhance(1.15))).permute(2, 0, 1)
    # Pillow rounds to bytes after each step, its mean of the contrast too.
    assert (change(PHOTOS, pixels, drawn)[0].int() - expected.int()).abs().max() <= 3


def test_photos_need_nothing_but_torch(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchvision", None)  # an import of it fails
    drawn = draw_parameters(PHOTOS, 2, np.random.default_rng(0))
    assert change(PHOTOS, make_images(2), drawn).shape == (2, 3, 20, 20)


@needs_torchvision
def test_photos_are_what_torchvision_makes_of_these_numbers():
    from torchvision.transforms.v2 import functional

    pixels = make_images(1)
    drawn = np.array([[0.5, np.log(1.2), 0.3, 0.9, 0.2, 1.1, 0.85, 1.15]])
    width, height = round(20 * (0.5 * 1.2) ** 0.5), round(20 * (0.5 / 1.2) ** 0.5)
    top, left = int(0.9 * (21 - height)), int(0.3 * (21 - width))
    part = functional.resized_crop(
        pixels.float() / 255, top, left, height, width, [20, 20], antialias=True
    )
    part = functional.horizontal_flip(part)
    part = functional.adjust_brightness(part, 1.1)
    part = functional.adjust_saturation(functional.adjust_contrast(part, 0.85), 1.15)
    found = change(PHOTOS, pixels, drawn).float()
    # Ours are cut out and resized as bytes: a level of rounding, times the factors.
    assert (found - 255 * part).abs().max() <= 2


@needs_torchvision
def test_drawings_are_what_torchvision_makes_of_these_numbers():
    from torchvision.transforms.v2 import functional

    pixels = torch.full((1, 1, 20, 20), 230, dtype=torch.uint8)
    pixels[..., 3:17, 3:17] = make_images(1, 1, 14)
    drawn = np.array([[7.0, 0.1, -0.05, np.log(0.9), 5.0, -3.0]])
    # On a larger sheet: torchvision's fill darkens pixels that are half inside.
    sheet = functional.pad(pixels.float(), [20], fill=230.0)
    moved = functional.affine(sheet, 7.0, [2.0, -1.0], 0.9, [5.0, -3.0], interpolation="bilinear")
    expected = functional.center_crop(moved, [20, 20])
    assert (change(DRAWINGS, pixels, drawn).float() - expected).abs().max() <= 0.51


def test_drawings_keep_their_background_and_are_never_mirrored():
    blank = torch.full((50, 1, 28, 28), 201, dtype=torch.uint8)
    rng = np.random.default_rng(0)
    assert torch.equal(change(DRAWINGS, blank, draw_parameters(DRAWINGS, 50, rng)), blank)
    count, original = 300, letter().float()
    versions = {}
    for name, augmentation in (("photos", PHOTOS), ("drawings", DRAWINGS)):
        drawn = draw_parameters(augmentation, count, rng)
        changed = change(augmentation, letter().expand(count, 1, 28, 28), drawn).float()

        def nearest(other: torch.Tensor, changed: torch.Tensor = changed) -> torch.Tensor:
            """The smallest distance over small moves of the other."""
            moves = [(x, y) for x in range(-4, 5, 2) for y in range(-4, 5, 2)]
            moved = [other.roll(move, (1, 2)) for move in moves]
            return torch.stack([(changed - m).square().sum((1, 2, 3)) for m in moved]).amin(0)

        versions[name] = nearest(original.flip(-1)) < nearest(original)
    assert not versions["drawings"].any()
    assert 0.4 * count < versions["photos"].sum() < 0.6 * count


@BOTH
def test_what_a_client_sees_depends_on_seed_round_and_client_alone(augmentation):
    told = replace(plan(batch_size=2, epochs=2), augmentation=augmentation)
    plain = train("tiny", told)
    torch.manual_seed(5)
    few = train("tiny", told, np.array([1, 4]))
    for one, other in zip(few, [plain[1], plain[4]], strict=True):
        assert torch.equal(one.backbone_delta_P, other.backbone_delta_P)
        assert torch.equal(one.rows_delta_SD, other.rows_delta_SD)
    assert_near(train("tiny", told, stack=3), plain, 1e-5)
    without = train("tiny", replace(told, augmentation=None))
    for one, other in zip(plain, without, strict=True):
        assert not torch.equal(one.backbone_delta_P, other.backbone_delta_P)


def test_rounds_and_clients_differ():
    told = replace(plan(batch_size=2), augmentation=DRAWINGS)
    images = ragged([3, 4])

    def drawn(round: int) -> list[np.ndarray]:
        of_round = replace(told, round=round)
        learners = [prepare(of_round, *one, torch.device("cpu")) for one in work(images, of_round)]
        return [np.concatenate([batch[2] for batch in learner.batches]) for learner in learners]

    (first, second), again, later = drawn(0), drawn(0), drawn(1)
    assert [first.shape, second.shape] == [(3, 6), (4, 6)]
    assert np.array_equal(first, again[0])
    assert not set(first.ravel()) & {*second.ravel(), *later[0].ravel(), *later[1].ravel()}


def test_every_draw_is_another():
    draws = [
        draw_parameters(DRAWINGS, 3, generator(seed, "augment", round, client))
        for seed, round, client in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))
    ]
    assert len({tuple(drawn.ravel()) for drawn in draws}) == 4
    assert len(np.unique(draws[0])) == draws[0].size


TINY = {
    "glyphs_classes": 24,
    "glyphs_clients": 8,
    "image_size": 16,
    "backbone": "conv4-4",
    "embedding_size": 6,
    "sample_size": 8,
    "rounds": 2,
    "clients_per_round": 3,
    "local_steps": 2,
}


def test_a_run_with_augmentation(tmp_path: Path):
    """The same bits with any number of threads; tests see images as they are; a preview."""
    bits = []
    for workers in (1, 2):
        out = tmp_path / str(workers)
        config = Config(**TINY, augment="drawings", workers=workers)
        run = fedss.train(config, out, on_round=lambda record: None)
        bits.append((out / "model" / "model.safetensors").read_bytes())
    assert bits[0] == bits[1]
    data = fedss.load_data(config)
    found = fedss.evaluate(run.embedder, data.test)
    assert run.summary["map_at_10"] == pytest.approx(found.map_at_10, abs=1e-6)
    with np.load(out / "augmentation.npz") as file:
        pixels = file["pixels"]
    assert pixels.shape == (8, 6, 1, 16, 16)
    originals = {image.tobytes() for image in data.train.pixels}
    assert all(image.tobytes() in originals for image in pixels[:, 0])
    assert all(len({p.tobytes() for p in row}) == 6 for row in pixels)
    page = fedss.write_report(out).read_text()
    assert "What clients train on" in page
    assert page.count('alt="Changed, version 5"') == 8
    (out / "augmentation.npz").write_bytes(b"PK")
    with pytest.raises(RunFolderError, match=r"augmentation.npz: cannot be read.*delete it"):
        fedss.write_report(out)
    np.savez(out / "augmentation.npz", pixels=np.zeros((2, 3), np.uint8))
    with pytest.raises(RunFolderError, match=r"pixels: expected \[P, V"):
        fedss.write_report(out)
    (out / "augmentation.npz").unlink()
    assert "What clients train on" not in fedss.write_report(out).read_text()


def test_a_preview_of_few_images_and_with_another_seed():
    few = make_images(3).numpy()
    assert preview(PHOTOS, few, 0) == preview(PHOTOS, few, 0) != preview(PHOTOS, few, 1)
