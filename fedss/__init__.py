"""Federated Sampled Softmax: image embeddings from images that stay where they are."""

from importlib.metadata import version

from fedss.config import Config
from fedss.data import Dataset, Images, RetrievalTask, load_dataset
from fedss.errors import ConfigError, DataError, DivergedError, FedssError, RunFolderError
from fedss.evaluation.retrieval import RetrievalMetrics, evaluate_retrieval, nearest
from fedss.evaluation.task import evaluate
from fedss.inference.embedding import Embeddings, embed_files
from fedss.inference.export import export
from fedss.inference.model import load
from fedss.log import show_on_stderr
from fedss.losses.methods import METHODS
from fedss.models import Embedder
from fedss.moved import keep_old_names
from fedss.report import write_report
from fedss.training.build import load_data
from fedss.training.experiment import Run, compare, train
from fedss.training.loop import STOP

keep_old_names()

__version__ = version("fedss")

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
    "load",
    "load_data",
    "load_dataset",
    "nearest",
    "show_on_stderr",
    "train",
    "write_report",
]
