"""A trained model, from the folder that it was left in."""

import logging
from pathlib import Path

from torch import nn
from torch.nn.utils import vector_to_parameters

from fedss.errors import ConfigError, RunFolderError
from fedss.models import Embedder, load_embedder
from fedss.runs.about import read_run_config
from fedss.runs.checkpoint import load_backbone, newest_round
from fedss.runs.summaries import read_summaries

_LOG = logging.getLogger("fedss.inference")


def load(
    path: str | Path, backbone: nn.Module | str | None = None, trust_code: bool = False
) -> Embedder:
    """The trained model of a run folder (or of its ``model`` folder), or an exported one.

    Of a run that is not finished it is that of the last checkpoint; a warning is logged that says
    of which round.

    Args:
        path: a run folder, or the ``model.safetensors`` of ``fedss export`` or its folder.
        backbone: if the run was trained with a module of your own: one of the same structure, or
            the name of code that makes one, ``"package.module:function"``, which is imported.
        trust_code: import the code that the run names, if it is as it was when the run began.

    Raises:
        RunFolderError: there is no run with a model or a checkpoint.
        ConfigError: a file that is damaged or no model, or a backbone missing; code that is not
            trusted (it says what would be imported, and from where), not there, or another one.
    """
    path = Path(path)
    if path.is_file():
        return load_embedder(path, backbone, trust_code)
    for place in (path / "model", path):
        if (place / "model.safetensors").exists():
            return load_embedder(place, backbone, trust_code)
    runs = [s["folder"] for s in read_summaries(path) if s.get("folder", ".") != "."]
    if runs:
        raise RunFolderError(
            f"{path} holds a comparison of several models: name one of them, such as "
            f"{path / runs[0]}"
        )
    if not path.exists():
        raise RunFolderError(
            f"{path}: expected a finished run, got no such folder; give the --out of a fedss train "
            "command"
        )
    if not (path / "config.json").exists():
        below = sorted(place.parent.name for place in path.glob("*/config.json"))
        hint = f"; runs in it: {', '.join(below[:5])}" if below else ""
        raise RunFolderError(
            f"{path}: expected a finished run, found none: it has no config.json{hint}"
        )
    done = (path / "summary.json").exists()
    if not done and (path / "checkpoint" / "first" / "config.json").exists():
        return _so_far(path, backbone, trust_code)
    raise RunFolderError(
        f"{path}: expected a finished run with model/model.safetensors, found none; "
        + ("delete its summary.json and " if done else "")
        + "start its fedss train command again: it goes on from the last checkpoint"
    )


def _so_far(run: Path, backbone: nn.Module | str | None, trust_code: bool) -> Embedder:
    """The model of a run's last checkpoint."""
    place, rounds = run / "checkpoint", read_run_config(run)["config"]["rounds"]
    round = newest_round(place)
    if not round:
        raise RunFolderError(
            f"{run}: expected a finished run or a checkpoint, found a run that has neither yet; "
            "wait for its first checkpoint, or start its fedss train command again"
        )
    embedder = load_embedder(place / "first", backbone, trust_code)
    theta_P = load_backbone(place)
    trained = [p for p in embedder.parameters() if p.requires_grad]
    if sum(p.numel() for p in trained) != len(theta_P):
        raise ConfigError(
            f"{run}: its checkpoint does not fit the backbone: expected one with the same "
            "parameters frozen as in training"
        )
    vector_to_parameters(theta_P, trained)
    _LOG.warning("%s is not finished: this is its model of round %d of %d", run, round, rounds)
    return embedder
