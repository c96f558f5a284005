"""What the report says of files that are damaged or do not fit together."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedss.errors import RunFolderError
from fedss.report import write_report
from tests.report.made import fake_comparison, fake_run, fake_variants, groups_of, rewrite, single

AGAIN = "; restore it from a copy, or run again in another folder"
ANEW = "; delete it and start this folder's fedss command again, which writes it anew"
NO_IMAGES = "; delete it: the report is then written without images"


@pytest.mark.parametrize(
    ("name", "text", "message", "advice"),
    [
        ("records.jsonl", None, "records.jsonl: cannot be read", AGAIN),
        ("records.jsonl", '{"round": 1, \n', "records.jsonl, line 1: damaged JSON", AGAIN),
        ("records.jsonl", '{"round": 2}', "records.jsonl, line 1: 'loss' is missing", AGAIN),
        ("records.jsonl", "[]\n", "records.jsonl, line 1: expected an object, got []", AGAIN),
        ("records.jsonl", "5\n", "records.jsonl, line 1: expected an object, got 5", AGAIN),
        ("config.json", None, "config.json: cannot be read", AGAIN),
        ("config.json", "{", "config.json: damaged JSON", AGAIN),
        ("config.json", "{}", "config.json: 'config' is missing", AGAIN),
        ("config.json", "[]", "config.json: expected an object, got []", AGAIN),
        ("config.json", '{"config": []}', "config.json: expected an object, got []", AGAIN),
        ("summary.json", "[", "summary.json: damaged JSON", ANEW),
        ("summary.json", "{}", "summary.json: expected a list", ANEW),
        ("summary.json", "[]", "summary.json: expected a list with one object per run", ANEW),
        ("summary.json", "[{}]", "summary.json: 'folder' is missing", ANEW),
        ("summary.json", '[{"folder": "."}]', "'method' is missing", ANEW),
        ("retrieval.npz", "no archive", "retrieval.npz: cannot be read", NO_IMAGES),
        ("retrieval.npz", "", "retrieval.npz: cannot be read", NO_IMAGES),
    ],
)
def test_damaged_records(
    tmp_path: Path, name: str, text: str | None, message: str, advice: str
) -> None:
    single(tmp_path, rounds=5)
    if text is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(text)
    with pytest.raises(RunFolderError, match=re.escape(message) + ".*" + re.escape(advice)):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train_images", "many"),
        ("own_classes", 3),
        ("own_classes", [1, 2.5]),
        ("image_shape", ["a", 1, 2]),
        ("image_shape", []),
    ],
)
def test_damaged_facts(tmp_path: Path, key: str, value: object) -> None:
    single(tmp_path, rounds=5)
    config = json.loads((tmp_path / "config.json").read_text())
    config["data"][key] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunFolderError, match=rf"config\.json: '{key}': expected "):
        write_report(tmp_path)


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"no summary\.json and no config\.json and no"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("scores", lambda a: a[:, :4], "scores: expected those of all neighbours, .*got 4"),
        ("scores", lambda a: a[:, :0], "scores: expected those of all neighbours, .*got 0"),
        ("scores", lambda a: a.astype(str), "scores: unexpected type"),
        ("query_index", lambda a: a[0], r"query_index: expected \[Q\], got \[\]"),
        ("pixels", lambda a: a.astype(float), "pixels: unexpected type float64"),
        ("pixels", lambda a: a[..., 0], "pixels: expected"),
    ],
)
def test_damaged_neighbours(
    tmp_path: Path, name: str, change: Callable[[np.ndarray], np.ndarray], message: str
) -> None:
    single(tmp_path, rounds=5)
    with np.load(tmp_path / "retrieval.npz") as file:
        arrays = dict(file)
    np.savez(tmp_path / "retrieval.npz", **(arrays | {name: change(arrays[name])}))
    with pytest.raises(RunFolderError, match=rf"retrieval\.npz: {message}.*{NO_IMAGES}"):
        write_report(tmp_path)


def test_two_runs_of_one_method_and_seed(tmp_path: Path) -> None:
    summary = fake_comparison(tmp_path, ["fedss"], rounds=5)
    again = fake_run(tmp_path / "again", rounds=5) | {"folder": "again"}
    (tmp_path / "summary.json").write_text(json.dumps([*summary, again]))
    with pytest.raises(RunFolderError, match="two runs of fedss with seed 0"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("summary.json", "[{}]"),
        ("summary.json", "5"),
        ("config.json", "[]"),
        ("records.jsonl", "5\n"),
        ("records.jsonl", '{"round": 2}\n'),
    ],
)
def test_damage_is_named_and_no_traceback(tmp_path: Path, file: str, content: str) -> None:
    folder = tmp_path / "bad"
    fake_comparison(folder, ["full", "fedss"])
    place = folder if file == "summary.json" else next(iter(sorted(folder.glob("fedss*"))))
    (place / file).write_text(content)
    with pytest.raises(RunFolderError, match=file.replace(".", r"\.")):
        write_report(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"failures": {}}, "'failures': expected a list, got {}"),
        ({"failures": ["shop"]}, "expected an object, got 'shop'"),
        ({"failures": [{"client": "shop"}]}, "'reason' is missing"),
        ({"failures": [{"client": 3, "reason": "ids"}]}, "'client': expected a string, got 3"),
        ({"attempts": "many"}, "'attempts': expected an integer, got 'many'"),
        ({"seconds": {"train": None}}, "'train': expected a number, got None"),
        ({"seconds": 3}, "expected an object, got 3"),
    ],
)
def test_damaged_federation_records(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    single(tmp_path, rounds=5)
    rewrite(tmp_path, lambda line: line | change)
    with pytest.raises(RunFolderError, match=rf"records\.jsonl, line 1: {re.escape(message)}"):
        write_report(tmp_path)


def test_label_must_be_text(tmp_path: Path) -> None:
    entry = single(tmp_path, rounds=5)
    (tmp_path / "summary.json").write_text(json.dumps([entry | {"label": 3}]))
    with pytest.raises(RunFolderError, match=r"summary\.json: 'label': expected a string, got 3"):
        write_report(tmp_path)
    (tmp_path / "summary.json").write_text(json.dumps([entry | {"label": None}]))
    assert [group.label for group in groups_of(tmp_path)] == ["fedss"]


def test_two_runs_of_one_label_and_seed(tmp_path: Path) -> None:
    summary = fake_variants(tmp_path, ["full", "fedss deck", "fedss uniform"], seeds=1)
    summary[2]["label"] = "fedss deck"
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(RunFolderError, match="two runs of fedss deck with seed 0; "):
        write_report(tmp_path)
