"""Who may write into a run folder: one process at a time, one configuration for good."""

import dataclasses
import importlib.metadata
import logging
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout

from fedss.config import OPTIONS, Config
from fedss.distributed import Ranks
from fedss.errors import RunFolderError
from fedss.files import RUN_FOLDER_ADVICE, remove_litter, write_json, writing
from fedss.own_code import OwnCode, code_names, find_code, other_file
from fedss.runs.about import AnyConfig, DataFacts, read_any_config
from fedss.runs.checkpoint import newest_round
from fedss.runs.summaries import read_summaries
from fedss.settings import Setting
from fedss.text import counted

_LOG = logging.getLogger("fedss.runs")

# What may differ between a run and its continuation: nothing that decides the weights (a device
# and a stack decide their rounding). Files may have moved: what is in them is compared.
_FREE_FIELDS = (
    "device",
    "stack",
    "workers",
    "keep_memory",
    "eval_every",
    "checkpoint_every",
    "patience",
    "row_store",
    "data_path",
    "weights",
    "secret_file",
    "skip_broken",
)
_LEFT_BY_A_RUN = ("summary.json", "records.jsonl", "checkpoint", "model")
# What belongs to the last round's model. The summary goes first: without it a run is not done.
_OF_THE_END = (
    "summary.json",
    "model",
    "by_class.json",
    "retrieval.npz",
    "confusions.npz",
    "verification.json",
    "audit.json",
)


@contextmanager
def lock_folder(folder: Path, advice: str = RUN_FOLDER_ADVICE) -> Iterator[None]:
    """Make the folder and keep other processes out of it; failed writes become RunFolderErrors.

    Raises:
        RunFolderError: another process has locked it, or it cannot be written.
    """
    with writing(folder, advice):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(folder / ".lock", timeout=0):
                for place in (".", "model", "best", "checkpoint/first"):
                    remove_litter(folder / place)
                yield
        except Timeout as error:
            raise RunFolderError(
                f"{folder} is in use by another fedss process; wait for it, or choose another "
                "folder"
            ) from error


def first_rounds(folder: Path, config: Config) -> int:
    """How many rounds the run in a folder was to have when it began; else those of ``config``.

    Raises:
        RunFolderError: its ``config.json`` is damaged, or gone.
    """
    stored = _read_config(folder)
    if stored is None:
        return config.rounds
    first = [*stored.get("rounds_before", []), stored["config"].get("rounds")][0]
    return first if isinstance(first, int) and first >= 1 else config.rounds


def write_run_config(
    folder: Path,
    config: Config,
    settings: Mapping[str, Setting],
    data: DataFacts,
    model: Mapping[str, Any],
    start: Mapping[str, Any] | None,
    ranks: Ranks,
) -> None:
    """Write a run's ``config.json``, or check that the folder was made with the same one.

    Its number of rounds may be another, down to those that are trained: then the run is no longer
    done, and settings that were ``auto`` may be numbers. The first rank does all this, and the
    others check what they find then. Paths are stored as absolute ones.

    Raises:
        RunFolderError: the folder holds another run (names the fields that differ), a
            comparison, or a run whose configuration is gone; more rounds are trained than asked
            for; or not all ranks see the folder.
    """
    values = {name: setting.value for name, setting in settings.items()}
    reasons = {name: setting.why for name, setting in settings.items()}
    content: dict[str, Any] = {"config": _stored(config), "resolved": values, "why": reasons}
    content |= {"data": dict(data), "model": dict(model)} | _versions()
    if start is not None:
        content["start"] = dict(start)
    if code := {field: find_code(name) for field, name in code_names(_stored(config)).items()}:
        content["code"] = {field: dataclasses.asdict(of_field) for field, of_field in code.items()}
    if not ranks.first:
        ranks.gather(None)
        if not (folder / "config.json").exists():
            raise RunFolderError(f"{folder} is not the folder that rank 0 has made; {_SHARE}")
    stored = _read_config(folder)
    if stored is None:
        write_json(folder / "config.json", content)
    elif "methods" in stored:
        raise RunFolderError(f"{folder} holds a comparison; choose another folder for one run")
    else:
        _check_same_code(folder, code, stored.get("code", {}))
        parts, before = ("config", "resolved", "data", "model"), stored["config"].get("rounds")
        if not isinstance(before, int) or before == config.rounds:
            _check_same(folder, content, stored, parts, _FREE_FIELDS)
        else:
            told = [o.name for o in OPTIONS if o.auto and stored["config"].get(o.name) == "auto"]
            # Other rules follow from a number that took the place of auto.
            given = any(content["config"][name] != "auto" for name in told)
            kept = tuple(part for part in parts if part != "resolved" or not given)
            _check_same(folder, content, stored, kept, (*_FREE_FIELDS, "rounds", *told))
            content["rounds_before"] = [*stored.get("rounds_before", []), before]
            _reopen(folder, config.rounds, before)
            write_json(folder / "config.json", content)
    if ranks.first:
        ranks.gather(None)


def _check_same_code(folder: Path, now: Mapping[str, OwnCode], kept: Mapping[str, Any]) -> None:
    for field, code in now.items():
        before = OwnCode(code.name, kept.get(field, {}).get("sha256", ""))
        if kept.get(field, {}).get("name") == code.name and before != code:
            raise RunFolderError(
                f"{folder} was made with {other_file(before, code)}; put the file back as it was, "
                "or choose another folder"
            )


def _reopen(folder: Path, rounds: int, before: int) -> None:
    """Make a run one that is not done, and is to have another number of rounds than before."""
    done = newest_round(folder / "checkpoint")
    if rounds < done:
        raise RunFolderError(
            f"{folder}: {counted(done, 'round')} are trained, expected as many or more, got "
            f"rounds {rounds}; choose another folder for a shorter run"
        )
    for summary in read_summaries(folder):
        if summary["rounds"] != done:
            raise RunFolderError(
                f"{folder}: expected the checkpoint of round {summary['rounds']} to go on from, "
                f"found {f'that of round {done}' if done else 'none'}; put its folder checkpoint "
                "back, or begin in another folder with the weights of this run (--from)"
            )
    _LOG.info(
        "%s was to have %s; it goes on to %d, with the settings that it began with",
        *(folder, counted(before, "round"), rounds),
    )
    _remove_end(folder)


def _remove_end(folder: Path) -> None:
    """Remove what a run or a comparison leaves when it is done."""
    for name in _OF_THE_END:
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
        else:
            (folder / name).unlink(missing_ok=True)


def check_same_round(folder: Path, rounds: Sequence[int]) -> None:
    """Whether all ranks go on from the same round.

    Raises:
        RunFolderError: they do not.
    """
    if len(set(rounds)) > 1:
        raise RunFolderError(
            f"{folder}: the ranks found checkpoints of rounds {', '.join(map(str, rounds))}; "
            f"{_SHARE}. If it is one, it lags behind: start again in a minute"
        )


_SHARE = "ranks on several hosts need an --out that all of them see, such as a network drive"


def write_comparison_config(
    folder: Path, config: Config, methods: list[str], seeds: list[int], start: Path | None = None
) -> Path | None:
    """Write a comparison's ``config.json``, or check that only methods and seeds differ.

    Gives the run that its runs start from: ``start``, or the one it was told before. With more
    rounds than before it is no longer done; then it has to be the whole comparison.

    Raises:
        RunFolderError: the folder holds a single run, or a comparison with other settings.
    """
    content = {"config": _stored(config), "methods": methods, "seeds": seeds} | _versions()
    stored = _read_config(folder)
    if stored is not None:
        if "methods" not in stored:
            raise RunFolderError(f"{folder} holds a single run; choose another folder to compare")
        before_start = stored.get("start", {}).get("run")
        if start is not None and before_start != str(start):
            where = f"start from {before_start}, not from {start}" if before_start else "began anew"
            raise RunFolderError(
                f"{folder}: its runs {where}; leave --from out, or choose another folder"
            )
        start = None if before_start is None else Path(before_start)
        free, before = [*_FREE_FIELDS, "method", "seed"], stored["config"].get("rounds")
        longer = isinstance(before, int) and config.rounds > before
        _check_same(folder, content, stored, ("config",), [*free, *["rounds"] * longer])
        missing = {*stored["methods"]} - {*methods} or {*stored.get("seeds", [])} - {*seeds}
        if longer and missing:
            known = " ".join(stored["methods"]), " ".join(map(str, stored.get("seeds", [])))
            raise RunFolderError(
                f"{folder}: with more rounds all its runs go on: expected --methods {known[0]} "
                f"--seeds {known[1]}, and others if you like"
            )
        if longer:
            _remove_end(folder)
        content["methods"] = list(dict.fromkeys([*stored["methods"], *methods]))
        content["seeds"] = list(dict.fromkeys([*stored["seeds"], *seeds]))
    if start is not None:
        content["start"] = {"run": str(start)}
    write_json(folder / "config.json", content)
    return start


def with_absolute_paths(config: Config) -> Config:
    """The same configuration, whatever the working directory will be."""
    named = ((name, getattr(config, name)) for name in ("data_path", "weights", "secret_file"))
    paths: Any = {name: str(Path(path).resolve()) for name, path in named if path}
    return dataclasses.replace(config, **paths)


def _stored(config: Config) -> dict[str, Any]:
    return dataclasses.asdict(with_absolute_paths(config))


def _versions() -> dict[str, str]:
    return {
        "fedss": importlib.metadata.version("fedss"),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def _read_config(folder: Path) -> AnyConfig | None:
    if (folder / "config.json").exists():
        return read_any_config(folder)
    left = [name for name in _LEFT_BY_A_RUN if (folder / name).exists()]
    if left:
        raise RunFolderError(
            f"{folder} has {', '.join(left)} but no config.json, so nobody can tell what made "
            "them; put config.json back, or choose another folder"
        )
    return None


def _check_same(
    folder: Path,
    content: Mapping[str, Any],
    stored: Mapping[str, Any],
    parts: Sequence[str],
    free: Sequence[str],
) -> None:
    # What an older version did not know had what is the default now.
    defaults = {"config": {option.name: option.default for option in OPTIONS}}
    before = {part: {**defaults.get(part, {}), **stored.get(part, {})} for part in parts}
    different = [
        f"{name}: {before[part].get(name)!r} there, {value!r} now"
        for part in parts
        for name, value in content[part].items()
        if name not in (free if part == "config" else _FREE_FIELDS)
        and before[part].get(name) != value
    ]
    if different:
        raise RunFolderError(
            f"{folder} was made with other settings ({'; '.join(different)}); choose another "
            "folder, or the settings of its config.json (--config)"
        )
