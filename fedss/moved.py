"""Modules by the names that they had before 0.3, for one release."""

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# Modules that only went into a folder, by folder; then those with another name too.
_INTO = {
    "cli": "output",
    "core": "algorithm class_rows client optimizers",
    "data": "augment",
    "engines": "allocator",
    "evaluation": "baselines confusions intervals retrieval verification",
    "inference": "embedding model_card",
    "losses": "methods moments softmax",
    "runs": "checkpoint progress records",
    "sampling": "samplers",
    "training": "build experiment",
    "wire": "codec",
}
_RENAMED = """
    beginnings=files board=runs.tensorboard data.celeba=data.sets.faces
    data.cifar100=data.sets.cifar100 data.glyphs=data.sets.glyphs
    data.inaturalist=data.sets.user_split data.landmarks=data.sets.user_split
    data.lfw=data.sets.faces data.omniglot=data.sets.omniglot data.products=data.sets.products
    data.published=data.sets.published data.user_split=data.sets.user_split
    describe=training.summary engines.flower=flower
    engines.flower.engine=flower.engine engines.flower.messages=flower.messages
    engines.flower.registry=flower.registry engines.flower.replies=flower.validation
    engines.flower.server=flower.server_app engines.flower.settings=flower.settings
    engines.flower.site=flower.client_app engines.stacked=core.client_stacked extras=optional
    pace=runs.eta pictures=inference.pixels portable=inference.export ranks=distributed
    report.records=runs.reading report.words=runs.headlines run_folder=runs.folder
    search.page=search.web.page search.server=search.web.app search.shelf=search.store
"""
MOVED = {name: f"{folder}.{name}" for folder, names in _INTO.items() for name in names.split()}
MOVED |= dict(pair.split("=") for pair in _RENAMED.split())


class _Finder(MetaPathFinder, Loader):
    """Gives the module of the new name for the old one, and says so."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, old = fullname.partition(".")
        return ModuleSpec(fullname, self) if package == "fedss" and old in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__
        new = f"fedss.{MOVED[old.removeprefix('fedss.')]}"
        warnings.warn(
            f"{old} is {new} since fedss 0.3; the old name goes with the next release",
            DeprecationWarning,
            stacklevel=2,
        )
        sys.modules[old] = importlib.import_module(new)


def keep_old_names() -> None:
    """Let ``import fedss.softmax`` and the like work as before."""
    sys.meta_path.insert(0, _Finder())
