"""What holds the library's shape: public names, imports that run one way."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

import fedss
from fedss.choices import (
    METHOD_SUMMARIES,
    MOMENT_METHODS,
    SAMPLED_METHODS,
    SAMPLER_NAMES,
    Augment,
    Precision,
)
from fedss.data.augment import AUGMENTATIONS
from fedss.moved import MOVED
from fedss.sampling.samplers import SAMPLERS
from fedss.wire.codec import FORMATS

PACKAGE = Path(fedss.__file__).parent

PUBLIC = {
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
}

# Of the parts that are of use alone, in a training loop or a federation of one's own.
PUBLIC_OF_PARTS = {
    "fedss.core": """
        Broadcast ClassRequest ClassRows ClientUpdate Defence Engine Failure LocalTraining
        MeanUpdate RoundPlan Server ServerOptimizer ServerState Submodel Trainable aggregate
        apply_update broadcast create_class_rows current_rows draw_classes draw_cohort
        limit_own_classes request_classes run_round select step step_rows_ train_client
    """,
    "fedss.losses": """
        AbsentClasses ClassSample METHODS Method Moments Objective Scoring absent_classes
        completed_softmax logits moments_of moments_softmax negatives_only_softmax positive_hinge
        row_sums sampled_softmax spread_out uncorrected_softmax
    """,
    "fedss.sampling": """
        Deal Draw Negatives SAMPLERS Sampler ServerRows check_negatives class_sample deal_deck
        draw_common draw_first draw_uniform limit own_budget rest_of_common whole_sample
    """,
}

# A part may import those that stand below it, and itself.
PARTS = [
    "cli",
    "flower",
    "trust",
    "training",
    "search",
    "report",
    "inference",
    "runs",
    "engines",
    "settings",
    "variants",
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
    "privacy",
    "optional",
    "own_code",
    "log",
    "text",
    "secret",
    "seeds",
    "choices",
    "errors",
    "moved",
]


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            # `from fedss import core` is an import of fedss.core.
            names = [f"fedss.{alias.name}" for alias in node.names]
            found |= set(names) if node.module == "fedss" else {str(node.module)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def part(module: str) -> str:
    return module.split(".")[1]


def test_the_public_names_are_pinned():
    assert set(fedss.__all__) == PUBLIC
    assert all(getattr(fedss, name).__doc__ for name in PUBLIC)


@pytest.mark.parametrize("part", PUBLIC_OF_PARTS)
def test_the_public_names_of_parts_are_pinned(part):
    package = importlib.import_module(part)
    assert set(package.__all__) == set(PUBLIC_OF_PARTS[part].split())
    for name in package.__all__:
        # A type or a table has its text below it, where Python does not keep it.
        value = getattr(package, name)
        assert value.__doc__ or not (inspect.isclass(value) or inspect.isfunction(value)), name


def test_the_public_names_are_imported_from_where_type_checkers_see_them():
    (block,) = (
        n for n in ast.parse(Path(fedss.__file__).read_text()).body if isinstance(n, ast.If)
    )
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    places = {name.name: node.module for node in imports for name in node.names}
    assert places.keys() == PUBLIC
    for name, place in places.items():
        assert getattr(fedss, name) is getattr(importlib.import_module(place), name)


def test_fedss_is_imported_at_once_and_what_it_has_when_it_is_used():
    code = """
import sys, fedss
assert {*fedss.__all__, "__version__"} <= {*dir(fedss)}
assert "torch" not in sys.modules
assert fedss.data.Images is fedss.Images and not hasattr(fedss, "nix")
assert "Config" not in vars(fedss) and fedss.Config and "Config" in vars(fedss)
from fedss import *
print(train.__name__, fedss.__version__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"train {fedss.__version__}\n", "")


def test_names_of_choices_are_those_of_what_there_is():
    assert {name: method.summary for name, method in fedss.METHODS.items()} == METHOD_SUMMARIES
    moments = (name for name, method in fedss.METHODS.items() if method.moments)
    assert tuple(moments) == MOMENT_METHODS
    sampled = (name for name, m in fedss.METHODS.items() if m.negatives == "sampled")
    assert tuple(sampled) == SAMPLED_METHODS
    assert tuple(SAMPLERS) == SAMPLER_NAMES
    assert tuple(FORMATS) == get_args(Precision)
    assert tuple(AUGMENTATIONS) == get_args(Augment)[1:]


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
            # Of those that write to a terminal, some without a print.
            assert not {name for name in imports(path) if name.split(".")[0] in ("rich", "tqdm")}
            if path.name not in ("log.py", "__main__.py"):
                source = path.read_text()
                assert not re.search(r"sys\.std(out|err)", source), path


def test_old_names_of_modules_are_kept_for_a_release(monkeypatch):
    outer = {f"fedss.{old}" for old in MOVED}
    for name in [n for n in sys.modules if any(f"{n}.".startswith(f"{o}.") for o in outer)]:
        monkeypatch.delitem(sys.modules, name)
    for old in MOVED:
        new = importlib.import_module(f"fedss.{MOVED[old]}")
        with pytest.warns(DeprecationWarning, match=f"fedss.{MOVED[old]} since"):
            module = importlib.import_module(f"fedss.{old}")
        names = {name for name in vars(new) if not name.startswith("__")}
        assert all(getattr(module, name) is getattr(new, name) for name in names), old


def test_charts_and_boards_are_loaded_where_they_are_drawn():
    code = "import sys, fedss.training.experiment, fedss.cli.tables; print(*sys.modules)"
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
        heavy |= {"python_multipart", "onnx", "onnxruntime", "onnxscript", "dp_accounting"}
        if path.parent == PACKAGE / "flower":
            heavy -= {"flwr"}
        assert not {n.split(".")[0] for n in names} & heavy, path


def bodies() -> Iterator[tuple[str, int]]:
    """Each function of the library, and the lines of its body without its docstring."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[ast.get_docstring(node) is not None :]
                lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
                yield f"{path.relative_to(PACKAGE)}:{node.name}", lines


def test_functions_and_modules_are_short():
    assert {name: lines for name, lines in bodies() if lines > 60} == {}
    modules = {str(p.relative_to(PACKAGE)): p.read_text() for p in PACKAGE.rglob("*.py")}
    assert {name: t.count("\n") for name, t in modules.items() if t.count("\n") > 450} == {}


def test_a_public_name_means_one_thing():
    """Commands have the names of what they call, and a program is an ``app`` with a ``main``."""
    places: dict[str, set[str]] = {}
    defined = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [node.name] if isinstance(node, defined) else []
            if any(
                ast.unparse(d).startswith("command(") for d in getattr(node, "decorator_list", ())
            ):
                continue
            if isinstance(node, ast.Assign):
                names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names = [node.target.id]
            for name in names:
                if not name.startswith("_") and len(name) > 1 and name not in ("app", "main"):
                    places.setdefault(name, set()).add(str(path.relative_to(PACKAGE)))
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


def test_functions_of_the_old_evaluation_module_answer():
    from fedss.evaluation import evaluate, task, verify

    assert (evaluate, verify) == (task.evaluate, task.verify)


@pytest.mark.parametrize(
    "path",
    sorted((Path(__file__).parents[1] / "benchmarks/results").glob("*.json")),
    ids=lambda path: path.name,
)
def test_results_name_no_folder_of_the_machine_that_made_them(path):
    assert not re.findall(r'"(/[^"]*)"', path.read_text())
