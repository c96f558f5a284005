"""Trained weights from a file, what is frozen, and what that spares: against timm itself."""

import json
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fedss
from fedss import Config, ConfigError, RunFolderError
from fedss.cli import main
from fedss.errors import QuorumError
from fedss.flower.messages import TRAIN
from fedss.models import (
    Embedder,
    build_embedder,
    conv4,
    flatten_,
    frozen_fingerprint,
    load_embedder,
    save_embedder,
)
from fedss.models.frozen import blocks, freeze_
from fedss.models.weights import weights_fingerprint
from tests.flower.test_engine import photos
from tests.flower_grid import ProcessGrid, digests
from tests.installed import needs_timm, timm
from tests.sites import federate, nodes, settings

__all__ = ["photos"]

pytestmark = needs_timm

RESNET, VIT = "test_resnet", "test_vit"


def trained(name: str, seed: int = 3, **how: Any) -> nn.Module:
    """A timm model, classifier and all, whose every number is its own."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: nn.Module = timm.create_model(name, **how)
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) * 0.1 + 0.02)
    return model.eval()


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def build(name: str, weights: Path | None = None, size: int = 32, **more: Any) -> Embedder:
    how = {"channels": 3, "image_size": size, "embedding_size": 5, "seed": 0, **more}
    return build_embedder(f"timm:{name}", weights=weights, **how)


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "resnet.safetensors"
    save_file(state(trained(RESNET)), path)
    return path


# --- weights


def prefixed(model: nn.Module) -> dict[str, torch.Tensor]:
    return {f"module.{name}": tensor for name, tensor in state(model).items()}


@pytest.mark.parametrize(
    "kind", ["safetensors", "plain", "state_dict", "model", "half", "all half"]
)
def test_weights_are_those_of_timm_in_eval_mode(kind: str, tmp_path: Path) -> None:
    full = trained(RESNET)
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pth")
    if kind == "safetensors":
        save_file(state(full), path)
    elif kind in ("half", "all half"):
        counts = kind == "all half"  # num_batches_tracked as well
        halved = {n: t.half() if t.ndim or counts else t for n, t in state(full.half()).items()}
        torch.save(halved, path)
        full = full.float()
    else:
        wrapped = {"state_dict": {"state_dict": prefixed(full), "epoch": 7}, "plain": state(full)}
        torch.save({**wrapped, "model": {"model": state(full)}}[kind], path)
    embedder = build(RESNET, path).train()
    pixels = torch.rand(4, 3, 32, 32)
    expected = full.forward_head(
        full.forward_features(
            (pixels - embedder.mean[:, None, None]) / embedder.std[:, None, None]
        ),
        pre_logits=True,
    )
    x = (pixels - embedder.mean[:, None, None]) / embedder.std[:, None, None]
    assert torch.allclose(embedder.backbone(x), expected, rtol=1e-5, atol=1e-6)
    published = full.pretrained_cfg
    assert embedder.mean.tolist() == pytest.approx(published["mean"])
    assert embedder.std.tolist() == pytest.approx(published["std"])
    assert embedder.spec.weights == weights_fingerprint(path)


@pytest.mark.parametrize("name, channels", [(RESNET, 1), (VIT, 3), (VIT, 1)])
def test_other_sizes_and_gray_images_get_what_timm_makes_of_them(
    name: str, channels: int, tmp_path: Path
) -> None:
    path = tmp_path / "w.safetensors"
    save_file(state(trained(name)), path)
    ours = build(name, path, size=48, channels=channels)
    how = {"img_size": 48} if name == VIT else {}
    theirs = timm.create_model(
        name,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(path)},
        num_classes=0,
        in_chans=channels,
        **how,
    )
    x = torch.rand(3, channels, 48, 48)
    assert torch.allclose(ours.backbone(x), theirs.eval()(x), rtol=1e-5, atol=1e-6)


def test_weights_of_another_architecture_are_listed(resnet: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        build("resnet18", resnet)
    text = str(caught.value)
    assert "does not hold those of timm:resnet18 for images of 3 channels" in text
    theirs, ours = (
        {n for n in state(timm.create_model(name, num_classes=0)) if "tracked" not in n}
        for name in ("resnet18", RESNET)
    )
    assert f"{len(theirs - ours)} missing (" in text
    assert f"{len(ours - theirs)} left over (" in text
    lists = re.findall(r"[:;] \d+ [a-z ]+ \(([^)]*)\)", text)
    assert len(lists) == 3
    assert [len(names.split(" and ")[0].split(", ")) for names in lists[:2]] == [8, 8]
    with pytest.raises(ConfigError, match=r"missing \(cls_token"):
        build(VIT, resnet)
    with pytest.raises(ConfigError, match=r"\(head.bias, head.weight: its classifier, not needed"):
        build("vit_tiny_patch16_224", vit_weights(resnet.parent))


def vit_weights(folder: Path) -> Path:
    save_file(state(trained(VIT)), folder / "vit.safetensors")
    return folder / "vit.safetensors"


def changed(change: str) -> dict[str, torch.Tensor]:
    tensors = state(trained(RESNET))
    first = next(name for name in tensors if name.endswith("weight"))
    if change == "missing":
        del tensors[first]
    elif change == "left over":
        tensors["fc2.weight"] = torch.zeros(3)
    elif change == "shape":
        tensors[first] = tensors[first][:1]
    elif change == "type":
        tensors[first] = tensors[first].long()
    else:
        tensors[first][0] = float("nan")
    return tensors


@pytest.mark.parametrize(
    "change, message",
    [
        ("missing", r": 1 missing \(\S+\)\. Give"),
        ("left over", r": 1 left over \(fc2.weight\)\. Give"),
        ("shape", r": 1 of another shape or kind \(\S+ \[1, 3, 3, 3\], expected \[[^;]*\)\. Give"),
        ("type", r": 1 of another shape or kind \(\S+ torch.int64 \[[^;]*\)\. Give"),
        ("nan", r": 1 not finite \(\S+\)\. Give"),
    ],
)
def test_a_single_tensor_that_does_not_fit_is_named(
    change: str, message: str, tmp_path: Path
) -> None:
    save_file(changed(change), tmp_path / "w.safetensors")
    with pytest.raises(ConfigError, match=message):
        build(RESNET, tmp_path / "w.safetensors")


class Code:
    """What a pickle may not bring."""


@pytest.mark.parametrize("kind", ["none", "folder", "text", "cut", "code", "list"])
def test_files_that_hold_no_weights(
    kind: str, resnet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / ("w.safetensors" if kind == "cut" else "w.pth")
    if kind == "folder":
        path.mkdir()
    elif kind == "text":
        path.write_text("no weights")
    elif kind == "cut":
        path.write_bytes(resnet.read_bytes()[:-100])
    elif kind in ("code", "list"):
        torch.save([Code()] if kind == "code" else [torch.zeros(3)], path)
    words = ["info", "--backbone", f"timm:{RESNET}", "--weights", str(path)]
    assert main([*words, "--glyphs-classes", "20", "--glyphs-clients", "8"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fedss info: weights: ")
    assert str(path) in line


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n"


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
@pytest.mark.parametrize(
    "content, message",
    [
        (LFS, "is a pointer of Git LFS, not the file it stands for"),
        (b"\n<!DOCTYPE html><html>", "is a web page"),
        (b"<html><body>404", "is a web page"),
        (b"\xef\xbb\xbf<!DOCTYPE html>", "is a web page"),
        (b'{"error": "not found"}', "is a text: it begins with"),
        (b"", r"is empty \(0 bytes\)"),
        (b"\x1f\x8b\x08", "is compressed with gzip"),
        ("zip", r"is a zip archive with a\.txt, which torch did not write"),
        ("safetensors", "is of the format safetensors: give it a name"),
        ("safetensors, cut", "is damaged or cut short at .* bytes|is of the format safetensors"),
        ("torch", "is not of the format safetensors, in spite of its name"),
        ("torch, cut", "is damaged or cut short at .* bytes"),
        ("model", r"holds Python objects beside tensors \(.* more\)|is not of the format"),
        ("old model", "holds Python objects beside tensors, as|is not of the format safetensors"),
        ("list", "holds no tensors by name|is not of the format safetensors"),
    ],
)
def test_a_file_is_called_what_it_is(
    content: bytes | str, message: str, ending: str, tmp_path: Path
) -> None:
    path, model = tmp_path / f"w.{ending}", trained(RESNET)
    kind, _, cut = content.partition(", ") if isinstance(content, str) else ("", "", "")
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.txt", "text")
    elif kind == "safetensors":
        save_file(state(model), path)
    else:
        whole = {"torch": state(model), "list": [torch.zeros(3)]}.get(kind, model)
        torch.save(whole, path, _use_new_zipfile_serialization=kind != "old model")
    if cut:
        path.write_bytes(path.read_bytes()[:-300])
    elif kind == ending or (kind, ending) == ("torch", "pth"):
        build(RESNET, path)
        return
    with pytest.raises(ConfigError, match=rf"weights: \S+ ({message})") as caught:
        build(RESNET, path)
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize(
    "wrap, message",
    [
        (lambda s: {"net": s, "epoch": 3}, "There are tensors inside net"),
        (
            lambda s: {
                **{f"backbone.{n}": t for n, t in s.items()},
                **{f"head.{i}.bias": torch.ones(2) for i in range(9)},
            },
            'All names have "backbone\\."',
        ),
    ],
)
def test_tensors_that_lie_deeper_are_found(wrap: Any, message: str, tmp_path: Path) -> None:
    torch.save(wrap(state(trained(RESNET))), tmp_path / "w.pth")
    with pytest.raises(ConfigError, match=message):
        build(RESNET, tmp_path / "w.pth")


@pytest.mark.parametrize(
    "name, size, channels",
    [
        ("resnest14d", 32, 3),
        ("skresnet18", 32, 3),
        ("rexnet_100", 32, 3),
        ("levit_128s", 64, 3),
        ("convit_tiny", 32, 3),
    ],
)
def test_architectures_that_were_refused_train(name: str, size: int, channels: int) -> None:
    """Dropout, norms after pooling, norms of vectors; benchmarks/architectures.py has them all."""
    embedder = build(name, size=size, channels=channels).train()
    assert all(p.drop_prob == 0 for p in embedder.modules() if type(p).__name__ == "DropPath")
    flat = flatten_(embedder)
    pixels = torch.rand(2, channels, size, size)
    h = embedder(pixels)
    assert not torch.allclose(h[0], h[1], atol=1e-3)  # a norm of single values gives a constant
    h[:, 0].sum().backward()
    assert flat.grad_P.isfinite().all()
    assert flat.grad_P.any()


def test_a_size_that_a_model_does_not_take_names_its_own() -> None:
    with pytest.raises(ConfigError, match=r"made for 240 px: --image-size 240$"):
        build("crossvit_tiny_240", size=64)


@pytest.mark.parametrize("tag", ["nope", "", "a1_in1k.x"])
def test_a_tag_that_is_none_names_those_that_are(tag: str) -> None:
    with pytest.raises(ConfigError, match=r"of resnet18; expected one of a1_in1k, a2_in1k"):
        build(f"resnet18.{tag}", size=64)


def test_only_timm_models_take_a_file(resnet: Path) -> None:
    for backbone in ("conv4", nn.Flatten()):
        with pytest.raises(ConfigError, match=r"weights: only timm models take a file"):
            build_embedder(
                backbone, channels=3, image_size=32, embedding_size=5, seed=0, weights=resnet
            )


def test_a_saved_model_needs_no_file(resnet: Path, tmp_path: Path) -> None:
    embedder = build(RESNET, resnet, trainable="last-1").eval()
    save_embedder(embedder, tmp_path / "model", {})
    again = load_embedder(tmp_path / "model")
    assert again.spec == embedder.spec
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(again(x), embedder(x))
    assert trained_names(again) == trained_names(embedder)


# --- what trains


def test_a_file_of_another_library_is_taken_in_its_order(tmp_path: Path) -> None:
    """EfficientNet-PyTorch, of which the wheels are, lists timm's tensors as ``_bn0.weight``."""
    theirs = {
        f"_layer{number}.{name.rpartition('.')[2]}": tensor
        for number, (name, tensor) in enumerate(state(trained(RESNET)).items())
    }
    torch.save(theirs, tmp_path / "theirs.pth")
    save_file(state(trained(RESNET)), tmp_path / "ours.safetensors")
    for channels in (3, 1):
        read = [
            build(RESNET, tmp_path / name, channels=channels).state_dict()
            for name in ("theirs.pth", "ours.safetensors")
        ]
        for name, tensor in read[0].items():
            assert torch.equal(tensor, read[1][name]), name
    names = list(theirs)
    for wrong in (
        dict(reversed(theirs.items())),
        {name: theirs[name] for name in names[1:]},
        {name.replace("weight", "kernel"): tensor for name, tensor in theirs.items()},
    ):
        torch.save(wrong, tmp_path / "wrong.pth")
        with pytest.raises(ConfigError, match="does not hold those of"):
            build(RESNET, tmp_path / "wrong.pth")


def trained_names(net: nn.Module) -> set[str]:
    return {n for n, p in net.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "name, last, expected",
    [
        ("resnet18", 1, "layer4"),
        ("resnet18", 2, "layer3|layer4"),
        ("tf_efficientnet_lite0", 1, r"blocks\.6|conv_head|bn2"),
        ("mobilenetv3_small_050", 2, r"blocks\.5|conv_head"),
        ("test_vit", 2, r"blocks\.[45]|norm|fc_norm"),
        ("conv4", 1, "block4"),
        ("conv4", 3, "block[234]"),
    ],
)
def test_the_last_blocks_train(name: str, last: int, expected: str) -> None:
    net = conv4(width=4) if name == "conv4" else timm.create_model(name, num_classes=0)
    names = {n for n, _ in net.named_parameters()}
    freeze_(net, "all")
    assert trained_names(net) == names
    count = len(blocks(net))
    freeze_(net, f"last-{count}")
    assert trained_names(net) == names
    with pytest.raises(ConfigError, match=f"expected last-1 to last-{count}, got last-{count + 1}"):
        freeze_(net, f"last-{count + 1}")
    freeze_(net, f"last-{last}")
    assert trained_names(net) == {n for n in names if re.match(expected, n)}
    assert 0 < len(trained_names(net)) < len(names)
    freeze_(net, "head")
    assert not trained_names(net)


def test_frozen_weights_are_those_of_the_seed() -> None:
    everything = build("test_efficientnet").state_dict()
    part = build("test_efficientnet", trainable="last-1")
    assert part.projection.weight.requires_grad
    assert all(torch.equal(tensor, everything[n]) for n, tensor in part.state_dict().items())


def test_blocks_of_ones_own_module_are_its_children() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
            self.shift = nn.Parameter(torch.zeros(1))
            self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
            self.last = nn.Linear(4, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.pool(self.first(x + self.shift)))

    own = Own()
    assert list(blocks(own).values()) == [
        ["shift"],
        ["first.0.weight", "first.0.bias", "first.2.weight", "first.2.bias"],
        ["last.weight", "last.bias"],
    ]
    how = {"channels": 1, "image_size": 8, "seed": 0}
    embedder = build_embedder(own, embedding_size=5, trainable="last-1", **how)
    assert trained_names(embedder.backbone) == {"last.weight", "last.bias"}
    with pytest.raises(ConfigError, match="no projection, and with head nothing would train"):
        build_embedder(own, embedding_size=5, trainable="head", **how)
    head = build_embedder(own, embedding_size=7, trainable="head", **how)
    assert flatten_(head).theta_P.numel() == 5 * 7
    assert all(p.requires_grad for p in own.parameters())


def test_the_fingerprint_is_of_what_is_frozen_and_of_nothing_else(resnet: Path) -> None:
    assert frozen_fingerprint(build_embedder("conv4-8", **SMALL)) is None
    part = build(RESNET, resnet, trainable="last-1")
    before = frozen_fingerprint(part)
    assert before == frozen_fingerprint(build(RESNET, resnet, trainable="last-1", seed=9))
    flat = flatten_(part)
    flat.theta_P.add_(1)
    assert frozen_fingerprint(part) == before
    frozen = next(p for p in part.parameters() if not p.requires_grad)
    with torch.no_grad():
        frozen.view(-1)[0] += 1
    assert frozen_fingerprint(part) != before


SMALL: dict[str, Any] = {"channels": 1, "image_size": 8, "embedding_size": 5, "seed": 0}


# --- in a run


def run_config(resnet: Path, **changes: Any) -> Config:
    tiny = {
        "glyphs_classes": 24,
        "glyphs_clients": 8,
        "image_size": 32,
        "backbone": f"timm:{RESNET}",
        "weights": str(resnet),
        "trainable": "last-1",
        "embedding_size": 6,
        "sample_size": 8,
        "rounds": 3,
        "clients_per_round": 2,
        "local_steps": 1,
        "eval_every": 0,
        "checkpoint_every": 1,
        "workers": 1,
        # Features of random weights hardly vary: to whiten them makes their gradients huge.
        "projection_init": "random",
        "rows_init": "random",
    }
    return Config(**{**tiny, **changes})


def quiet(config: Config, out: Path, **more: Any) -> fedss.Run:
    return fedss.train(config, out, on_round=more.pop("on_round", lambda record: None), **more)


def model_bits(out: Path) -> bytes:
    return (out / "model" / "model.safetensors").read_bytes()


def test_a_killed_run_goes_on_bit_for_bit_and_with_no_other_weights(
    resnet: Path, tmp_path: Path
) -> None:
    config = run_config(resnet)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    quiet(config, whole)

    def kill(record: dict[str, Any]) -> None:
        if record["round"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quiet(config, cut, on_round=kill)
    assert json.loads((cut / "config.json").read_text())["model"]["weights_file"] == (
        weights_fingerprint(resnet)
    )
    other = tmp_path / "other.safetensors"
    save_file(state(trained(RESNET, seed=4)), other)
    with pytest.raises(RunFolderError, match=r"weights_file: '.* there, '.* now"):
        quiet(run_config(other), cut)
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(resnet.read_bytes())
    quiet(run_config(moved), cut)
    assert model_bits(cut) == model_bits(whole)
    trained_there = fedss.load(cut).state_dict()
    first = build(RESNET, resnet, size=32, channels=1, trainable="last-1", embedding_size=6)
    moves = {n for n, t in first.state_dict().items() if not torch.equal(t, trained_there[n])}
    assert moves == trained_names(first)


def test_what_is_frozen_is_not_in_the_ledger(
    resnet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = {}
    for trainable in ("all", "last-1", "head"):
        config = run_config(resnet, trainable=trainable, rounds=1)
        quiet(config, tmp_path / trainable)
        record = json.loads((tmp_path / trainable / "records.jsonl").read_text())
        clients = record["clients"]
        moved[trainable] = [record[f"backbone_bytes_{way}"] / clients for way in ("down", "up")]
        embedder = build(RESNET, resnet, channels=1, embedding_size=6, trainable=trainable)
        numbers = sum(p.numel() for p in embedder.parameters() if p.requires_grad)
        for size in moved[trainable]:
            assert size == pytest.approx(4 * numbers, abs=300)
        words = ["--config", str(tmp_path / trainable / "config.json")]
        assert main(["info", *words]) == 0
        assert f"{numbers:,}, " in capsys.readouterr().out
    assert moved["head"][0] < moved["last-1"][0] < moved["all"][0]


def test_frozen_parts_in_a_federation(resnet: Path, photos: Path, tmp_path: Path) -> None:
    """Same bits as here; a site with other weights, or none, is told so and left out."""
    how = {"backbone": f"timm:{RESNET}", "weights": str(resnet), "trainable": "last-1"}
    how |= {"projection_init": "random", "rows_init": "random"}
    config = settings(photos, rounds=2, image_size=32, local_steps=1, **how)
    local = digests(lambda: quiet(config, tmp_path / "local"))
    moved = tmp_path / "at-sites.safetensors"
    moved.write_bytes(resnet.read_bytes())
    grid = ProcessGrid(nodes(photos, weights=str(moved)))
    assert digests(lambda: federate(grid, config, tmp_path / "apart")) == local
    other = tmp_path / "other.safetensors"
    save_file(state(trained(RESNET, seed=4)), other)
    grid = ProcessGrid(nodes(photos, weights=str(other)))
    with pytest.raises(QuorumError, match=r"ConfigError; the site's log"):
        federate(grid, config, tmp_path / "refused", attempts=1)


def test_a_site_says_which_weights_it_lacks(
    resnet: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    how = {"backbone": f"timm:{RESNET}", "weights": str(resnet), "trainable": "head"}
    how |= {"projection_init": "random", "rows_init": "random"}
    config = settings(photos, rounds=1, image_size=32, local_steps=1, **how)
    at_sites = nodes(photos)
    other = tmp_path / "other.safetensors"
    save_file(state(trained(RESNET, seed=4)), other)
    at_sites[3]["weights"] = str(other)
    at_sites[10]["weights"] = str(tmp_path / "none.safetensors")
    asked = []

    def watch(node: int, message: Any, reply: Any) -> list[Any]:
        asked.extend([node] if message.metadata.message_type == TRAIN else [])
        return [reply]

    with pytest.raises(QuorumError):
        federate(ProcessGrid(at_sites, watch), config, tmp_path / "run", attempts=1, quorum=1.0)
    said = capsys.readouterr().err
    assert {3, 10} <= set(asked)
    assert re.search(r"fingerprint is [0-9a-f]{16} at the server and [0-9a-f]{16} here", said)
    assert "cannot read" in said
    assert "none.safetensors" in said


def test_frozen_parts_in_stacks(resnet: Path, tmp_path: Path) -> None:
    for stack in (1, 2):
        quiet(run_config(resnet, rounds=1, stack=stack), tmp_path / str(stack))
    plain, stacked = (fedss.load(tmp_path / str(stack)).state_dict() for stack in (1, 2))
    for name, tensor in plain.items():
        np.testing.assert_allclose(stacked[name], tensor, rtol=1e-4, atol=1e-5)
