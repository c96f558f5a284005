"""Packages that are not installed with the library: imported where they are used, or explained."""

import importlib
from typing import Any

import torch

from fedss.errors import ConfigError


def import_extra(module: str, extra: str) -> Any:
    """A module of timm or torchvision, which ``pip install "fedss[<extra>]"`` brings.

    Raises:
        ConfigError: it is not installed, or torchvision does not fit torch.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        name = module.partition(".")[0]
        raise ConfigError(f'{name} needs {error.name}: pip install "fedss[{extra}]"') from error
    except (RuntimeError, ImportError, AttributeError) as error:
        # A torchvision of another build fails with "operator torchvision::nms does not exist";
        # a second attempt in the same process with errors of a half imported package.
        if "torchvision" not in str(error):
            raise
        raise ConfigError(
            f"{module} cannot be imported because torchvision does not fit torch "
            f"{torch.__version__}: install both from the same build, from one index "
            f"(CPU or the same CUDA version; see pytorch.org/get-started). Python said: {error}"
        ) from error
