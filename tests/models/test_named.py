"""Backbones by name, as people take them: against what timm itself makes of the same weights."""

import logging
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import fedss
from fedss import Config, ConfigError
from fedss.flower.settings import explicit
from fedss.models import build_embedder
from fedss.models.backbones import weights_size
from fedss.models.frozen import blocks, freeze_
from fedss.training.build import load_data
from tests.installed import needs_timm, timm

pytestmark = needs_timm

DINO, DINO_REG = "vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"
SIGLIP, SIGLIP_MEAN = "vit_base_patch16_siglip_224", "vit_base_patch16_siglip_gap_224"

# A size to test with that needs no long time; what last-1 is, and what last-2 adds.
NAMED = {
    "tf_efficientnet_lite0": (64, r"blocks\.6\.|conv_head|bn2", r"blocks\.5\."),
    "tf_efficientnet_lite1": (64, r"blocks\.6\.|conv_head|bn2", r"blocks\.5\."),
    "tf_efficientnet_lite2": (64, r"blocks\.6\.|conv_head|bn2", r"blocks\.5\."),
    "mobilenetv3_small_100": (64, "conv_head", r"blocks\.5\."),
    "mobilenetv3_large_100": (64, "conv_head", r"blocks\.6\."),
    "resnet50": (64, r"layer4\.", r"layer3\."),
    "vit_small_patch16_224": (48, r"blocks\.11\.|norm\.", r"blocks\.10\."),
    DINO: (42, r"blocks\.11\.|norm\.", r"blocks\.10\."),
    DINO_REG: (42, r"blocks\.11\.|norm\.", r"blocks\.10\."),
    SIGLIP: (48, r"attn_pool\.", r"blocks\.11\.|norm\."),
    SIGLIP_MEAN: (48, r"blocks\.11\.|norm\.|fc_norm\.", r"blocks\.10\."),
}
LARGE = (SIGLIP, SIGLIP_MEAN)


def by_name(**marks: Any) -> Any:
    slow = {name: pytest.mark.slow for name in marks.get("slow", LARGE)}
    return pytest.mark.parametrize("name", [pytest.param(n, marks=slow.get(n, ())) for n in NAMED])


@cache
def published(name: str) -> nn.Module:
    """A model as one would download it: at its own size, with weights of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model: nn.Module = timm.create_model(name)
        # Those of a vision transformer begin as constants, which no test would notice.
        for parameter in model.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("weights")

    def write(name: str) -> Path:
        path = folder / f"{name}.safetensors"
        if not path.exists():
            save_file({n: t.clone() for n, t in published(name).state_dict().items()}, path)
        return path

    return write


def build(name: str, weights: Path | None, size: int, **more: Any) -> fedss.Embedder:
    how = {"channels": 3, "image_size": size, "embedding_size": 16, "seed": 0, **more}
    return build_embedder(f"timm:{name}", weights=weights, **how)


def trained_names(net: nn.Module) -> set[str]:
    return {name for name, p in net.named_parameters() if p.requires_grad}


@by_name()
def test_features_are_those_of_timm_at_another_size(name: str, weights: Any) -> None:
    """Pooling, prefix tokens, resized positions and all; and what the last block learns from."""
    size, last, _ = NAMED[name]
    ours = build(name, weights(name), size, trainable="last-1").train()
    stated = timm.get_pretrained_cfg(name)
    theirs = timm.create_model(
        name,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(weights(name))},
        num_classes=0,
        **({"img_size": size} if stated.fixed_input_size else {}),
    )
    pixels = torch.rand(2, 3, size, size)
    mean, std = (torch.tensor(values)[:, None, None] for values in (stated.mean, stated.std))
    with torch.no_grad():
        expected = theirs.eval()((pixels - mean) / std)
        assert torch.allclose(ours.backbone((pixels - mean) / std), expected, rtol=1e-4, atol=1e-5)
        unit = nn.functional.normalize(ours.projection(expected))
    h = ours(pixels)
    assert torch.allclose(h, unit, rtol=1e-4, atol=1e-4)
    h[:, 0].sum().backward()
    for path, parameter in ours.named_parameters():
        learns = path == "projection.weight" or re.match(rf"backbone\.({last})", path)
        assert parameter.requires_grad == bool(learns), path
        assert (parameter.grad is not None and bool(parameter.grad.any())) == bool(learns), path


@by_name(slow=())
def test_the_last_blocks_are_what_the_page_says(name: str) -> None:
    _, last, before = NAMED[name]
    with torch.device("meta"):
        net = timm.create_model(name, num_classes=0)
    names = {n for n, _ in net.named_parameters()}
    freeze_(net, "last-2")
    assert trained_names(net) == {n for n in names if re.match(f"{last}|{before}", n)}
    freeze_(net, "last-1")
    assert trained_names(net) == {n for n in names if re.match(last, n)}
    page = Path(fedss.__file__).parents[1] / "docs" / "backbones.md"
    (row,) = [line for line in page.read_text().splitlines() if line.startswith(f"| `{name}` |")]
    cells = [cell.strip(" `") for cell in row.strip("|").split("|")]
    count, size = (
        f"{sum(p.numel() for p in net.parameters()) / 1e6:.1f}",
        weights_size(f"timm:{name}"),
    )
    features = getattr(net, "head_hidden_size", None) or net.num_features
    assert cells[1:5] == [str(size), str(features), count, str(len(blocks(net)))]


@by_name(slow=NAMED)
def test_each_trains_end_to_end(name: str, weights: Any, photos: Path, tmp_path: Path) -> None:
    how: dict[str, Any] = {"channels": 3, "embedding_size": 64, "trainable": "last-2"}
    size = NAMED[name][0]
    config = Config(
        data="csv",
        data_path=str(photos),
        image_size=size,
        backbone=f"timm:{name}",
        weights=str(weights(name)),
        rounds=1,
        clients_per_round=1,
        local_steps=1,
        batch_size=2,
        sample_size=4,
        client_lr=0.001,
        workers=1,
        **how,
    )
    before = build(name, weights(name), size, **how)
    after = fedss.train(config, tmp_path / "run").embedder.state_dict()
    moved = {n for n, t in before.state_dict().items() if not torch.equal(t, after[n])}
    assert {"projection.weight"} < moved <= trained_names(before)


def test_files_of_dinov2_under_their_first_names(weights: Any, tmp_path: Path) -> None:
    """With a mask token, and registers whose class token's position is not added yet."""
    state = {n: t.clone() for n, t in published(DINO_REG).state_dict().items()}
    place = torch.full_like(state["cls_token"], 0.25)
    state["register_tokens"] = state.pop("reg_token")
    state["pos_embed"] = torch.cat([place, state["pos_embed"]], 1)
    state["cls_token"] = state["cls_token"] - place
    state["mask_token"] = torch.zeros(1, 384)
    torch.save(state, tmp_path / "dinov2.pth")
    theirs = build(DINO_REG, tmp_path / "dinov2.pth", 42).backbone.state_dict()
    for name, tensor in build(DINO_REG, weights(DINO_REG), 42).backbone.state_dict().items():
        assert torch.allclose(theirs[name], tensor, atol=1e-6), name


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        (DINO, 64, r"14 x 14 pixels; expected a multiple of 14, such as 56 or 70, got 64, .* 8;"),
        ("vit_small_patch16_224", 30, r"such as 16 or 32, got 30, .* last 14; .*--image-size 224$"),
        ("test_vit", 70, r"Input height \(70\) should be divisible by patch size \(16\)"),
    ],
)
def test_patches_that_do_not_fill_an_image_are_refused(name: str, size: int, message: str) -> None:
    """Most of timm's models take such images, and do not look at their edges."""
    with pytest.raises(ConfigError, match=message) as caught:
        build(name, None, size)
    assert "\n" not in str(caught.value)


# --- the size of images, where nobody says it

TINY = "timm:test_vit"  # made for 160 px


def test_the_size_is_that_of_training_and_of_models_of_timm_alone() -> None:
    stated = timm.get_pretrained_cfg("resnet50")
    assert stated.test_input_size[-1] > stated.input_size[-1] == weights_size("timm:resnet50")
    assert weights_size("timm:tf_efficientnet_lite2") == 260
    assert weights_size("conv4-32") is weights_size("package.module:function") is None
    with pytest.raises(ConfigError, match=r'no model "resnet51"; near it: resnet51q'):
        weights_size("timm:resnet51")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gray images of 20 pixels: two clients, four classes, and two to test with."""
    folder = tmp_path_factory.mktemp("gray")
    lines = ["image,label,client,split"]
    for number in range(18):
        label, split = number % 6, "test" if number % 6 > 3 else "train"
        Image.new("L", (20, 20), 12 * number).save(folder / f"{number}.png")
        lines.append(f"{number}.png,class {label},client {label % 2},{split}")
    (folder / "images.csv").write_text("\n".join(lines) + "\n")
    return folder / "images.csv"


def test_trained_weights_get_images_as_they_expect_them(photos: Path, weights: Any) -> None:
    of_csv: dict[str, Any] = {"data": "csv", "data_path": str(photos)}
    trained = {**of_csv, "backbone": TINY, "weights": str(weights("test_vit"))}
    for values, shape in (
        (of_csv, (1, 64, 64)),
        ({**of_csv, "backbone": TINY}, (1, 64, 64)),
        (trained, (3, 160, 160)),
        ({**trained, "image_size": 32}, (3, 32, 32)),
        ({**trained, "channels": 1}, (1, 160, 160)),
    ):
        assert load_data(Config(**values)).train.pixels.shape[1:] == shape
    glyphs = {"data": "glyphs", "glyphs_classes": 20, "glyphs_clients": 8}
    small = Config(**{**trained, **glyphs, "data_path": None})
    assert load_data(small).train.pixels.shape[1:] == (1, 160, 160)
    # In a federation, where no server sees an image, it is written down.
    told = explicit(Config(**trained))
    assert (told.image_size, told.channels) == (160, 3)


def test_small_images_are_warned_of_once(
    photos: Path, weights: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "fedss")
    config = Config(
        data="csv",
        data_path=str(photos),
        image_size=32,
        backbone=TINY,
        weights=str(weights("test_vit")),
        trainable="head",
        rounds=1,
        clients_per_round=1,
        sample_size=4,
    )
    fedss.compare(config, ["full", "pos-only"], [0], tmp_path / "small")
    (line,) = [r.getMessage() for r in caplog.records if "made for" in r.getMessage()]
    assert line.startswith(f"the weights of {TINY} were made for images of 160 px and get 32:")
    assert "--image-size 160" in line
    caplog.clear()
    fedss.train(Config(data="csv", data_path=str(photos), image_size=32, rounds=1), tmp_path / "no")
    assert not caplog.records
