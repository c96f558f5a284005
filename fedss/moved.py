"""Modules by the names that they had before 0.3, for one release."""

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "algorithm": "core.algorithm",
    "allocator": "engines.allocator",
    "augment": "data.augment",
    "baselines": "evaluation.baselines",
    "board": "runs.tensorboard",
    "build": "training.build",
    "checkpoint": "runs.checkpoint",
    "class_rows": "core.class_rows",
    "client": "core.client",
    "codec": "wire.codec",
    "confusions": "evaluation.confusions",
    "describe": "training.summary",
    "embedding": "inference.embedding",
    "engines.flower": "flower",
    "engines.flower.engine": "flower.engine",
    "engines.flower.messages": "flower.messages",
    "engines.flower.registry": "flower.registry",
    "engines.flower.replies": "flower.validation",
    "engines.flower.server": "flower.server_app",
    "engines.flower.settings": "flower.settings",
    "engines.flower.site": "flower.client_app",
    "engines.stacked": "core.client_stacked",
    "experiment": "training.experiment",
    "extras": "optional",
    "intervals": "evaluation.intervals",
    "methods": "losses.methods",
    "model_card": "inference.model_card",
    "moments": "losses.moments",
    "optimizers": "core.optimizers",
    "output": "cli.output",
    "pace": "runs.eta",
    "pictures": "inference.pixels",
    "portable": "inference.export",
    "progress": "runs.progress",
    "ranks": "distributed",
    "records": "runs.records",
    "report.records": "runs.reading",
    "report.words": "runs.headlines",
    "retrieval": "evaluation.retrieval",
    "rff": "sampling.rff",
    "run_folder": "runs.folder",
    "samplers": "sampling.samplers",
    "search.page": "search.web.page",
    "search.server": "search.web.app",
    "search.shelf": "search.store",
    "softmax": "losses.softmax",
    "verification": "evaluation.verification",
}


class _Finder(MetaPathFinder, Loader):
    """Gives the module of the new name for the old one, and says so."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        known = fullname.removeprefix("fedss.") in MOVED and fullname.startswith("fedss.")
        return ModuleSpec(fullname, self, is_package=True) if known else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new = f"fedss.{MOVED[spec.name.removeprefix('fedss.')]}"
        warnings.warn(
            f"{spec.name} is {new} since fedss 0.3; the old name goes with the next release",
            DeprecationWarning,
            stacklevel=2,
        )
        found = ModuleType(spec.name, f"The module {new}, by its old name.")
        found.__dict__.update(
            {k: v for k, v in vars(importlib.import_module(new)).items() if not k.startswith("__")}
        )
        return found

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is left to do."""


def keep_old_names() -> None:
    """Let ``import fedss.softmax`` and the like work as before."""
    sys.meta_path.insert(0, _Finder())
