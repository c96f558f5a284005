"""Tiny runs of every method, sampler, optimizer, store and engine, and what they left.

A refactoring must not change a bit. On one machine::

    python -m tests.pins write before.json   # before the change
    python -m tests.pins check before.json   # after it: names what differs

Bits differ between processors, so ``tests/test_pins.py`` holds what all share: the numbers, to
rounding, the fields of records and the headings of reports. Where these must change::

    python -m tests.pins portable tests/pins.json
"""

import hashlib
import json
import re
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors.numpy import load_file

import fedss
from tests import ranks
from tests.flower_grid import ProcessGrid
from tests.reference import tiny_backbone, tiny_dataset
from tests.reports import empty_reports
from tests.sites import federate, nodes, settings, write_photos

T = TypeVar("T")
KNOWN = Path(__file__).with_name("pins.json")
SMALL = {
    "embedding_size": 6,
    "sample_size": 7,
    "rounds": 3,
    "clients_per_round": 4,
    "batch_size": 2,
    "client_lr": 0.05,
    "class_row_lr": 0.5,
    "server_row_lr": 1.0,
    "server_momentum": 0.9,
    "eval_every": 1,
    "checkpoint_every": 1,
    "workers": 2,
}
SAMPLERS = ("uniform", "deck", "sticky")
OPTIMIZERS = ("sgd", "momentum", "adam")
STORES = ("memory", "file")
LOSSY = {"rows_down": "int8", "rows_up": "int4", "backbone_up": "int8"}
ENGINES: dict[str, dict[str, Any]] = {
    "one worker": {"workers": 1},
    "a stack of three": {"stack": 3},
    "lossy": LOSSY,
}


def configurations() -> dict[str, dict[str, Any]]:
    """Settings by the name of a run on the local engine."""
    runs: dict[str, dict[str, Any]] = {}
    for method in fedss.METHODS:
        for sampler in SAMPLERS if method == "fedss" else ("uniform",):
            for optimizer in OPTIMIZERS:
                for store in STORES:
                    runs[f"{method} {sampler} {optimizer} {store}"] = {
                        "method": method,
                        "sampler": sampler,
                        "server_optimizer": optimizer,
                        "row_store": store,
                        "server_lr": 0.05 if optimizer == "adam" else 1.0,
                        "server_row_lr": 0.05 if optimizer == "adam" else 1.0,
                    }
    for method in ("fedss", "moments"):
        runs |= {f"{method}, {engine}": {"method": method, **e} for engine, e in ENGINES.items()}
    runs["covers"] = {"method": "moments", "cover": 3}
    runs["margin"] = {"margin_kind": "cosface", "margin": 0.2, "lr_schedule": "cosine"}
    return runs


def train_locally(changes: dict[str, Any], folder: Path) -> Path:
    given = {"data": tiny_dataset(), "backbone": tiny_backbone(), "on_round": lambda record: None}
    fedss.train(fedss.Config(**{**SMALL, **changes}), folder / "run", **given)
    return folder / "run"


def train_on_two_ranks(method: str, folder: Path) -> Path:
    config = fedss.Config(**{**SMALL, "method": method})
    ranks.launch(2, ranks.train, {"run": config}, folder / "ranks")
    return folder / "ranks" / "run"


def train_with_flower(changes: dict[str, Any], folder: Path) -> Path:
    write_photos(folder)
    federate(ProcessGrid(nodes(folder)), settings(folder, **changes), folder / "run")
    return folder / "run"


def compare(folder: Path) -> Path:
    given = {"data": tiny_dataset(), "backbone": tiny_backbone(), "on_round": lambda record: None}
    fedss.compare(fedss.Config(**SMALL), ["full", "fedss"], [0, 1], folder / "run", **given)
    return folder / "run"


RUNS: dict[str, Callable[[Path], Path]] = {
    **{name: partial(train_locally, changes) for name, changes in configurations().items()},
    **{f"{name}, two ranks": partial(train_on_two_ranks, name) for name in ("fedss", "moments")},
    "fedss, Flower": partial(train_with_flower, {}),
    "deck, Flower": partial(train_with_flower, {"sampler": "deck"}),
    "moments, Flower": partial(train_with_flower, {"method": "moments"}),
    "compare": compare,
}
"""What trains, in a folder of its own; gives the run folder."""


IN_TEST = [
    name
    for name in RUNS
    if (not name.endswith("file") or name.startswith("fedss uniform")) and "lossy" not in name
]
"""Those of the test. Other tests hold that a store in a file changes no bit; and where numbers are
rounded at random, a processor's own rounding can turn any of them."""


def numbers(folder: Path) -> dict[str, list[float]]:
    """Of each model below: sums of its tensors against fixed random numbers."""
    found = {}
    for path in sorted(folder.rglob("model/*.safetensors")):
        for name, tensor in sorted(load_file(path).items()):
            if not np.issubdtype(tensor.dtype, np.floating):
                continue
            draws = np.random.default_rng(0).normal(size=tensor.shape)
            key = f"{path.relative_to(folder)}:{name}"
            found[key] = [float(np.sum(draws * tensor)), float(np.linalg.norm(tensor))]
    return found


def records(folder: Path) -> list[dict[str, Any]]:
    """All records below, without what a clock says."""
    lines = [
        json.loads(line)
        for path in sorted(folder.rglob("records.jsonl"))
        for line in path.read_text().splitlines()
    ]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def timeless(value: Any, key: str = "") -> Any:
    """Records and summaries as they are where everything takes a second."""
    if isinstance(value, dict):
        return {k: timeless(v, "seconds" if "seconds" in key else k) for k, v in value.items()}
    if isinstance(value, list):
        return [timeless(v, key) for v in value]
    return 1.0 if "seconds" in key and value is not None else value


def report(folder: Path) -> str:
    """The report as it is where everything takes a second, without drawings and paths."""
    for path in (p for p in folder.rglob("*.json*") if p.name.startswith(("records", "summary"))):
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        new = [json.dumps(timeless(json.loads(line))) + "\n" for line in lines]
        path.write_text("".join(new))
    fedss.write_report(folder)
    text = re.sub(r"<svg.*?</svg>", "", (folder / "report.html").read_text(), flags=re.S)
    text = re.sub(r"data:[^\"')]*", "", text)
    return text.replace(str(folder.parent), "")


def headings(folder: Path) -> list[str]:
    found = re.findall(r"<h[1-4][^>]*>(.*?)</h[1-4]>", report(folder), flags=re.S)
    return [re.sub(r"<[^>]*>|\s+", " ", heading).strip() for heading in found]


def digest(content: str | bytes) -> str:
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def exact(folder: Path) -> dict[str, str]:
    """SHA-256 of what a run left, bit for bit."""
    found = {
        str(path.relative_to(folder)): digest(path.read_bytes())
        for path in sorted(folder.rglob("*.safetensors"))
    }
    found["records"] = digest(json.dumps(records(folder)))
    found["report"] = digest(report(folder))
    return found


def portable(folder: Path) -> dict[str, Any]:
    """What must hold on every processor."""
    kept = records(folder)
    return {
        "numbers": numbers(folder),
        "fields": sorted({key for record in kept for key in record}),
        "losses": [record["loss"] for record in kept],
        "bytes": [[record["bytes_down"], record["bytes_up"]] for record in kept],
        "headings": headings(folder),
    }


def look(name: str, at: Callable[[Path], T]) -> T:
    """What one run left."""
    with tempfile.TemporaryDirectory() as folder:
        with empty_reports():  # ``report`` draws the one that is looked at
            run = RUNS[name](Path(folder))
        return at(run)


def main(what: str, file: str) -> None:
    at: Callable[[Path], Any] = portable if what == "portable" else exact
    names = IN_TEST if what == "portable" else RUNS
    content = {name: look(name, at) for name in names}
    if what != "check":
        lines = (f"{json.dumps(name)}: {json.dumps(left)}" for name, left in content.items())
        Path(file).write_text("{\n" + ",\n".join(lines) + "\n}\n")
        return
    before = json.loads(Path(file).read_text())
    different = [
        f"{name}: {part}"
        for name in sorted({*before, *content})
        for part in sorted({*before.get(name, {}), *content.get(name, {})})
        if before.get(name, {}).get(part) != content.get(name, {}).get(part)
    ]
    print("\n".join(different) or f"{len(content)} runs, all as before")
    sys.exit(bool(different))


if __name__ == "__main__":
    main(*sys.argv[1:])
