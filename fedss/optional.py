"""Packages that are not installed with the library: imported where they are used, or explained."""

import importlib
import logging
import sys
from functools import cache
from typing import Any

from fedss.errors import ConfigError

_LOG = logging.getLogger(__name__)
_PAIR = "pip install --force-reinstall torch torchvision --index-url URL"
_MISFIT = (RuntimeError, ImportError, AttributeError)


def import_extra(module: str, extra: str) -> Any:
    """A module of a package that ``pip install "fedss[<extra>]"`` brings.

    A torchvision of another build than torch fails at its import for want of compiled operators.
    timm imports torchvision, but needs none of them: they are declared, and the import goes on.

    Raises:
        ConfigError: it is not installed, or torchvision, which it imports, does not fit torch.
    """
    try:
        try:
            return importlib.import_module(module)
        except _MISFIT as error:
            if isinstance(error, ModuleNotFoundError) or "torchvision" not in str(error):
                raise
            # What is half imported would fail again, in other ways.
            for name in [n for n in sys.modules if n.partition(".")[0] in ("torchvision", "timm")]:
                del sys.modules[name]
            _declare_operators()
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        name = module.partition(".")[0]
        raise ConfigError(f'{name} needs {error.name}: pip install "fedss[{extra}]"') from error
    except _MISFIT as error:
        if "torchvision" not in str(error):
            raise
        import torch

        raise ConfigError(
            f"{module} cannot be imported because torchvision does not fit torch "
            f"{torch.__version__}; install a pair: {_PAIR}, with the URL that the selector of "
            f"pytorch.org/get-started shows. Python said: {str(error).strip()}"
        ) from error


@cache
def _declare_operators() -> Any:
    """The operators that torchvision asks for when it is imported, without an implementation."""
    import torch

    _LOG.debug(
        "torchvision is of another build than torch %s; its compiled operators, which fedss does "
        "not use, are missing",
        torch.__version__,
    )
    library: Any = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library
