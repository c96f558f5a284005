"""timm and torchvision as they are installed; tests that need them are skipped where they fail.

A torchvision of another build than torch (that of PyPI for CUDA beside the CPU build of torch) dies
when it is imported, and with it timm and torchmetrics: docs/backbones.md has the line that installs
a pair. Nothing here makes a broken installation work.
"""

import importlib
from typing import Any

import pytest
import torch


def _imported(name: str) -> tuple[Any, str]:
    try:
        return importlib.import_module(name), ""
    except (ImportError, RuntimeError, AttributeError) as error:
        return None, f"{name} cannot be imported beside torch {torch.__version__}: {error}"


torchvision, _why_no_torchvision = _imported("torchvision")
timm, _why_no_timm = _imported("timm") if torchvision else (None, _why_no_torchvision)

needs_torchvision = pytest.mark.skipif(torchvision is None, reason=_why_no_torchvision)
needs_timm = pytest.mark.skipif(timm is None, reason=_why_no_timm)


def by_timm(*names: str) -> Any:
    """Parameters of a test of backbones by name, of which timm's need timm."""
    return [
        pytest.param(name, marks=needs_timm if name.startswith("timm:") else ()) for name in names
    ]
