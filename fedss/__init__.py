"""Federated Sampled Softmax: image embeddings from images that stay where they are."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fedss.moved import keep_old_names

if TYPE_CHECKING:
    from fedss.config import Config
    from fedss.data import Dataset, Images, RetrievalTask, load_dataset
    from fedss.errors import ConfigError, DataError, DivergedError, FedssError, RunFolderError
    from fedss.evaluation.retrieval import RetrievalMetrics, evaluate_retrieval, nearest
    from fedss.evaluation.task import evaluate
    from fedss.inference.embedding import Embeddings, embed_files
    from fedss.inference.export import export
    from fedss.inference.hub import from_pretrained, push_to_hub
    from fedss.inference.model import load
    from fedss.log import show_on_stderr
    from fedss.losses.methods import METHODS
    from fedss.models import Embedder
    from fedss.report import write_report
    from fedss.training.build import load_data
    from fedss.training.experiment import Run, compare, train
    from fedss.training.loop import STOP

    __version__: str

keep_old_names()

# Where each name is, as above: its module is imported when it is first used (PEP 562), as torch
# takes seconds, and a command's help needs none of it.
_HOMES = {
    name: module
    for module, names in {
        "config": "Config",
        "data": "Dataset Images RetrievalTask load_dataset",
        "errors": "ConfigError DataError DivergedError FedssError RunFolderError",
        "evaluation.retrieval": "RetrievalMetrics evaluate_retrieval nearest",
        "evaluation.task": "evaluate",
        "inference.embedding": "Embeddings embed_files",
        "inference.export": "export",
        "inference.hub": "from_pretrained push_to_hub",
        "inference.model": "load",
        "log": "show_on_stderr",
        "losses.methods": "METHODS",
        "models": "Embedder",
        "report": "write_report",
        "training.build": "load_data",
        "training.experiment": "Run compare train",
        "training.loop": "STOP",
    }.items()
    for name in names.split()
}

__all__ = [
    "METHODS",
    "STOP",
    "Config",
    "ConfigError",
    "DataError",
    "Dataset",
    "DivergedError",
    "Embedder",
    "Embeddings",
    "FedssError",
    "Images",
    "RetrievalMetrics",
    "RetrievalTask",
    "Run",
    "RunFolderError",
    "compare",
    "embed_files",
    "evaluate",
    "evaluate_retrieval",
    "export",
    "from_pretrained",
    "load",
    "load_data",
    "load_dataset",
    "nearest",
    "push_to_hub",
    "show_on_stderr",
    "train",
    "write_report",
]


def __getattr__(name: str) -> Any:
    """A public name, the version, or a module of the package, as ``fedss.data``."""
    value: Any
    if name in _HOMES:
        value = getattr(import_module(f"fedss.{_HOMES[name]}"), name)
    elif name == "__version__":
        from importlib.metadata import version

        value = version("fedss")
    else:
        try:
            return import_module(f"fedss.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"fedss.{name}":
                raise
            raise AttributeError(f"module 'fedss' has no attribute {name!r}") from None
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__, "__version__"]
