"""Exported models: equal to the run's, loadable without the library, and what is refused."""

import io
import json
import re
import shutil
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fedss
from fedss.cli import main
from fedss.data.decoding import decode
from fedss.errors import ConfigError, RunFolderError
from fedss.inference import export as portable
from fedss.inference.export import CARD, EXPORTS, export
from fedss.models import Embedder, EmbedderSpec, build_embedder, fingerprint, save_embedder
from fedss.models.embedder import assemble
from fedss.models.layout import channels_last
from fedss.models.saving import safetensors_of
from fedss.training.summary import describe_model
from tests import reference
from tests.installed import by_timm, needs_timm, timm

PAGE = Path(__file__).parents[2] / "docs" / "export.md"
TINY = replace(reference.TINY, sample_size=8)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    return fedss.train(TINY, tmp_path_factory.mktemp("runs") / "tiny").folder


@pytest.fixture(scope="module")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The run's model in every format."""
    place = tmp_path_factory.mktemp("exported")
    return {format: export(trained, format, place) for format in EXPORTS}


@pytest.fixture(scope="module")
def from_timm(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A timm model in every format, and its run."""
    if timm is None:
        # It says which: timm is not installed, or torchvision does not fit torch.
        pytest.skip(needs_timm.kwargs["reason"])
    embedder = build_embedder(
        "timm:test_efficientnet", channels=3, image_size=64, embedding_size=8, seed=1
    )
    run = holding(embedder, trained, tmp_path_factory.mktemp("timm") / "run")
    return {"run": run} | {format: export(run, format) for format in EXPORTS}


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def holding(embedder: Embedder, trained: Path, place: Path) -> Path:
    """A finished run whose model is another one."""
    shutil.copytree(trained, place)
    save_embedder(embedder, place / "model", {})
    about = json.loads((place / "config.json").read_text())
    about["model"] = describe_model(embedder, None, None)
    (place / "config.json").write_text(json.dumps(about))
    return place


def own_network(channels: int = 3) -> nn.Module:
    layers = [nn.Conv2d(channels, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten())


def with_trained_norms(name: str | None, channels: int = 3, size: int = 32) -> Embedder:
    """As one that began with pretrained weights: its batch norms frozen, with statistics."""
    spec = EmbedderSpec(name, channels, size, 8, pretrained=True)
    embedder = assemble(name or own_network(channels), spec, seed=3, download=False)
    rng = torch.Generator().manual_seed(0)
    for path, tensor in embedder.named_buffers():
        if path.endswith(("running_var", "weight")):
            tensor.copy_(torch.rand(tensor.shape, generator=rng) + 0.5)
        elif path.endswith("running_mean"):
            tensor.copy_(torch.rand(tensor.shape, generator=rng) / 10)
    return embedder.eval()


def noise(embedder: Embedder, B: int, seed: int = 7) -> Tensor:
    spec, rng = embedder.spec, torch.Generator().manual_seed(seed)
    shape = (B, spec.channels, spec.image_size, spec.image_size)
    return torch.randint(256, shape, generator=rng, dtype=torch.uint8)


def in_onnxruntime(path: Path) -> Callable[[Tensor], Tensor]:
    session = onnxruntime.InferenceSession(path)
    (taken,), (given,) = session.get_inputs(), session.get_outputs()
    assert (taken.name, taken.type, taken.shape[0]) == ("pixels", "tensor(uint8)", "batch")
    assert (given.name, given.type, given.shape[0]) == ("embeddings", "tensor(float)", "batch")
    return lambda pixels: torch.from_numpy(session.run(None, {"pixels": pixels.numpy()})[0])


def in_torch(path: Path) -> Callable[[Tensor], Tensor]:
    module: nn.Module = torch.export.load(path).module()
    return module


def metadata(path: Path) -> dict[str, str]:
    if path.suffix == ".onnx":
        return {prop.key: prop.value for prop in onnx.load(path).metadata_props}
    if path.suffix == ".pt2":
        extra = {"fedss.json": ""}
        torch.export.load(path, extra_files=extra)
        found: dict[str, str] = json.loads(extra["fedss.json"])
        return found
    with safe_open(path, framework="np") as file:
        return dict(file.metadata())


def one_minus_cosine(a: Tensor, b: Tensor) -> float:
    cosine = nn.functional.cosine_similarity(a.double(), b.double(), dim=1)
    return float((1 - cosine).max())


# --- equal to the model


def check_equal(files: dict[str, Path], run: Path, backbone: nn.Module | None = None) -> None:
    model = fedss.load(run, backbone)
    for format, load in (("onnx", in_onnxruntime), ("torch-export", in_torch)):
        elsewhere = load(files[format])
        for B in (1, 2, 7, 64):
            pixels = noise(model, B)
            with torch.no_grad():
                expected = model(pixels)
            got = elsewhere(pixels)
            assert got.shape == (B, 8)
            assert got.dtype == torch.float32
            assert not got.requires_grad
            assert one_minus_cosine(got, expected) < 1e-6
            assert torch.allclose(got.norm(dim=1), torch.ones(B), atol=1e-5)
    loaded = fedss.load(files["safetensors"], backbone)
    assert torch.equal(loaded(pixels), model(pixels))
    assert loaded.spec == model.spec
    assert fingerprint(loaded) == fingerprint(model)
    assert sorted(file.name for file in files["onnx"].parent.iterdir()) == [
        CARD,
        "model.onnx",
        "model.pt2",
        "model.safetensors",
    ]


def test_conv4_elsewhere_gives_the_models_embeddings(exported, trained):
    check_equal(exported, trained)
    model, session = fedss.load(trained), in_onnxruntime(exported["onnx"])

    @settings(max_examples=25)
    @given(st.integers(1, 150), st.integers(0, 2**32), st.integers(1, 255))
    def at_any_batch_size(B: int, seed: int, strength: int) -> None:
        pixels = (noise(model, B, seed) // strength).to(torch.uint8)
        with torch.no_grad():
            assert one_minus_cosine(session(pixels), model(pixels)) < 1e-6

    at_any_batch_size()


def test_the_onnx_file_is_one_for_runtimes_of_some_age(exported):
    onnx.checker.check_model(exported["onnx"], full_check=True)
    model = onnx.load(exported["onnx"], load_external_data=False)
    assert [(op.domain, op.version) for op in model.opset_import] == [("", 18)]
    assert model.ir_version == 10
    assert not any(tensor.external_data for tensor in model.graph.initializer)


def test_a_timm_model_elsewhere_gives_the_models_embeddings(from_timm):
    check_equal(from_timm, from_timm["run"])


def test_an_own_network_elsewhere_gives_the_models_embeddings(trained, tmp_path):
    embedder = with_trained_norms(None)
    # Its layout in memory stays behind: in ONNX it would change results, and nothing would warn.
    assert embedder.channels_last
    run = holding(embedder, trained, tmp_path / "run")
    files = {format: export(run, format, backbone=own_network()) for format in EXPORTS}
    check_equal(files, run, own_network())


def whitened(seed: int = 0) -> Embedder:
    """As one whose run began with a whitening of features."""
    embedder = build_embedder(
        "conv4-8", channels=1, image_size=12, embedding_size=8, seed=seed, whitened=True
    )
    rng = torch.Generator().manual_seed(seed)
    state = embedder.state_dict()
    for name in ("whitening.mean_F", "whitening.axes_FK", "projection.weight"):
        state[name].normal_(std=0.1, generator=rng)
    return embedder.eval()


def test_a_whitened_model_elsewhere_gives_the_models_embeddings(trained, tmp_path):
    run = holding(whitened(), trained, tmp_path / "run")
    files = {format: export(run, format) for format in EXPORTS}
    check_equal(files, run)
    # The whitening is part of it: another one gives other embeddings.
    model, other = fedss.load(run), whitened()
    other.whitening.set_(torch.zeros_like(other.whitening.mean_F), other.whitening.axes_FK)
    pixels = noise(model, 5)
    with torch.no_grad():
        assert one_minus_cosine(in_onnxruntime(files["onnx"])(pixels), other(pixels)) > 1e-3
    assert fingerprint(other) != fingerprint(model) == metadata(files["onnx"])["fingerprint"]


def test_the_pages_recipe_without_the_library_whitens_too(tmp_path):
    spec = EmbedderSpec(None, 3, 32, 8, pretrained=True, whitened=True)
    embedder = assemble(own_network(), spec, seed=3, download=False).eval()
    state = embedder.state_dict()
    for name in ("whitening.mean_F", "whitening.axes_FK"):
        state[name].normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_of(embedder, {}))
    pixels = noise(embedder, 1).numpy()
    names = {"net": own_network(), "pixels": lambda path: pixels}
    (recipe,) = (block for block in blocks(PAGE.read_text()) if "load_state_dict" in block)
    exec(recipe.replace('"model.safetensors"', repr(str(path))), names)
    with torch.no_grad():
        expected = embedder(torch.from_numpy(pixels))
    assert torch.allclose(torch.as_tensor(names["embeddings"]), expected, atol=1e-5)


def test_floats_are_refused_rather_than_scaled_twice(exported):
    pixels = torch.rand(2, 1, 12, 12)
    with pytest.raises(Exception, match=r"Actual: \(tensor\(float\)\) , expected: \(tensor\(uint8"):
        onnxruntime.InferenceSession(exported["onnx"]).run(None, {"pixels": pixels.numpy()})
    with pytest.raises(RuntimeError, match="Expected: Byte, Got: float"):
        in_torch(exported["torch-export"])(pixels)


@pytest.mark.parametrize("format", EXPORTS)
def test_a_file_says_what_it_needs(format, exported, trained):
    about, model = metadata(exported[format]), fedss.load(trained)
    said = json.loads(about["preprocessing"])
    assert said["input_size"] == [1, 12, 12]
    assert (said["color"], said["dtype"], said["layout"]) == ("L", "uint8", "BCHW")
    assert (said["interpolation"], said["crop_mode"], said["crop_pct"]) == ("bilinear", "center", 1)
    assert (said["mean"], said["std"]) == (model.mean.tolist(), model.std.tolist())
    assert "12 x 12 pixels" in about["preprocessing_text"]
    assert about["embedding_size"] == "8"
    assert about["backbone"] == "conv4-4"
    assert about["norm_layers"] == "GroupNorm"
    assert about["fedss_version"] == fedss.__version__
    assert about["fingerprint"] == fingerprint(model)


@pytest.mark.parametrize("format", EXPORTS)
def test_a_file_keeps_nothing_of_this_machine(format, exported, trained):
    content = exported[format].read_bytes()
    if format == "torch-export":
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            content = b"".join(archive.read(name) for name in archive.namelist())
    for trace in (str(Path(fedss.__file__).parent), str(Path(torch.__file__).parent), ".py\\"):
        assert trace.encode() not in content
    assert str(trained.parent) not in exported[format].with_name(CARD).read_text()


# --- without the library


def blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.S)


def photograph(path: Path) -> None:
    """An image whose embedding shows it when rotation, crop, filter or colours are wrong."""
    y, x = np.mgrid[0:90, 0:150]
    image = np.stack([x, y * 2, (x * y) % 256], 2).astype(np.uint8)
    rotated = Image.Exif()
    rotated[0x0112] = 6
    Image.fromarray(image).save(path, exif=rotated)


def test_the_page_runs_as_written(from_timm, monkeypatch):
    monkeypatch.chdir(from_timm["onnx"].parent)
    photograph(Path("photo.jpg"))
    names: dict[str, Any] = {}
    embeddings: list[Tensor] = []
    for block in blocks(PAGE.read_text()):
        names.pop("embeddings", None)
        if "import fedss" not in block:
            monkeypatch.setitem(sys.modules, "fedss", None)
        exec(block.replace("resnet18", "test_efficientnet"), names)
        monkeypatch.setitem(sys.modules, "fedss", fedss)
        if "embeddings" in names:
            embeddings.append(torch.as_tensor(names["embeddings"]))
    assert len(embeddings) == 4
    expected = torch.from_numpy(
        fedss.embed_files(fedss.load(from_timm["run"]), ["photo.jpg"]).embeddings_ND
    )
    for got in embeddings:
        assert torch.allclose(got, expected, atol=1e-5)
    assert names["about"]["input_size"] == [3, 64, 64]


@pytest.mark.parametrize("name", by_timm("timm:test_efficientnet", "timm:test_vit", "own"))
def test_trained_weights_go_straight_into_timm(name, tmp_path):
    own = name == "own"
    embedder = with_trained_norms(None if own else name)
    name = name.removeprefix("timm:")
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_of(embedder, {}))
    photograph(tmp_path / "photo.jpg")
    size = {"img_size": 32} if name == "test_vit" else {}
    net = own_network() if own else timm.create_model(name, num_classes=0, in_chans=3, **size)
    pixels = decode(tmp_path / "photo.jpg", 32, 3)[None].copy()
    names = {"net": net, "pixels": lambda path: pixels}
    (recipe,) = (block for block in blocks(PAGE.read_text()) if "load_state_dict" in block)
    exec(recipe.replace('"model.safetensors"', repr(str(path))), names)
    with torch.no_grad():
        expected = embedder(torch.from_numpy(pixels))
    assert torch.allclose(torch.as_tensor(names["embeddings"]), expected, atol=1e-5)
    assert fingerprint(fedss.load(path, own_network() if own else None)) == fingerprint(embedder)


@pytest.mark.parametrize("kind", ["jpg", "png", "gray.png"])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_cards_code_reads_images_as_training_did(kind, channels, exported, from_timm, tmp_path):
    card = (exported if channels == 1 else from_timm)["onnx"].with_name(CARD).read_text()
    size = 12 if channels == 1 else 64
    names: dict[str, Any] = {}
    exec(blocks(card)[0], names)
    path = tmp_path / f"photo.{kind}"
    if kind == "jpg":
        photograph(path)
    elif kind == "png":
        values = np.random.default_rng(0).integers(0, 256, (40, 31, 4), dtype=np.uint8)
        Image.fromarray(values).save(path)
    else:
        Image.fromarray(np.arange(900, dtype=np.uint8).reshape(20, 45)).save(path)
    assert np.array_equal(names["pixels"](path)[0], decode(path, size, channels))


def test_the_cards_snippets_give_one_embedding(exported, trained, monkeypatch):
    card = exported["onnx"].with_name(CARD).read_text()
    monkeypatch.chdir(exported["onnx"].parent)
    photograph(Path("photo.jpg"))
    expected = torch.from_numpy(fedss.embed_files(fedss.load(trained), ["photo.jpg"]).embeddings_ND)
    names: dict[str, Any] = {}
    reading, *loading = blocks(card)
    exec(reading, names)
    assert len(loading) == 3
    for block in loading:
        exec(block, names)
        assert torch.allclose(torch.as_tensor(names.pop("embeddings")), expected, atol=1e-6)


# --- what is refused


class Restless(nn.Module):
    """Asks for the values of pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.net = own_network(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x if x.mean() > 0 else -x)


class Strided(nn.Module):
    """Right in PyTorch; ONNX knows no strides and gives other numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = own_network()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(channels_last(x))


class OfTwo(nn.Module):
    """Another function for pairs of images."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(144, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.line(x.flatten(1)) * (2 if len(x) == 2 else -1)


@pytest.mark.parametrize("network", [Restless, OfTwo])
@pytest.mark.parametrize("format", ["onnx", "torch-export"])
def test_a_network_that_cannot_be_followed(network, format, trained, tmp_path):
    embedder = build_embedder(network(), channels=1, image_size=12, embedding_size=8, seed=0)
    run = holding(embedder, trained, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"torch\.export cannot follow the backbone.*safetensors"):
        export(run, format, backbone=network())
    assert not (run / "export").exists()
    path = export(run, "safetensors", backbone=network())
    assert torch.equal(
        fedss.load(path, network())(noise(embedder, 3)), embedder.eval()(noise(embedder, 3))
    )
    assert "backbone=net" in path.with_name(CARD).read_text()
    assert network.__name__ in path.with_name(CARD).read_text()
    with pytest.raises(ConfigError, match=r"module of its owner's.*backbone="):
        export(run, "safetensors")


def test_a_file_that_gives_other_embeddings_is_not_left(trained, tmp_path):
    embedder = build_embedder(Strided(), channels=3, image_size=12, embedding_size=8, seed=0)
    run = holding(embedder, trained, tmp_path / "run")
    with pytest.raises(
        ConfigError, match=r"onnx: .*other embeddings.*1 - cosine is up to \d.*left"
    ):
        export(run, "onnx", backbone=Strided())
    assert list((run / "export").iterdir()) == []
    assert export(run, "torch-export", backbone=Strided()).exists()


def test_a_model_too_large_for_one_file(run, monkeypatch):
    monkeypatch.setattr(portable, "_ONNX_BYTES", 1000)
    with pytest.raises(ConfigError, match=r"at most 2 GiB.*torch-export or safetensors"):
        export(run, "onnx")


def test_packages_that_are_missing_are_named(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ConfigError, match=r'onnxscript: pip install "fedss\[onnx\]"'):
        export(run, "onnx")
    assert export(run, "torch-export").exists()


def test_a_folder_holds_one_model(run, trained, tmp_path):
    path = export(run, "safetensors", tmp_path / "out")
    card = path.with_name(CARD)
    card.write_text(card.read_text().replace('"unknown"', '"cc-by-4.0"'))
    path.write_bytes(b"damaged")
    assert export(run, "safetensors", tmp_path / "out") == path
    assert fingerprint(fedss.load(path)) == fingerprint(fedss.load(run))
    assert '"cc-by-4.0"' in card.read_text()

    embedder = build_embedder("conv4-4", channels=1, image_size=12, embedding_size=8, seed=9)
    other = holding(embedder, trained, tmp_path / "other")
    before = path.read_bytes()
    for format in EXPORTS:
        with pytest.raises(RunFolderError, match=r"card of another model.*choose another folder"):
            export(other, format, tmp_path / "out")
    card.unlink()
    with pytest.raises(RunFolderError, match=r"is there already, and no MODEL_CARD\.md says"):
        export(other, "safetensors", tmp_path / "out")
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["model.safetensors"]


def test_fedss_load_says_what_is_wrong_with_a_file(run, tmp_path):
    path = export(run, "safetensors")
    assert fingerprint(fedss.load(path.parent)) == fingerprint(fedss.load(path))
    with pytest.raises(ConfigError, match="leave backbone out"):
        fedss.load(path, own_network(1))
    whole = path.read_bytes()
    for content in (whole[:-100], whole[:50], b"", b"PK\3\4"):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=rf"{re.escape(str(path))}.*fedss export"):
            fedss.load(path)
    path.write_bytes(whole)
    tensors, header = load_file(path), metadata(path)
    save_file(tensors, path)
    with pytest.raises(ConfigError, match="none whose header describes a model"):
        fedss.load(path)
    for bad in ("{", '{"format": "other"}'):
        save_file(tensors, path, {**header, "fedss": bad})
        with pytest.raises(ConfigError, match=r"the header of .* does not describe a model"):
            fedss.load(path)
    del tensors["backbone.block1.conv.weight"]
    tensors["mean"] = tensors["mean"].double()
    save_file({**tensors, "more": torch.zeros(1)}, path, header)
    with pytest.raises(
        ConfigError, match=r"missing backbone\.block1\.conv\.weight, left over more, mean is .*64"
    ):
        fedss.load(path)
    with pytest.raises(RunFolderError, match="expected a finished run"):
        fedss.load(tmp_path / "none.safetensors")


def test_mistakes_on_the_command_line_are_one_line(run, tmp_path, capsys):
    def refused(*words: str) -> str:
        assert main(["export", *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("fedss export: ")
        return line

    assert "did you mean onnx" in refused(str(run), "--format", "onx")
    to_file = refused(str(run), "--format", "onnx", "--out", str(tmp_path / "birds.onnx"))
    assert f"expected a folder, got the name of a file; --out {tmp_path} gets model.onnx" in to_file
    (tmp_path / "taken").write_text("")
    for place in ("taken", "taken/deeper"):
        words = ("--format", "safetensors", "--out", str(tmp_path / place))
        assert "expected a folder, found a file" in refused(str(run), *words)
    assert "expected a finished run" in refused(str(tmp_path), "--format", "onnx")
    (of_one,) = json.loads((run / "summary.json").read_text())
    comparison = [{**of_one, "folder": "full-seed0"}]
    (tmp_path / "both").mkdir()
    (tmp_path / "both" / "summary.json").write_text(json.dumps(comparison))
    assert "name one of them, such as" in refused(str(tmp_path / "both"), "--format", "onnx")
    (run / "summary.json").unlink()
    shutil.rmtree(run / "checkpoint")
    assert "start its fedss train command again" in refused(str(run), "--format", "safetensors")
    (run / "config.json").write_text("{}")
    assert "name the run folder itself" in refused(str(run), "--format", "safetensors")
    assert not (run / "export").exists()


def test_an_exported_file_embeds_and_is_no_run_folder(exported, tmp_path, capsys):
    file = str(exported["safetensors"])
    photograph(tmp_path / "photo.jpg")
    assert main(["embed", file, str(tmp_path), "--out", str(tmp_path / "vectors.npy")]) == 0
    assert "1 embedding of size 8" in capsys.readouterr().out
    for words in (["evaluate", file], ["export", file, "--format", "onnx", "--out", str(tmp_path)]):
        assert main(words) == 2
        assert "config.json: cannot be read" in capsys.readouterr().err


def test_the_command_says_what_it_wrote(run, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["export", str(run), "--format", "torch-export", "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert said.out.split() == ["model", str(out / "model.pt2"), "card", str(out / CARD)]
    assert said.err == ""
