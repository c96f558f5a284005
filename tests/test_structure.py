"""What holds the library's shape: public names, imports that run one way."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import fedss
from fedss.moved import MOVED

PACKAGE = Path(fedss.__file__).parent

PUBLIC = {
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
}

# A part may import those that stand below it, and itself.
PARTS = [
    "cli",
    "flower",
    "training",
    "search",
    "report",
    "inference",
    "runs",
    "engines",
    "config",
    "wire",
    "core",
    "evaluation",
    "sampling",
    "losses",
    "data",
    "models",
    "distributed",
    "files",
    "optional",
    "log",
    "text",
    "seeds",
    "errors",
    "moved",
]


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def part(module: str) -> str:
    return module.split(".")[1]


def test_the_public_names_are_pinned():
    assert set(fedss.__all__) == PUBLIC
    assert all(getattr(fedss, name).__doc__ for name in PUBLIC)


def test_imports_run_one_way():
    seen = set()
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if name in ("__init__", "__main__"):
            continue
        seen.add(name)
        for module in imports(path):
            if module.startswith("fedss.") and part(module) != name:
                assert PARTS.index(part(module)) > PARTS.index(name), f"{path} imports {module}"
    assert seen == set(PARTS)


def test_library_code_logs_and_never_prints():
    for path in PACKAGE.rglob("*.py"):
        if path.parent != PACKAGE / "cli":
            names = {n.id for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Name)}
            assert "print" not in names, path


@pytest.mark.parametrize("old", MOVED)
def test_old_names_of_modules_are_kept_for_a_release(old, monkeypatch):
    for name in [name for name in sys.modules if f"{name}.".startswith(f"fedss.{old}.")]:
        monkeypatch.delitem(sys.modules, name)
    new = importlib.import_module(f"fedss.{MOVED[old]}")
    with pytest.warns(DeprecationWarning, match=f"fedss.{MOVED[old]} since"):
        module = importlib.import_module(f"fedss.{old}")
    names = {name for name in vars(new) if not name.startswith("__")}
    assert all(getattr(module, name) is getattr(new, name) for name in names)


def test_charts_and_boards_are_loaded_where_they_are_drawn():
    code = "import sys, fedss, fedss.cli; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    assert not set(loaded.decode().split()) & {"matplotlib", "tensorboard", "jinja2", "pandas"}


def test_heavy_extras_are_imported_where_they_are_used():
    for path in PACKAGE.rglob("*.py"):
        top = {
            n
            for n in ast.parse(path.read_text()).body
            if isinstance(n, ast.Import | ast.ImportFrom)
        }
        names = {
            (node.module or "") if isinstance(node, ast.ImportFrom) else node.names[0].name
            for node in top
        }
        heavy = {"timm", "torchvision", "pyarrow", "pi_heif", "flwr", "starlette", "uvicorn"}
        heavy |= {"python_multipart", "onnx", "onnxruntime", "onnxscript"}
        if path.parent == PACKAGE / "flower":
            heavy -= {"flwr"}
        assert not {n.split(".")[0] for n in names} & heavy, path
