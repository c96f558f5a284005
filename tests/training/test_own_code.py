"""Samplers, losses and augmentations by their names: the same runs as with what they name."""

import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import fedss
from fedss.data.augment import change, draw_parameters, find_augmentation
from tests.installed import needs_torchvision
from tests.own import forget

PARTS = """
import random

import numpy as np
import torch

from fedss.losses.softmax import sampled_softmax
from fedss.sampling.samplers import Sampler, draw_uniform


def draw(own_P, n, m, rng):
    return draw_uniform(own_P, n, (m + 1) // 2, rng)


sampler = Sampler("half", "half as many", draw=draw)


def loss(h_BD, rows_SD, target_B, sample, scoring, absent):
    return 2 * sampled_softmax(h_BD, rows_SD, target_B, sample, scoring, absent)


def flip(image):
    assert image.dtype == torch.uint8
    turned = image.flip(-1) if torch.rand(()) < 0.5 else image
    turned = turned.roll(int(np.random.randint(3)), -1)
    return turned if random.random() < 0.5 else 255 - turned


calls = []


def counts(image):
    calls.append(1)
    return (image + len(calls)).to(torch.uint8)


def normalizes(image):
    return image / 255


def crops(image):
    return image[:, 1:, 1:]


def fails(image):
    raise KeyError("no such")


class Turn:
    def __call__(self, image):
        return image.rot90(1, (-1, -2))


number = 4
"""

SMALL = dict(
    data="glyphs",
    glyphs_classes=40,
    glyphs_clients=8,
    image_size=12,
    backbone="conv4-4",
    embedding_size=8,
    rounds=2,
    clients_per_round=4,
    sample_size=12,
    eval_every=0,
    workers=1,
)


@pytest.fixture(autouse=True)
def parts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("parts.py").write_text(PARTS)
    yield
    forget(tmp_path)


def trained(name, objects=(), **settings):
    run = fedss.train(fedss.Config(**{**SMALL, **settings}), name, **dict(objects))
    return {key: tensor.clone() for key, tensor in run.embedder.state_dict().items()}


def same(one, other) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize(
    ("field", "name", "found"),
    [
        ("sampler", "parts:sampler", "sampler"),
        ("sampler", "parts:draw", "sampler"),
        ("objective", "parts:loss", "loss"),
    ],
)
def test_a_name_trains_as_the_object_does(field, name, found):
    named = trained("named", **{field: name})
    given = trained("given", objects={field: getattr(sys.modules["parts"], found)})
    assert same(named, given)
    assert not same(named, trained("plain"))


def test_a_run_goes_on_with_the_same_file_alone():
    settings = dict(sampler="parts:draw", objective="parts:loss", augment="parts:flip")
    trained("run", **settings)
    assert fedss.load("run").spec.code is None  # the model needs none of it
    again = fedss.train(fedss.Config(**{**SMALL, **settings}), "run")
    assert again.already_done
    Path("parts.py").write_text(f"{PARTS}\n")
    with pytest.raises(fedss.RunFolderError, match="was made with another parts:draw: its file"):
        trained("run", **settings)
    Path("parts.py").write_text(PARTS)
    with pytest.raises(fedss.RunFolderError, match="sampler: 'parts:draw' there, 'uniform' now"):
        trained("run", **{**settings, "sampler": "uniform"})


def test_an_augmentation_depends_on_seed_round_and_client_alone():
    """Not on threads, stacks, or what else draws from the process's generators."""
    one = trained("one", augment="parts:flip")
    torch.manual_seed(5)
    random.seed(5)
    assert same(one, trained("threads", augment="parts:flip", workers=3))
    plain = trained("plain")
    stacked = trained("stacked", augment="parts:flip", stack=2)

    def farthest(other):
        return max(float((tensor - one[name]).abs().max()) for name, tensor in other.items())

    # Where pixels are equal, rounding decides which of them a pool takes.
    assert farthest(stacked) < 5e-3 < farthest(plain)
    assert (Path("one") / "augmentation.npz").exists()


def test_generators_are_seeded_for_each_image_and_left_as_they_were():
    augmentation = find_augmentation("parts:flip")
    assert augmentation is not None
    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(rng.integers(0, 256, (40, 1, 5, 5), np.uint8))
    drawn = draw_parameters(augmentation, 40, rng)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    kept = pixels.clone()
    whole = change(augmentation, pixels, drawn)
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    assert torch.equal(pixels, kept)
    assert len({image.numpy().tobytes() for image in whole}) == 40
    assert len({number for (number,) in drawn.tolist()}) == 40
    # Each by itself, in another order, and from many threads at once.
    order = rng.permutation(40).tolist()
    single = {i: change(augmentation, pixels[i : i + 1], drawn[i : i + 1])[0] for i in order}
    assert all(torch.equal(single[i], whole[i]) for i in order)
    with ThreadPoolExecutor(4) as pool:
        results = [*pool.map(lambda _: change(augmentation, pixels, drawn), range(8))]
    assert all(torch.equal(result, whole) for result in results)
    # From the formula: what one image is with its own number.
    torch.manual_seed(int(drawn[3, 0]))
    random.seed(int(drawn[3, 0]))
    np.random.seed(int(drawn[3, 0]) % 2**32)  # noqa: NPY002
    assert torch.equal(sys.modules["parts"].flip(pixels[3]), whole[3])


@pytest.mark.parametrize(
    ("field", "name", "message"),
    [
        ("sampler", "parts:number", "sampler parts:number: expected .*Sampler or a function draw"),
        ("sampler", "parts:Turn", "sampler parts:Turn: expected .* got type"),
        ("objective", "parts:number", "objective parts:number: expected a function.* got int"),
        ("objective", "parts:flip", "objective 'parts:flip' fails: TypeError"),
        (
            "augment",
            "parts:number",
            r"augment parts:number: expected what takes an image.*int",
        ),
        ("augment", "parts:Turn", "got the class Turn; name an object of it"),
        ("augment", "parts:counts", "parts:counts: gives another image when it is asked again"),
        (
            "augment",
            "parts:normalizes",
            r"uint8 \[1, 12, 12\], got float32 \[1, 12, 12\]",
        ),
        ("augment", "parts:crops", r"got uint8 \[1, 11, 11\]; leave out"),
        ("augment", "parts:fails", "augment parts:fails fails: KeyError: 'no such'"),
        ("augment", "parts:gone", "parts:gone: .*parts.py has no 'gone'"),
    ],
)
def test_what_is_none_is_refused_before_training(field, name, message):
    with pytest.raises(fedss.ConfigError, match=message):
        trained("run", **{field: name})
    assert not Path("run").exists()


def test_a_method_of_its_own_loss_takes_no_other():
    with pytest.raises(fedss.ConfigError, match="'parts:loss': method fedaws is what its"):
        trained("run", method="fedaws", objective="parts:loss")


@needs_torchvision
def test_transforms_of_torchvision_are_taken():
    text = (
        "from torchvision.transforms import v2\n"
        "change = v2.Compose([v2.RandomResizedCrop(12), v2.RandomHorizontalFlip(),\n"
        "    v2.RandomErasing(p=1.0)])\n"
    )
    Path("vision.py").write_text(text)
    one = trained("one", augment="vision:change")
    assert same(one, trained("two", augment="vision:change", workers=2))
    assert not same(one, trained("plain"))
