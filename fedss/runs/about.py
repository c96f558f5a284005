"""``config.json``: what a run was told, its data and its model; the types and the one reader."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from fedss.runs.fields import read_file, wrong


class RunSettings(TypedDict):
    """Of the fields of :class:`fedss.config.Config` those that are read by name.

    The others lie beside them. A run of an earlier version lacks what came later.
    """

    method: str
    seed: int
    rounds: int
    sample_size: NotRequired[Any]
    clients_per_round: NotRequired[int | None]
    eval_every: NotRequired[Any]
    checkpoint_every: NotRequired[int | None]
    eval_split: NotRequired[str]
    backbone: NotRequired[str | None]
    embedding_size: NotRequired[Any]
    augment: NotRequired[str]


class DataFacts(TypedDict, total=False):
    """What is in a data set.

    A federation knows ``name``, ``image_shape`` and ``evaluated_at`` alone, and no other run has
    the last of them.
    """

    name: str
    fingerprint: str
    train_images: int
    train_classes: int
    train_clients: int
    own_classes: list[float]  # of a client: the fewest, the median, the most
    test_queries: int
    test_gallery: int | None  # None: each query is searched among the others
    test_classes: int
    test_classes_seen: int
    image_shape: list[int]  # C, H, W
    skipped_pictures: int
    unpaired_pictures: int
    evaluated_at: str


class ModelFacts(TypedDict):
    """Of what a run says of its model what is read by name."""

    parameters: int


class RunConfig(TypedDict):
    """The ``config.json`` of a run. Beside these it has the versions of what it was made with.

    ``resolved`` has the numbers of settings that are ``auto`` in ``config``, ``why`` their reasons,
    ``rounds_before`` how many rounds the run was to have before that was changed, the first first,
    ``code`` the own code of each setting that names some, see :class:`fedss.own_code.OwnCode`.
    """

    config: RunSettings
    rounds_before: NotRequired[list[int]]
    resolved: NotRequired[Mapping[str, Any]]
    data: DataFacts
    model: ModelFacts
    command: NotRequired[str | None]
    code: NotRequired[Mapping[str, Mapping[str, str]]]


class AnyConfig(TypedDict):
    """The ``config.json`` of a run, of a comparison (``methods``), or of a ``model`` folder."""

    config: Mapping[str, Any]
    rounds_before: NotRequired[list[int]]
    start: NotRequired[Mapping[str, Any]]  # the run whose weights it began with
    resolved: NotRequired[Mapping[str, Any]]
    data: NotRequired[DataFacts]
    model: NotRequired[Mapping[str, Any]]
    code: NotRequired[Mapping[str, Mapping[str, str]]]
    methods: NotRequired[list[str]]
    seeds: NotRequired[list[int]]


def run_of(folder: Path) -> Path:
    """The run that a model is of: ``run`` for ``run/model`` and ``run/best``; else ``folder``."""
    is_part = folder.name in ("best", "model") and (folder.parent / "config.json").exists()
    return folder.parent if is_part else folder


def read_run_config(folder: Path) -> RunConfig:
    """What a report needs of a run.

    Raises:
        RunFolderError: ``config.json`` is missing, damaged, or not that of a run.
    """
    path = folder / "config.json"
    return cast(RunConfig, _checked(read_file(RunConfig, path), path))


def read_any_config(folder: Path) -> AnyConfig:
    """What lies in a folder.

    Raises:
        RunFolderError: ``config.json`` is missing or damaged.
    """
    path = folder / "config.json"
    return cast(AnyConfig, _checked(read_file(AnyConfig, path), path))


def _checked(content: Any, path: Path) -> Any:
    for key in ("own_classes", "image_shape"):
        numbers = content.get("data", {}).get(key)
        if numbers is not None and len(numbers) != 3:
            raise wrong(path, key, "three numbers", numbers)
    return content
