"""The notebook of the examples runs from its first cell to its last."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import fedss

NOTEBOOK = Path(__file__).parents[2] / "examples" / "from_csv_to_search.ipynb"


def printed(notebook: nbformat.NotebookNode) -> str:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout")


@pytest.mark.slow
# Of the client's own event loop.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_from_csv_to_search(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDSS_NOTEBOOK", str(tmp_path / "notebook"))
    monkeypatch.setenv("FEDSS_NOTEBOOK_ROUNDS", "2")
    monkeypatch.setenv("FEDSS_CACHE", str(tmp_path / "cache"))
    package = str(Path(fedss.__file__).parents[1])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([package, os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(NOTEBOOK, 4)
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    text = printed(notebook)
    assert "3.png [('" in text
    assert "measured with 11 classes" in text
    assert float(text.split("cosine to PyTorch at least")[1]) > 1 - 1e-5
    assert len(list((tmp_path / "notebook" / "photos").rglob("*.png"))) == 1536


def test_what_the_reader_sees_was_run():
    """Every code cell has been run, in order, without an error."""
    cells = [cell for cell in nbformat.read(NOTEBOOK, 4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [o for cell in cells for o in cell.outputs if o.output_type == "error"]
