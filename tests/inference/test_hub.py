"""Models on a hub: its client is the real one, without a network; uploads go into a folder."""

import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, constants

import fedss
from fedss.errors import ConfigError, RunFolderError
from fedss.models import fingerprint

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    config = fedss.Config(
        glyphs_classes=20,
        glyphs_clients=8,
        image_size=12,
        backbone="conv4-4",
        embedding_size=4,
        clients_per_round=2,
        rounds=1,
        workers=1,
    )
    return fedss.train(config, tmp_path_factory.mktemp("hub") / "run").folder


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository that is a folder here, and what the client was asked to do with it."""
    place, asked = tmp_path / "repository", []

    def create_repo(api, repo_id, **options):
        asked.append(("create", repo_id, options))
        place.mkdir(exist_ok=True)

    def upload_folder(api, *, repo_id, folder_path, **options):
        asked.append(("upload", repo_id, options))
        shutil.copytree(folder_path, place, dirs_exist_ok=True)
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/{COMMIT}")

    def file_exists(api, repo_id, filename, *, revision=None):
        return (place / filename).exists()

    for method in (create_repo, upload_folder, file_exists):
        monkeypatch.setattr(HfApi, method.__name__, method)
    return SimpleNamespace(place=place, asked=asked)


def cached(folder: Path, repository: Path) -> Path:
    """A cache of the client that holds a commit of the repository owner/name."""
    base = folder / "models--owner--name"
    shutil.copytree(repository, base / "snapshots" / COMMIT)
    (base / "refs").mkdir()
    (base / "refs" / "main").write_text(COMMIT)
    return folder


def test_a_model_goes_there_and_back(run, repository, tmp_path, offline):
    url = fedss.push_to_hub(run, "owner/name", private=True, revision="dev", message="first")
    assert url == f"https://hub/owner/name/commit/{COMMIT}"
    create, upload = repository.asked
    assert create == ("create", "owner/name", {"private": True, "exist_ok": True})
    assert upload == ("upload", "owner/name", {"revision": "dev", "commit_message": "first"})
    assert sorted(os.listdir(repository.place)) == ["README.md", "config.json", "model.safetensors"]
    mine = fedss.load(run)
    assert fingerprint(fedss.from_pretrained(repository.place)) == fingerprint(mine)
    cache = cached(tmp_path / "cache", repository.place)
    pixels = torch.randint(0, 256, (3, 1, 12, 12), dtype=torch.uint8)
    for revision in (None, "main", COMMIT):
        model = fedss.from_pretrained("owner/name", cache=cache, revision=revision)
        assert torch.equal(model(pixels), mine(pixels))
    with pytest.raises(ConfigError, match=r"^owner/name: expected a folder here, or a repository"):
        fedss.from_pretrained("owner/name", cache=cache, revision="other")


def test_what_a_repository_tells(run, repository):
    fedss.push_to_hub(run, "owner/name")
    card = ModelCard.load(repository.place / "README.md")
    assert card.data.library_name == "fedss"
    assert card.data.pipeline_tag == "image-feature-extraction"
    figures = json.loads((run / "summary.json").read_text())[0]
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found["map_at_10"] == figures["map_at_10"]
    assert 'model = fedss.from_pretrained("owner/name")' in card.content
    assert "fedss.load(" not in card.content
    config = json.loads((repository.place / "config.json").read_text())
    assert config["embedder"]["backbone"] == "conv4-4"
    assert config["preprocessing"]["input_size"] == [1, 12, 12]
    assert not (run / "export").exists()


def test_a_card_that_its_owner_filled_in_stays(run, repository):
    fedss.push_to_hub(run, "owner/name")
    readme = repository.place / "README.md"
    first = readme.read_text()
    readme.write_text("mine")
    fedss.push_to_hub(run, "owner/name")
    assert readme.read_text() == "mine"
    fedss.push_to_hub(run, "owner/name", replace_card=True)
    assert readme.read_text() == first


def test_what_goes_wrong_takes_one_line(run, tmp_path, monkeypatch, offline):
    calls = [
        (lambda: fedss.push_to_hub(run, "owner/name"), "the hub did not take the model: .*log"),
        (lambda: fedss.push_to_hub(run, "a/b/c"), "^a/b/c: the hub did not take"),
        (lambda: fedss.from_pretrained("owner/name", cache=tmp_path), "expected a folder here"),
        (lambda: fedss.from_pretrained("no such/folder/at all"), "expected a folder here"),
        (lambda: fedss.from_pretrained(run, revision="main"), "revision: .*run is a folder"),
    ]
    for call, said in calls:
        with pytest.raises(ConfigError, match=said) as caught:
            call()
        assert "\n" not in str(caught.value)
    with pytest.raises(RunFolderError, match="no such folder"):
        fedss.push_to_hub(tmp_path / "none", "owner/name")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match=r'pip install "fedss\[hub\]"'):
        fedss.from_pretrained("owner/name")
