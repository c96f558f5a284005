"""Federated Sampled Softmax: image embeddings from pictures that stay where they are."""

from importlib.metadata import version

from fedss.build import load_data
from fedss.config import Config
from fedss.data import Dataset, Images, RetrievalTask, load_dataset
from fedss.embedding import Embeddings, embed_files
from fedss.errors import ConfigError, DataError, DivergedError, FedssError, RunFolderError
from fedss.evaluation import evaluate
from fedss.experiment import Run, compare, load, train
from fedss.methods import METHODS
from fedss.models import Embedder
from fedss.portable import export
from fedss.report import write_report
from fedss.retrieval import RetrievalMetrics, evaluate_retrieval, nearest

__version__ = version("fedss")

__all__ = [
    "METHODS",
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
    "train",
    "write_report",
]
