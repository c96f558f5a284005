"""Packages that are not installed with the library: imported where they are used, or explained."""

import importlib
from typing import Any

from fedss.errors import ConfigError

_PAIR = "pip install --force-reinstall torch torchvision --index-url URL"


def import_extra(module: str, extra: str) -> Any:
    """A module of a package that ``pip install "fedss[<extra>]"`` brings.

    Raises:
        ConfigError: it is not installed, or torchvision, which it imports, does not fit torch.
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
        import torch

        raise ConfigError(
            f"{module} cannot be imported because torchvision does not fit torch "
            f"{torch.__version__}; install a pair: {_PAIR}, with the URL that the selector of "
            f"pytorch.org/get-started shows. Python said: {str(error).strip()}"
        ) from error
