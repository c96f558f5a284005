"""Records of a run or of a comparison -> one self-contained HTML page, or a PNG."""

import importlib
from pathlib import Path
from typing import Any


def write_report(folder: Path) -> Path:
    """Write ``folder/report.html`` from the records of a run or a comparison.

    Args:
        folder: a run folder (``config.json``, ``records.jsonl``), finished or not, or the folder
            of a comparison (``summary.json`` that names run folders).

    Returns:
        The path of the page: one file that refers to nothing outside itself. The same records
        give the same bytes.

    Raises:
        RunFolderError: records are missing or damaged, or the page cannot be written.
    """
    # Here, since drawing takes a large library, which most uses of this one need not load.
    from fedss.report.page import write_page
    from fedss.runs.reading import read_runs

    folder = Path(folder)
    return write_page(read_runs(folder), folder)


def __getattr__(name: str) -> Any:
    # Those that draw, as above; until 0.3 they were called ``bytes_picture`` and so on.
    name = name.replace("_picture", "_figure")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("fedss.report.figures"), name)


__all__ = ["bytes_figure", "clients_figure", "frontier_figure", "rounds_figure", "write_report"]
