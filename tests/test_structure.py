"""What holds the library's shape: public names, imports that run one way."""

import ast
import subprocess
import sys
from pathlib import Path

import fedss

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

# A module may import those of lower layers, and of its own folder.
LAYERS = [
    {"errors", "beginnings", "seeds", "allocator", "pace", "text"},
    {"extras", "files", "ranks", "output", "intervals"},
    {"softmax", "codec", "rff", "retrieval", "models", "data", "report", "augment"},
    {"samplers", "moments", "methods", "verification", "confusions"},
    {"class_rows"},
    {"optimizers", "client"},
    {"algorithm"},
    {"config", "wire", "checkpoint", "pictures"},
    {"engines"},
    {"build", "run_folder", "records", "embedding", "evaluation"},
    {"describe", "progress", "model_card", "board", "baselines"},
    {"experiment"},
    {"portable", "search"},
    {"cli"},
]


# Flower starts these, as a shell starts the command line.
APPS = ("engines/flower/server.py", "engines/flower/site.py")


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
    level = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    seen = set()
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        name = "cli" if path.relative_to(PACKAGE).as_posix() in APPS else name
        if name in ("__init__", "__main__"):
            continue
        seen.add(name)
        for module in imports(path):
            if module.startswith("fedss.") and part(module) != name:
                assert level[part(module)] < level[name], f"{path.name} imports {module}"
    assert seen == set(level)


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
        if path.parent == PACKAGE / "engines" / "flower":
            heavy -= {"flwr"}
        assert not {n.split(".")[0] for n in names} & heavy, path
