"""A run's model on the Hugging Face Hub: tensors, settings and model card; and back again."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import safe_open
from torch import nn

from fedss.errors import ConfigError
from fedss.files import write_file
from fedss.inference.export import CARD, export
from fedss.inference.model import load
from fedss.models import Embedder
from fedss.optional import import_extra
from fedss.text import one_line

_WEIGHTS = "model.safetensors"
# The name under which a hub shows a repository's card.
_README = "README.md"


def push_to_hub(
    run: str | Path,
    repo_id: str,
    *,
    revision: str | None = None,
    private: bool | None = None,
    message: str = "Upload a model of fedss",
    replace_card: bool = False,
    token: str | None = None,
    backbone: nn.Module | str | None = None,
    trust_code: bool = False,
) -> str:
    """Upload a run's model to the Hugging Face Hub, for :func:`from_pretrained`.

    The repository, made if it is missing, gets ``model.safetensors`` as :func:`fedss.export` writes
    it, ``config.json`` with what the model is built from and what an image needs before, and the
    model card as ``README.md``. Nothing else of the run leaves this machine.

    Needs ``fedss[hub]``, and a login: ``hf auth login``, the variable ``HF_TOKEN`` or ``token``.

    Args:
        run: a run folder, or ``best`` in it.
        repo_id: ``owner/name``.
        revision: the branch to write to, which is there already; None: the main one.
        private: whether a new repository is private; None: as its owner has it by default.
        message: that of the commit.
        replace_card: write the card anew where there is one, which its owner may have filled in.
        token: of the hub.
        backbone: as for :func:`fedss.export`.
        trust_code: as for :func:`fedss.export`.

    Returns:
        The address of the commit.

    Raises:
        ConfigError: a package missing, or the hub refused; or as :func:`fedss.export`.
        RunFolderError: no finished run.
    """
    hub = import_extra("huggingface_hub", "hub")
    with TemporaryDirectory() as folder:
        place = Path(folder)
        _write_files(place, run, repo_id, backbone, trust_code)
        try:
            api = hub.HfApi(token=token, library_name="fedss")
            api.create_repo(repo_id, private=private, exist_ok=True)
            if not replace_card and api.file_exists(repo_id, _README, revision=revision):
                (place / _README).unlink()
            done = api.upload_folder(
                repo_id=repo_id, folder_path=place, revision=revision, commit_message=message
            )
        except _errors() as error:
            raise ConfigError(
                f"{repo_id}: the hub did not take the model: {one_line(error)}; check the name, "
                "the branch, and that you are logged in with the right to write (hf auth login)"
            ) from error
    return str(done.commit_url)


def _write_files(
    place: Path, run: str | Path, repo_id: str, backbone: nn.Module | str | None, trust_code: bool
) -> None:
    """What a repository holds."""
    file = export(run, "safetensors", place, backbone=backbone, trust_code=trust_code)
    with safe_open(file, framework="pt") as content:
        about = content.metadata()
    described = {**json.loads(about["fedss"]), "preprocessing": json.loads(about["preprocessing"])}
    write_file(place / "config.json", (json.dumps(described, indent=2) + "\n").encode())
    card = (place / CARD).read_text(encoding="utf-8")
    here, there = f'fedss.load("{_WEIGHTS}"', f'fedss.from_pretrained("{repo_id}"'
    write_file(place / _README, card.replace(here, there).encode())
    (place / CARD).unlink()


def from_pretrained(
    repo_or_folder: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache: str | Path | None = None,
    backbone: nn.Module | str | None = None,
    trust_code: bool = False,
) -> Embedder:
    """A model that :func:`push_to_hub` uploaded, or of a folder, as :func:`fedss.load` reads it.

    Only tensors and their description are fetched and read; no code of the repository runs.

    Args:
        repo_or_folder: a folder or file that is there; else ``owner/name`` on the hub (needs
            ``fedss[hub]``). What was fetched once is there without a network, too.
        revision: a branch, a tag or, for the same model ever after, a commit; None: main.
        token: of the hub, for a private repository.
        cache: the folder to fetch into; None: that of Hugging Face.
        backbone: as for :func:`fedss.load`.
        trust_code: as for :func:`fedss.load`.

    Raises:
        ConfigError: no such repository, revision or file; or as :func:`fedss.load`.
        RunFolderError: as :func:`fedss.load`.
    """
    if Path(repo_or_folder).exists():
        if revision is not None:
            raise ConfigError(
                f"revision: {repo_or_folder} is a folder or file here, which has none; leave it out"
            )
        return load(repo_or_folder, backbone, trust_code)
    hub = import_extra("huggingface_hub", "hub")
    try:
        file = hub.hf_hub_download(
            str(repo_or_folder),
            _WEIGHTS,
            revision=revision,
            token=token,
            cache_dir=cache,
            library_name="fedss",
        )
    except _errors() as error:
        raise ConfigError(
            f"{repo_or_folder}: expected a folder here, or a repository on the hub with a "
            f"{_WEIGHTS}: {one_line(error)}"
        ) from error
    return load(file, backbone, trust_code)


def _errors() -> tuple[Any, ...]:
    """What the hub's client raises: for the network, the repository, the name, the login."""
    errors = import_extra("huggingface_hub.errors", "hub")
    # HTTPError is that of the HTTP library, which is another one in each major version.
    return OSError, errors.HTTPError, errors.HFValidationError
