"""A trained model in a file for others: ONNX, safetensors, torch.export; checked before it stays.

Shape suffixes: B images of a batch, C channels, H height, W width, D embedding size.
"""

import copy
import importlib
import io
import json
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedss.config import check_choice
from fedss.errors import ConfigError, RunFolderError
from fedss.files import atomic, write_file, writing
from fedss.inference.model import load
from fedss.models import Embedder, fingerprint, load_embedder, norm_groups, safetensors_of
from fedss.text import one_line

CARD = "MODEL_CARD.md"
TOLERANCE = 1e-5
_BATCHES = (1, 2, 7)
# The oldest that torch's exporter writes without converting, for runtimes of some age.
_OPSET = 18
_ONNX_BYTES = 2**31
_ADVICE = "make room or check permissions, or choose another one (--out)"

Embed = Callable[[Tensor], Tensor]
"""uint8 pixels [B, C, H, W] to embeddings [B, D]."""


class Format(NamedTuple):
    """A file format: its file's name; a model and what to say of it -> the file's bytes; the file,
    and a module of the model's owner where there is one, or whether the code that it names may be
    imported -> the model, as its receiver runs it."""

    file: str
    write: Callable[[Embedder, Mapping[str, str]], bytes]
    read: Callable[[Path, nn.Module | str | None, bool], Embed]


def export(
    folder: str | Path,
    format: str,
    out: str | Path | None = None,
    *,
    backbone: nn.Module | str | None = None,
    trust_code: bool = False,
) -> Path:
    """Write a run's model for others to use, with a model card beside it.

    ``model.onnx`` and ``model.pt2`` (torch.export) map uint8 pixels [B, C, H, W], 0 … 255, of any
    B, to unit embeddings, float32 [B, D]; scaling by mean and std is inside. ``model.safetensors``
    holds the tensors, for :func:`fedss.load` and for plain PyTorch or timm. Each file says in its
    metadata what is to be done to an image before, and which model it is (``docs/export.md``).

    Before the file gets its name it is read back and compared with the model on batches of 1, 2
    and 7 images: ``1 - cos(h, h') <= 1e-5`` for each, h and h' the two embeddings of an image.

    Args:
        folder: a finished run.
        format: ``"onnx"`` (needs ``fedss[onnx]``), ``"safetensors"`` or ``"torch-export"``.
        out: a folder for this model alone, made if missing; None: ``export`` in the run folder. A
            file of the same model is replaced, its card is kept as it is.
        backbone: if the run was trained with a module of your own: one of the same structure.
        trust_code: as for :func:`fedss.load`.

    Returns:
        The file's path; ``MODEL_CARD.md`` lies beside it.

    Raises:
        ConfigError: an unknown format; a package missing; a network that the format cannot hold,
            or that gives other embeddings there; a damaged model; a backbone missing.
        RunFolderError: no finished run; ``out`` holds another model, or cannot be written.
    """
    from fedss.inference.model_card import model_card  # whose templates few commands need

    check_choice("format", format, EXPORTS)
    chosen, folder = EXPORTS[format], Path(folder)
    place = folder / "export" if out is None else Path(out)
    if place.suffix in {Path(each.file).suffix for each in EXPORTS.values()}:
        raise ConfigError(
            f"{place}: expected a folder, got the name of a file; --out {place.parent or '.'} gets "
            f"{chosen.file} and {CARD}"
        )
    embedder = load(folder, backbone, trust_code)
    mark = fingerprint(embedder)
    about = _metadata(embedder, mark)
    card = model_card(folder, embedder.spec, mark, about["preprocessing_text"])
    _check_place(place, chosen.file, mark)
    content = chosen.write(embedder, about)
    with writing(place, _ADVICE):
        place.mkdir(parents=True, exist_ok=True)
        with atomic(place / chosen.file) as file:
            file.write(content)
            file.flush()
            _check_equal(embedder, chosen.read(Path(file.name), backbone, trust_code), format)
            if not (place / CARD).exists():
                write_file(place / CARD, card.encode())
    return place / chosen.file


def _check_place(place: Path, file: str, mark: str) -> None:
    """A folder holds one model: the card in it says which."""
    with writing(place, _ADVICE):
        if (place / CARD).exists():
            if mark not in (place / CARD).read_text(encoding="utf-8", errors="replace"):
                raise RunFolderError(
                    f"{place / CARD} is the card of another model (this one's fingerprint, "
                    f"{mark[:12]}…, is not in it); choose another folder (--out), or remove what "
                    "lies there"
                )
        elif (place / file).exists():
            raise RunFolderError(
                f"{place / file} is there already, and no {CARD} says that it is this model; "
                "choose another folder (--out), or remove the file"
            )


def _metadata(embedder: Embedder, mark: str) -> dict[str, str]:
    """What a file says of its model: text by name, as ONNX and safetensors hold it."""
    spec = embedder.spec
    colour, size = "RGB" if spec.channels == 3 else "L", spec.image_size
    # The names of timm's data configuration, where it has one.
    preprocessing = {
        "input_size": [spec.channels, size, size],
        "crop_mode": "center",
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "antialias": True,
        "color": colour,
        "layout": "BCHW",
        "dtype": "uint8",
        "mean": embedder.mean.tolist(),
        "std": embedder.std.tolist(),
        "scaled_by": "the model (onnx, torch-export); the caller (safetensors without fedss)",
    }
    colours = "red, green and blue in this order" if colour == "RGB" else "gray"
    shape = f"{spec.channels}, {size}, {size}"
    text = (
        "Undo the camera's rotation (EXIF), lay transparency on white, cut out the central square, "
        f"resize it to {size} x {size} pixels (bilinear with antialiasing, as Pillow does; bicubic "
        "where it is smaller), "
        f"{colours}; of an animation take the first frame, of 16 bits the upper 8. The pixels are "
        f"uint8 [batch, {shape}], 0 to 255, unscaled: x / 255, minus mean, divided by std is "
        "inside the ONNX and the torch.export model. The embeddings are float32 "
        f"[batch, {spec.embedding_size}] of length 1: their dot product is the cosine."
    )
    norms = {type(part).__name__ for part in embedder.modules() if "Norm" in type(part).__name__}
    return {
        "fedss_version": version("fedss"),
        "fingerprint": mark,
        "backbone": spec.backbone or "a module of its owner's",
        "norm_layers": ", ".join(sorted(norms - {"NormAct"})) or "none",
        "norm_groups": json.dumps(norm_groups(embedder.backbone)),
        "embedding_size": str(spec.embedding_size),
        "preprocessing": json.dumps(preprocessing),
        "preprocessing_text": text,
    }


def _program(embedder: Embedder) -> torch.export.ExportedProgram:
    """The network from uint8 pixels to unit embeddings, for any batch size."""
    model = copy.deepcopy(embedder).requires_grad_(False)
    # It changes speed, not results, and ONNX knows no strides: there it would change results.
    model.channels_last = False
    model.register_forward_pre_hook(_take_uint8_alone)
    spec = model.spec
    pixels_BCHW = torch.zeros(2, spec.channels, spec.image_size, spec.image_size, dtype=torch.uint8)
    shapes = ({0: torch.export.Dim("batch")},)
    try:
        # torch 2.13 copies a program's tree of arguments by a class that it has itself deprecated.
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            program = torch.export.export(
                model, (pixels_BCHW,), dynamic_shapes=shapes, strict=False
            )
    except Exception as error:
        raise ConfigError(
            "torch.export cannot follow the backbone for batches of any size: "
            f"{one_line(error)}; make it depend on neither the batch size nor the values of "
            "pixels, or take the format safetensors"
        ) from error
    for node in program.graph.nodes:
        # Paths of this machine, and lines of its owner's code.
        node.meta.pop("stack_trace", None)
    return program


def _take_uint8_alone(model: nn.Module, pixels: tuple[Tensor]) -> None:
    # A torch.export program looks at shapes, and divides by 255 what has been divided before.
    torch.ops.aten._assert_tensor_metadata(pixels[0], None, None, torch.uint8)


def _to_torch_export(embedder: Embedder, about: Mapping[str, str]) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(_program(embedder), buffer, extra_files={"fedss.json": json.dumps(about)})
    return buffer.getvalue()


def _run_torch_export(path: Path, backbone: nn.Module | str | None, trust_code: bool) -> Embed:
    with path.open("rb") as file:
        module: nn.Module = torch.export.load(file).module()
    return module


def _to_onnx(embedder: Embedder, about: Mapping[str, str]) -> bytes:
    size = sum(tensor.nbytes for tensor in embedder.state_dict().values())
    if size >= _ONNX_BYTES:
        raise ConfigError(
            f"onnx: one file holds at most 2 GiB, the model's tensors take {size / 2**30:.2f} GiB; "
            "take the format torch-export or safetensors"
        )
    onnx = _import("onnx")
    _import("onnxscript")
    _import("onnxruntime")
    program = _program(embedder)
    try:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            model: Any = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=_OPSET,
                input_names=["pixels"],
                output_names=["embeddings"],
                verbose=False,
            )
        proto = model.model_proto
        for part in (proto.graph, *proto.functions):
            _strip(part)
        for end in (*proto.graph.input, *proto.graph.output):
            end.type.tensor_type.shape.dim[0].dim_param = "batch"
        proto.doc_string = about["preprocessing_text"]
        onnx.helper.set_model_props(proto, dict(about))
        onnx.checker.check_model(proto, full_check=True)
    except Exception as error:
        raise ConfigError(
            f"onnx: torch's exporter cannot translate the network: {one_line(error)}; take the "
            "format torch-export or safetensors"
        ) from error
    content: bytes = proto.SerializeToString(deterministic=True)
    return content


def _strip(graph: Any) -> None:
    """Take out what torch notes for its developers: paths of this machine, lines of code."""
    # Shapes of intermediate results, under names for the batch that the ends no longer have.
    graph.ClearField("value_info")
    for node in graph.node:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
        for attribute in node.attribute:
            for inner in ([attribute.g] if attribute.HasField("g") else []) + [*attribute.graphs]:
                _strip(inner)


def _run_onnx(path: Path, backbone: nn.Module | str | None, trust_code: bool) -> Embed:
    session = _import("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(pixels_BCHW: Tensor) -> Tensor:
        (embeddings_BD,) = session.run(None, {"pixels": pixels_BCHW.numpy()})
        return torch.from_numpy(embeddings_BD)

    return run


EXPORTS = {
    "onnx": Format("model.onnx", _to_onnx, _run_onnx),
    "safetensors": Format("model.safetensors", safetensors_of, load_embedder),
    "torch-export": Format("model.pt2", _to_torch_export, _run_torch_export),
}


@torch.no_grad()
def _check_equal(embedder: Embedder, run: Embed, format: str) -> None:
    """Whether the file gives the model's embeddings.

    Raises:
        ConfigError: it does not.
    """
    spec, rng = embedder.spec, torch.Generator().manual_seed(0)
    for B in _BATCHES:
        # Noise, from faint to strong.
        strength_B = torch.linspace(8, 256, B).view(B, 1, 1, 1)
        noise_BCHW = torch.rand(B, spec.channels, spec.image_size, spec.image_size, generator=rng)
        pixels_BCHW = (noise_BCHW * strength_B).to(torch.uint8)
        expected_BD = embedder(pixels_BCHW).double()
        try:
            # ‖a - b‖² / 2 = 1 - cos(a, b) for unit vectors; and 0 for two zeros.
            apart_B = (run(pixels_BCHW).double() - expected_BD).square().sum(1) / 2
        except Exception as error:
            raise ConfigError(
                f"{format}: the exported model fails on {B} images: {one_line(error)}; "
                f"{_OTHER_FORMAT}"
            ) from error
        if not apart_B.max() <= TOLERANCE:  # a NaN is not
            raise ConfigError(
                f"{format}: the exported model gives other embeddings than the run's model: 1 - "
                f"cosine is up to {apart_B.max():.2g} on {B} images, expected up to "
                f"{TOLERANCE:g}, so no file is left; {_OTHER_FORMAT}"
            )


_OTHER_FORMAT = (
    "some operation of the backbone (such as as_strided) has another meaning there: replace it, or "
    "take another format"
)


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f'the format onnx needs {error.name}: pip install "fedss[onnx]"'
        ) from error
