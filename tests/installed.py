"""timm and torchvision as they are installed; tests that need them are skipped where they fail.

A torchvision of another build than torch (that of PyPI for CUDA beside the CPU build of torch) is
imported as the library does it: :func:`fedss.optional.import_extra`.
"""

from typing import Any

import pytest

from fedss.errors import ConfigError
from fedss.optional import import_extra


def _imported(name: str) -> tuple[Any, str]:
    try:
        return import_extra(name, "timm"), ""
    except ConfigError as error:
        return None, str(error)


torchvision, _why_no_torchvision = _imported("torchvision")
timm, _why_no_timm = _imported("timm") if torchvision else (None, _why_no_torchvision)

needs_torchvision = pytest.mark.skipif(torchvision is None, reason=_why_no_torchvision)
needs_timm = pytest.mark.skipif(timm is None, reason=_why_no_timm)


def by_timm(*names: str) -> Any:
    """Parameters of a test of backbones by name, of which timm's need timm."""
    return [
        pytest.param(name, marks=needs_timm if name.startswith("timm:") else ()) for name in names
    ]
