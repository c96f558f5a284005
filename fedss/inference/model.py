"""A trained model, from the folder that it was left in."""

from pathlib import Path

from torch import nn

from fedss.errors import RunFolderError
from fedss.models import Embedder, load_embedder
from fedss.runs.summaries import read_summaries


def load(path: str | Path, backbone: nn.Module | None = None) -> Embedder:
    """The trained model of a run folder (or of its ``model`` folder), or an exported one.

    Args:
        path: a run folder, or the ``model.safetensors`` of ``fedss export`` or its folder.
        backbone: if the run was trained with a module of your own: one of the same structure.

    Raises:
        RunFolderError: there is no finished run.
        ConfigError: a file that is damaged or no model, or a backbone missing.
    """
    path = Path(path)
    if path.is_file():
        return load_embedder(path, backbone)
    for place in (path / "model", path):
        if (place / "model.safetensors").exists():
            return load_embedder(place, backbone)
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
    raise RunFolderError(
        f"{path}: expected a finished run with model/model.safetensors, found none; "
        + ("delete its summary.json and " if done else "")
        + "start its fedss train command again: it goes on from the last checkpoint"
    )
