"""Files of a run with sound JSON and odd values: an error that names them, or they are used."""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

import fedss
from fedss.config import OPTIONS, Config, config_from_dict
from fedss.errors import ConfigError, FedssError, RunFolderError
from fedss.models import EmbedderSpec
from fedss.runs.reading import read_runs
from fedss.runs.records import read_records
from fedss.runs.summaries import read_summaries, summarize
from fedss.search import build_collection, open_collection
from tests import reference

ODD: dict[str, Any] = {
    "null": None,
    "true": True,
    "zero": 0,
    "negative": -1,
    "one": 1,
    "fraction": 8.5,
    "whole fraction": 8.0,
    "nan": math.nan,
    "infinite": math.inf,
    "huge": 10**400,
    "large": 2**63,
    "large for a table": 99_999,
    "empty": "",
    "number as text": "8",
    "nul": "conv4-4\0",
    "wide": "conv4-99999",
    "surrogate": "\ud800",
    "other digits": "conv4-\u0664",
    "list": [8],
    "nested": {"a": [{"b": []}]},
    "deep": json.loads("[" * 200 + "]" * 200),
}
CONFIG = replace(reference.TINY, eval_every=1, checkpoint_every=1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fedss.train(CONFIG, tmp_path_factory.mktemp("odd") / "run", on_round=print).folder


@pytest.fixture(scope="module")
def data() -> fedss.Dataset:
    return fedss.load_data(CONFIG)


def replaced(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Copies of an object with one value that is odd, missing, or under a flipped key."""
    for name, odd in ODD.items():
        yield name, {**value, key: odd}
    rest = {k: v for k, v in value.items() if k != key}
    yield "missing", rest
    yield "flipped", {**rest, key[:-1] + chr(ord(key[-1]) ^ 1): value.get(key)}


def refused_or_used(use: Callable[[], object], *kinds: type[Exception]) -> bool:
    """Whether it is refused; any other exception is a failure, and so is a novel."""
    message = ""
    try:
        use()
    except kinds as error:
        message = str(error)
    assert len(message) < 1200, message
    return bool(message)


@pytest.mark.parametrize("field", [f.name for f in fields(EmbedderSpec)])
def test_a_model_description_of_odd_values_is_refused_or_means_the_same(run, field, tmp_path):
    shutil.copytree(run / "model", tmp_path / "model")
    exported = tmp_path / "exported.safetensors"
    tensors = load_file(run / "model" / "model.safetensors")
    path = tmp_path / "model" / "config.json"
    description = json.loads(path.read_text())
    for name, spec in replaced(description["embedder"], field):
        odd = {**description, "embedder": spec}
        path.write_text(json.dumps(odd))
        save_file(tensors, exported, {"fedss": json.dumps(odd)})
        for place in (tmp_path, exported):
            refused = refused_or_used(lambda p=place: fedss.load(p), ConfigError)
            decides = field in ("channels", "image_size", "embedding_size", "backbone")
            same = spec.get(field) == description["embedder"].get(field)
            assert refused or same or not decides, (field, name)
    for odd in [*ODD.values(), {**description, "format": ["fedss-embedder-1"]}]:
        path.write_text(json.dumps(odd))
        assert refused_or_used(lambda: fedss.load(tmp_path), ConfigError)
        path.write_text(json.dumps({**description, "embedder": odd}))
        assert refused_or_used(lambda: fedss.load(tmp_path), ConfigError)


def test_sizes_are_compared_before_there_is_a_network(run, tmp_path, monkeypatch):
    """conv4-99999 would take 360 GB, and 4,096 pixels a side make a projection of gigabytes."""
    monkeypatch.setattr("fedss.models.saving.assemble", None)
    path = tmp_path / "model" / "config.json"
    shutil.copytree(run / "model", tmp_path / "model")
    description = json.loads(path.read_text())
    for change in (
        {"backbone": "conv4-99999"},
        {"embedding_size": 2**20},
        {"image_size": 4096},
        {"channels": 1024},
    ):
        path.write_text(json.dumps({**description, "embedder": description["embedder"] | change}))
        with pytest.raises(ConfigError, match="does not fit its description"):
            fedss.load(tmp_path)


def test_a_configuration_of_odd_values_is_refused_or_keeps_them():
    defaults = {option.name: option.default for option in OPTIONS}
    for option in OPTIONS:
        for _, values in replaced(defaults, option.name):
            refused_or_used(lambda v=values: config_from_dict(v), ConfigError)
        for odd in (10**400, math.nan, "a\0b", {"a": 1}):
            with pytest.raises(ConfigError, match=option.name):
                config_from_dict({**defaults, option.name: odd})


def test_a_scale_beyond_float32_is_told_as_such():
    with pytest.raises(ConfigError, match="scale: expected a number above 0 and at most 1e6"):
        Config(scale=1e30)


def keys(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield (*path, key)
            yield from keys(inner, (*path, key))


def changed(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[str, Any]]:
    """``replaced``, at a place deeper down."""
    if len(path) == 1:
        yield from replaced(value, path[0])
        return
    for name, inner in changed(value[path[0]], path[1:]):
        yield name, {**value, path[0]: inner}


def test_a_record_of_odd_values_is_refused_or_used_by_all_who_read_it(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "records.jsonl"
    first, second = map(json.loads, path.read_text().splitlines())
    for place in keys(second):
        for name, odd in changed(second, place):
            path.write_text(json.dumps(first) + "\n" + json.dumps(odd) + "\n")
            refused_or_used(lambda: summarize({}, read_records(path, 2)), RunFolderError)
            refused_or_used(lambda: read_runs(tmp_path / "run"), RunFolderError)
            if name in ("missing", "flipped") and len(place) == 1:
                with pytest.raises(RunFolderError, match="line 2"):
                    read_records(path, 2)


def test_a_run_whose_record_was_damaged_is_refused_by_train_in_one_line(run, data, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    for name in ("summary.json", "report.html"):
        (tmp_path / "run" / name).unlink()
    path = tmp_path / "run" / "records.jsonl"
    text = path.read_text()
    for key in ("loss", "seconds", "metrics", "backbone_bytes_up", "client_lr"):
        path.write_text(text.replace(f'"{key}"', f'"{key[:-1]}~"'))
        with pytest.raises(RunFolderError, match=f"line 1: '{key}' is missing"):
            fedss.train(CONFIG, tmp_path / "run", data=data)
    path.write_text(text)
    assert not fedss.train(CONFIG, tmp_path / "run", data=data, on_round=print).already_done


def test_a_summary_of_odd_values_is_refused_or_used(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "summary.json"
    (summary,) = json.loads(path.read_text())
    for place in keys(summary):
        for _, odd in changed(summary, place):
            path.write_text(json.dumps([odd]))
            refused_or_used(lambda: read_summaries(tmp_path / "run"), RunFolderError)
            refused_or_used(lambda: read_runs(tmp_path / "run"), RunFolderError)


def test_a_run_configuration_of_odd_values_is_refused_or_used(run, data, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    whole = json.loads(path.read_text())
    for place in (("config",), ("data",), ("model",), ("config", "rounds"), ("config", "method")):
        for _, odd in changed(whole, place):
            path.write_text(json.dumps(odd))
            refused_or_used(lambda: read_runs(tmp_path / "run"), RunFolderError)
            refused_or_used(lambda: fedss.train(CONFIG, tmp_path / "run", data=data), FedssError)


def test_the_working_directory_may_change_while_a_run_is_under_way(tmp_path, monkeypatch):
    rows = ["image,label,client"]
    rng = np.random.default_rng(0)
    for number in range(24):
        Image.fromarray(rng.integers(0, 256, (12, 12), np.uint8)).save(tmp_path / f"{number}.png")
        rows.append(f"{number}.png,class {number % 8},site {number % 3}")
    (tmp_path / "m.csv").write_text("\n".join(rows) + "\n")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(tmp_path)
    values = {"data": "csv", "data_path": "m.csv", "sample_size": 3, "test_classes": 0.4}
    config = config_from_dict({**{o.name: getattr(CONFIG, o.name) for o in OPTIONS}, **values})

    def leave(record: Any) -> None:
        monkeypatch.chdir(elsewhere)

    fedss.compare(config, ["full", "fedss"], [0], "runs", on_round=leave)
    assert list(elsewhere.iterdir()) == []
    for name in ("full-seed0", "fedss-seed0"):
        stored = json.loads((tmp_path / "runs" / name / "config.json").read_text())["config"]
        assert stored["data_path"] == str(tmp_path / "m.csv")
    assert (tmp_path / "runs" / "report.html").exists()
    monkeypatch.chdir(tmp_path)
    build_collection("runs/full-seed0", "m.csv")
    collection = open_collection("runs/full-seed0/index", "runs/full-seed0")
    monkeypatch.chdir(elsewhere)
    assert collection.thumbnail(0)
    assert collection.path(0).exists()
