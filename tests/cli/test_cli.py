import csv
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fedss
from fedss.cli import main
from fedss.config import OPTIONS
from fedss.flower.settings import Deployment
from tests.test_config import PINNED

TINY = """
    --image-size 12 --backbone conv4-4 --embedding-size 8 --rounds 2 --clients-per-round 2
    --workers 1
""".split()  # noqa: SIM905
GLYPHS = [
    *TINY,
    *["--data", "glyphs", "--glyphs-classes", "40", "--glyphs-clients", "8", "--sample-size", "8"],
]

COMMANDS = {"app", "train", "compare", "evaluate", "embed", "export", "report", "info"} | {
    "index",
    "search",
    "enrol",
    "identify",
    "serve",
    "secret",
    "audit",
}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """12 classes of 4 images at 3 clients, colour and mixed sizes and kinds, with a manifest."""
    rng = np.random.default_rng(0)
    rows = []
    for label in range(12):
        colour = rng.integers(0, 256, 3)
        for copy in range(4):
            name = f"{label}-{copy}.{['png', 'jpg', 'webp'][copy % 3]}"
            size = tuple(rng.integers(14, 40, 2)[::-1])
            noise = rng.normal(0, 12, (*size, 3))
            image = np.clip(colour + noise, 0, 255).astype(np.uint8)
            Image.fromarray(image).save(tmp_path / name)
            rows.append((name, f"class {label}", f"site {(label + copy) % 3}"))
    with (tmp_path / "photos.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "label", "client"), *rows])
    return tmp_path


def options_of(command: str, capsys: pytest.CaptureFixture[str]) -> tuple[set[str], str]:
    """All options of a command, as its help has them; and that help."""
    text = help_of(command, "--help", capsys)
    if "--help-all" in text:
        text = help_of(command, "--help-all", capsys)
        assert not re.search(r"\d+ more options", text)
    return set(re.findall(r"--[a-z][a-z-]*", text)) - {"--help-all"}, text


def help_of(command: str, flag: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit, match="0"):
        main([command, flag])
    return capsys.readouterr().out


def flags(names: list[str]) -> set[str]:
    return {"--" + name.replace("_", "-") for name in names}


@pytest.mark.parametrize(
    "said",
    [{"WORLD_SIZE": "abc"}, {"WORLD_SIZE": "2", "RANK": "7"}, {"WORLD_SIZE": "2", "RANK": "-1"}],
)
def test_an_environment_that_torchrun_never_sets_is_one_line(said, capsys, monkeypatch):
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    assert main(["info", *GLYPHS]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fedss: expected RANK below WORLD_SIZE")
    assert all(value in line for value in said.values())


def test_a_rank_that_never_met_the_others_speaks_for_itself(capfd, monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(sys, "__stderr__", sys.stderr)
    assert main(["info", *GLYPHS]) == 2
    assert "these ranks do not meet" in capfd.readouterr().err


def test_a_missing_device_is_told_before_images_are_looked_for(tmp_path, capsys):
    words = ["--data", "csv", "--data-path", str(tmp_path / "none.csv"), "--device", "cuda:99"]
    assert main(["train", *words, "--out", str(tmp_path / "run")]) == 2
    assert "device: cuda:99" in capsys.readouterr().err


def test_a_device_that_is_not_there_is_one_line(tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", *GLYPHS, "--device", "cuda:99", "--out", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fedss train: device: cuda:99 means GPU 99 of this machine, where torch")
    assert not out.exists()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        MemoryError("Unable to allocate 3.64 TiB for an array"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore"),
        RuntimeError("[enforce fail at x] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_too_little_memory_is_one_line(error, capsys, monkeypatch):
    def fail(config):
        raise error

    monkeypatch.setattr("fedss.training.build.load_data", fail)
    assert main(["info", *GLYPHS]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fedss info: not enough memory (")
    assert "--image-size" in line
    error = RuntimeError("a fault of ours")
    with pytest.raises(RuntimeError, match="a fault of ours"):
        main(["info", *GLYPHS])


def test_sizes_beyond_all_use_are_one_line(capsys):
    for words in (["--image-size", "1000000"], ["--backbone", "conv4-99999"]):
        assert main(["info", *GLYPHS, *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("fedss info: ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], "did you mean train?"),
        (["train", "--out", "x", "--roundz", "3"], "did you mean --rounds?"),
        (["search", "x", "y", "--inde", "a", "--tops", "1"], "arguments: --tops 1"),
        (["train"], "required: --out (usage: fedss train [OPTIONS] --out DIR; see fedss train --h"),
        (["compare", "--out", "x", "--seeds", "a\nb"], "invalid int value"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(words, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(words)
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == ""
    assert line.startswith("fedss")
    assert said in line


def test_commands_and_options_are_pinned(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert set(re.findall(r"^    ([a-z]+) ", text, re.M)) == COMMANDS
    own, code = {"--help", "--config", "--trust-code", "--out"}, {"--trust-code", "--backbone"}
    booleans = flags([f"no-{o.name}" for o in OPTIONS if o.type is bool])
    config = flags(PINNED) | booleans
    data = flags([o.name for o in OPTIONS if o.group == "data"])
    assert options_of("train", capsys)[0] == config | own | {"--from"}
    assert options_of("info", capsys)[0] == (config | own | {"--plot"}) - {"--out"}
    assert options_of("compare", capsys)[0] == (
        (config | own | {"--from", "--methods", "--seeds"}) - {"--method", "--seed"}
    )
    assert options_of("evaluate", capsys)[0] == data | code | {
        "--help",
        "--no-skip-broken",
        "--no-rotations",
        "--far",
        "--json",
    }
    assert options_of("embed", capsys)[0] == code | {"--help", "--out", "--skip-broken"}
    assert options_of("export", capsys)[0] == code | {"--help", "--format", "--out"}
    assert options_of("report", capsys)[0] == {"--help", "--watch"}
    assert options_of("serve", capsys)[0] == code | {
        "--help",
        "--host",
        "--index",
        "--max-upload-mb",
        "--max-upload-megapixels",
        "--open",
        "--port",
        "--threshold",
    }
    index = {"--help", "--index", "--skip-broken", "--replace"}
    assert options_of("index", capsys)[0] == code | index
    assert options_of("search", capsys)[0] == code | {
        "--help",
        "--index",
        "--count",
        "--expand",
        "--json",
        "--show",
    }
    assert options_of("enrol", capsys)[0] == code | {"--help", "--index", "--remove"}
    assert options_of("identify", capsys)[0] == code | {
        "--help",
        "--index",
        "--threshold",
        "--json",
    }
    assert options_of("secret", capsys)[0] == {"--help"}
    audit = {"--help", "--json", "--seconds", "--secret-file", "--device", "--trust-code"}
    assert options_of("audit", capsys)[0] == audit | data | {"--no-skip-broken", "--no-rotations"}
    deployment = flags([item.name for item in dataclasses.fields(Deployment)])
    assert options_of("app", capsys)[0] == config | own | deployment


BASIC = [
    *["data", "data_path", "columns", "image_size", "test_classes", "skip_broken", "data_seed"],
    *["partition", "method", "backbone", "pretrained", "weights", "trainable", "rounds", "augment"],
    *["seed", "device"],
]


def test_basic_options_are_pinned_and_help_all_has_the_others(capsys):
    shown = {}
    for command in sorted(COMMANDS):
        text = help_of(command, "--help", capsys)
        assert max(map(len, text.splitlines())) <= 80
        names = re.findall(r"--[a-z][a-z-]*", text)
        shown[command] = {name.removeprefix("--").replace("-", "_") for name in names}
    config = {option.name for option in OPTIONS}
    for command in ("train", "info", "app"):
        assert shown[command] & config == {*BASIC}
    assert shown["compare"] & config == {*BASIC} - {"method", "seed"}
    assert shown["evaluate"] & config == {*BASIC[:8], "backbone"}
    deployment = {item.name for item in dataclasses.fields(Deployment)}
    assert shown["app"] & deployment == {"out", "sites"}
    assert {command for command in COMMANDS if "help_all" in shown[command]} == {
        *["train", "compare", "info", "app", "evaluate", "audit"]
    }
    more = len(PINNED) - len(BASIC)
    assert f"\n{more} more options: fedss train --help-all\n" in help_of("train", "--help", capsys)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_fits_a_terminal(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = options_of(command, capsys)[1].splitlines()
    assert max(map(len, lines)) <= 80


def test_help_gives_each_default(capsys):
    text = " ".join(options_of("train", capsys)[1].split())
    for option in OPTIONS:
        if option.default is not None and option.type is not bool:
            assert f"(default: {option.default})" in text, option.name


def test_train_then_everything_else(tmp_path, capsys):
    out = tmp_path / "run"
    words = [*GLYPHS, "--method", "fedss", "--seed", "1", "--data-seed", "3", "--out", str(out)]
    assert main(["train", *words]) == 0
    assert list((out / "model").glob("*.safetensors"))
    assert "MAP@10" in capsys.readouterr().out
    assert main(["train", "--config", str(out / "config.json"), "--out", str(out)]) == 0
    assert "is done: 2 rounds" in capsys.readouterr().out
    assert main(["evaluate", str(out), "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)
    (summary,) = json.loads((out / "summary.json").read_text())
    assert metrics["map_at_10"] == pytest.approx(summary["map_at_10"], abs=1e-6)
    at_the_end = json.loads((out / "verification.json").read_text())
    (out / "verification.json").unlink()
    for options in (["--far", "0.5"], ["--data-seed", "0"], ["--json"]):
        assert not (out / "verification.json").exists()
        assert main(["evaluate", str(out), *options]) == 0
    capsys.readouterr()
    assert json.loads((out / "verification.json").read_text()) == metrics["verification"]
    # A damaged one is named where it stays, and written anew where it can be.
    (out / "verification.json").write_text('{"eer": ')
    assert main(["evaluate", str(out), "--far", "0.5"]) == 0
    assert "verification.json: damaged JSON" in capsys.readouterr().err
    assert (out / "verification.json").read_text() == '{"eer": '
    assert main(["evaluate", str(out)]) == 0
    assert capsys.readouterr().err == ""
    assert json.loads((out / "verification.json").read_text()) == metrics["verification"]
    assert metrics["verification"]["impostor"] == at_the_end["impostor"]
    assert metrics["verification"]["eer"] == pytest.approx(at_the_end["eer"], abs=1e-6)
    known = metrics["verification"]["identification"]
    assert known == pytest.approx(at_the_end["identification"], abs=1e-4)
    assert main(["evaluate", str(out), "--far", "0.5", "0.0000001"]) == 0
    printed = capsys.readouterr().out
    assert f"equal error rate  {at_the_end['eer']:.4f}" in printed
    assert (
        f"{at_the_end['genuine']:,} pairs of one class, {at_the_end['impostor']:,} of two"
        in printed
    )
    assert re.search(r"^ +0\.5 +0\.\d{3} +-?0\.\d{4}", printed, re.M)
    assert re.search(r"^ +1e-07\* ", printed, re.M)
    assert "too few impostor pairs for a FAR below" in printed
    known = at_the_end["identification"]
    assert f"{known['enrolled']} classes enrolled in each of 10 draws" in printed
    (out / "report.html").unlink()
    assert main(["report", str(out)]) == 0
    assert (out / "report.html").exists()
    again = tmp_path / "again"
    stored = ["--config", str(out / "config.json"), "--rounds", "1", "--out", str(again)]
    assert main(["train", *stored]) == 0
    found = json.loads((again / "config.json").read_text())["config"]
    before = json.loads((out / "config.json").read_text())["config"]
    assert found == {**before, "rounds": 1}


def test_compare_on_a_csv_of_images(photos, tmp_path, capsys):
    out = tmp_path / "out"
    data = ["--data", "csv", "--data-path", str(photos / "photos.csv"), "--sample-size", "6"]
    words = ["compare", *TINY, *data, "--methods", "full", "fedss", "--seeds", "0", "1"]
    assert main([*words, "--out", str(out)]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert [(s["method"], s["seed"]) for s in summary] == [
        ("full", 0),
        ("full", 1),
        ("fedss", 0),
        ("fedss", 1),
    ]
    assert {s["sample_size"] for s in summary} == {6}
    printed = capsys.readouterr().out
    assert "full" in printed
    assert str(out / "report.html") in printed


def with_splits(photos: Path, name: str, split: dict[str, str], usual: str = "train") -> list[str]:
    """Options for the photos with a column split, by class; without one it is the usual one."""
    rows = list(csv.reader((photos / "photos.csv").read_text().splitlines()))
    with (photos / name).open("w", newline="") as file:
        csv.writer(file).writerows(
            [*row, "split" if not i else split.get(row[1], usual)] for i, row in enumerate(rows)
        )
    return ["--data", "csv", "--data-path", str(photos / name)]


def test_a_run_begins_with_what_it_found(photos, tmp_path, capsys):
    data = with_splits(photos, "some.csv", {f"class {i}": "test" for i in range(3)})
    words = ["train", *TINY, *data, "--out", str(tmp_path / "run")]
    assert main([*words, "--sample-size", "6"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "data     csv: 36 images of 9 classes, 12 x 12 x 3",
        "clients  3; own classes of a client: 9",
        "test     12 queries of 3 classes, all held out; each among the others",
    ]
    assert lines[3].startswith("note     a test of 3 classes tells nothing for sure")
    assert lines[4] == "note     own classes fill more than half of |S| = 6 at 3 of 3 clients"
    assert max(map(len, lines[:5])) <= 80
    whole = ["compare", *words[1:-1], str(tmp_path / "both"), "--methods", "full", "fedss"]
    assert main(whole) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[4] == "note     |S| = 9 is all of the 9 classes: this is the full softmax"
    assert main([*whole[:-1], "pos-only"]) == 0
    assert "full softmax" not in capsys.readouterr().out.split("unseen classes")[0]


def test_without_a_test_all_classes_are_trained_on(photos, tmp_path, capsys):
    data = ["--data", "csv", "--data-path", str(photos / "photos.csv"), "--sample-size", "6"]
    out = tmp_path / "final"
    words = ["train", *TINY, *data, "--test-classes", "0", "--out", str(out)]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "csv: 48 images of 12 classes" in printed
    assert "test     none: no class is held out (test_classes 0)" in printed
    assert "was trained for 2 rounds and not evaluated" in " ".join(printed.split())
    assert max(len(line) for line in printed.splitlines()[:3]) <= 80
    about = json.loads((out / "config.json").read_text())["data"]
    assert (about["train_classes"], about["test_queries"]) == (12, 0)
    records = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    assert [record["metrics"] for record in records] == [None, None]
    (summary,) = json.loads((out / "summary.json").read_text())
    assert (summary["map_at_10"], summary["floors"]) == (None, {})
    assert "No round has been evaluated" in (out / "report.html").read_text()
    assert main(words) == 0
    assert "is done: 2 rounds" in capsys.readouterr().out
    assert main([*words, "--rounds", "3"]) == 0
    # It is there to be used; to be judged it needs other images.
    assert main(["index", str(out), str(photos)]) == 0
    assert main(["export", str(out), "--format", "safetensors"]) == 0
    assert "nobody could evaluate" in (out / "export" / "MODEL_CARD.md").read_text()
    capsys.readouterr()
    assert "nothing to evaluate" in refused(["evaluate", str(out)], capsys)
    other = with_splits(photos, "tested.csv", {f"class {i}": "test" for i in range(12)})
    assert main(["evaluate", str(out), *other[2:], "--json"]) == 0
    assert 0 <= json.loads(capsys.readouterr().out)["map_at_10"] <= 1
    both = [*words[1:-1], str(tmp_path / "both"), "--methods", "full", "fedss"]
    assert main(["compare", *both]) == 0
    assert "unseen" not in capsys.readouterr().out
    # It is a choice: who has no test by mistake is told.
    config = fedss.Config(rounds=1, backbone="conv4-4", sample_size=6)
    images = fedss.load_dataset("csv", photos / "photos.csv", image_size=12, test_classes=0)
    with pytest.raises(fedss.DataError, match="To train on all classes without a test: 0"):
        fedss.train(config, tmp_path / "run", data=images)


def test_figures_stand_beside_floors_and_interval(tmp_path, capsys):
    run = str(tmp_path / "run")
    assert main(["train", *GLYPHS, "--out", run]) == 0
    printed = capsys.readouterr().out
    (summary,) = json.loads((tmp_path / "run" / "summary.json").read_text())
    low, high = summary["map_at_10_interval"]
    assert low < summary["map_at_10"] < high
    assert f"{low:.3f}–{high:.3f}" in printed
    for name, told in (("chance", "chance"), ("pixels", "raw pixels"), ("untrained", "untrained")):
        assert re.search(rf"^ *{told}.* {summary['floors'][name]:.3f} *$", printed, re.M)
    assert main(["evaluate", run]) == 0
    printed = capsys.readouterr().out
    assert f"{low:.3f}–{high:.3f}" in printed
    assert re.search(rf"^ *raw pixels +{summary['floors']['pixels']:.3f} *$", printed, re.M)
    assert main(["evaluate", run, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["floors"] == summary["floors"]
    assert found["map_at_10_interval"] == pytest.approx([low, high], abs=1e-6)
    assert found["map_at_10_by_class"] == pytest.approx(summary["map_at_10_by_class"], abs=1e-6)
    # Of other images, what belongs to them.
    assert main(["evaluate", run, "--data-seed", "9", "--json"]) == 0
    other = json.loads(capsys.readouterr().out)["floors"]
    assert other.keys() == {"chance", "pixels"}
    assert other["pixels"] != summary["floors"]["pixels"]


def test_a_run_is_not_judged_on_images_that_are_not_its_own(photos, tmp_path, capsys):
    config = fedss.Config(
        rounds=1, clients_per_round=2, backbone="conv4-4", embedding_size=8, sample_size=6
    )
    manifest = photos / "photos.csv"
    data = fedss.load_dataset("csv", manifest, image_size=12, cache=tmp_path / "cache")
    run = tmp_path / "run"
    fedss.train(config, run, data=data, on_round=lambda record: None)
    before = (run / "verification.json").read_bytes()
    (run / "verification.json").unlink()
    message = refused(["evaluate", str(run)], capsys)
    assert "it was trained on 'csv', given as data=, not on 'glyphs'" in message
    assert not (run / "verification.json").exists()
    # Named, they are known again; and so are others, of which nothing is kept.
    words = ["evaluate", str(run), "--data", "csv", "--data-path"]
    assert main([*words, str(manifest), "--test-classes", "0.4"]) == 0
    assert "images of csv, other than the run's own" in capsys.readouterr().out
    assert not (run / "verification.json").exists()
    assert main([*words, str(manifest)]) == 0
    assert "other than" not in capsys.readouterr().out
    assert (
        json.loads((run / "verification.json").read_text())["impostor"]
        == (json.loads(before)["impostor"])
    )


def test_images_that_are_not_the_same_any_more_are_refused(photos, tmp_path, capsys):
    data = with_splits(photos, "some.csv", {f"class {i}": "test" for i in range(3)})
    run = str(tmp_path / "run")
    assert main(["train", *TINY, *data, "--sample-size", "6", "--out", run]) == 0
    with_splits(photos, "some.csv", {f"class {i}": "test" for i in range(4)})
    assert "are not those that it was trained and tested on" in refused(["evaluate", run], capsys)


def test_a_list_of_test_images_alone_can_be_evaluated(photos, tmp_path, capsys):
    run, data = (
        tmp_path / "run",
        with_splits(photos, "some.csv", {"class 1": "test", "class 2": "test"}),
    )
    assert main(["train", *TINY, *data, "--sample-size", "6", "--out", str(run)]) == 0
    alone = with_splits(photos, "alone.csv", {}, usual="test")
    capsys.readouterr()
    assert main(["evaluate", str(run), *alone, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["queries"], found["classes"]) == (48, 12)
    for command in (["train", "--out", str(tmp_path / "none")], ["info"]):
        assert "no training images" in refused([*command, *TINY, *alone], capsys)
    assert not (tmp_path / "none").exists()


def test_a_test_of_one_class_is_none(photos, tmp_path, capsys):
    one = with_splits(photos, "one.csv", {"class 0": "test"})
    for words in (["train"], ["compare", "--methods", "full"]):
        out = str(tmp_path / words[0])
        message = refused([*words, *TINY, *one, "--sample-size", "6", "--out", out], capsys)
        assert "all test images are of one class, 'class 0'" in message
        assert not Path(out).exists()
    # Nor is one class with a gallery. Its queries among images of others are, if a weak one.
    rows = (photos / "photos.csv").read_text().splitlines()[1:]
    splits = ["query", "gallery"] * 2 + ["train"] * (len(rows) - 4)
    pair = photos / "pair.csv"
    words = ["train", *TINY, "--data", "csv", "--data-path", str(pair), "--sample-size", "6"]
    words += ["--out", str(tmp_path / "pair")]
    for other in ("train", "gallery"):
        splits[-1] = other
        lines = [f"{row},{split}" for row, split in zip(rows, splits, strict=True)]
        pair.write_text("\n".join(["image,label,client,split", *lines]) + "\n")
        if other == "train":
            assert "one class" in refused(words, capsys)
    assert main(words) == 0
    assert "a test of one class tells nothing for sure" in capsys.readouterr().out
    (summary,) = json.loads((tmp_path / "pair" / "summary.json").read_text())
    orders = (1, (1 + 2 / 3) / 2, (1 / 2 + 2 / 3) / 2)  # the wrong one last, second, first
    assert (summary["classes"], summary["floors"]["chance"]) == (1, pytest.approx(sum(orders) / 3))
    assert "one class" in refused(["evaluate", str(tmp_path / "pair"), *one], capsys)


def test_a_run_that_nobody_could_evaluate_is_printed(tmp_path, capsys):
    out = tmp_path / "out"
    words = ["compare", *GLYPHS, "--methods", "full", "fedss", "--out", str(out)]
    assert main(words) == 0
    rows = []
    for folder in ("fedss-seed0", "full-seed0"):
        (summary,) = json.loads((out / folder / "summary.json").read_text())
        unknown = dict.fromkeys(("map_at_10", "recall_at_1", "map_at_10_by_class"))
        (out / folder / "summary.json").write_text(json.dumps([{**summary, **unknown}]))
        capsys.readouterr()
        assert main(words) == 0
        cells = [line.split() for line in capsys.readouterr().out.splitlines()]
        rows += [next(row for row in cells if row[:1] == [name])[:-1] for name in ("full", "fedss")]
    assert re.fullmatch(r"0\.\d{3}", rows[0][1])
    assert re.fullmatch(r"0\.\d{3}–0\.\d{3}", rows[0][2])
    # MAP@10, interval, by class, / full, R@1, seeds.
    assert rows[1] == ["fedss", "–", "–", "–", "–", "–", "1"]
    # Nothing to compare with: no column for it.
    assert rows[2:] == [[name, "–", "–", "–", "–", "1"] for name in ("full", "fedss")]


@pytest.mark.parametrize("ending", [".npy", ".parquet"])
def test_embed_a_folder_and_a_csv(photos, tmp_path, capsys, ending):
    out = tmp_path / "run"
    data = ["--data", "csv", "--data-path", str(photos / "photos.csv"), "--sample-size", "6"]
    assert main(["train", *TINY, *data, "--out", str(out)]) == 0
    results = {}
    for source in (photos, photos / "photos.csv"):
        target = tmp_path / f"embeddings{ending}"
        assert main(["embed", str(out), str(source), "--out", str(target)]) == 0
        if ending == ".npy":
            rows = np.load(target)
            names = json.loads(target.with_suffix(".names.json").read_text())
        else:
            import pyarrow.parquet

            table = pyarrow.parquet.read_table(target).to_pydict()
            names, rows = table["name"], np.array(table["embedding"], dtype=np.float32)
        assert rows.dtype == np.float32
        assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
        results[source] = dict(zip(names, rows, strict=True))
    folder, manifest = results.values()
    assert folder.keys() == manifest.keys()
    assert len(folder) == 48
    assert all(np.allclose(folder[name], manifest[name], atol=1e-6) for name in folder)


def test_info_says_what_each_method_would_move(capsys):
    assert main(["info", *GLYPHS]) == 0
    text = capsys.readouterr().out
    assert re.search(r"training classes n\s+32", text)
    assert re.search(r"full\s+32\.0\s+100\.0%", text)
    assert re.search(r"fedss\s+8\.0\s+25\.0%", text)


def test_what_is_left_out_of_the_test_is_said(photos, capsys):
    path = photos / "photos.csv"
    lines = path.read_text().splitlines()
    # Of each class but the first two a single image is left.
    path.write_text("\n".join([*lines[:9], *lines[9::4]]) + "\n")
    words = ["info", *TINY, "--data", "csv", "--data-path", str(path), "--sample-size", "2"]
    assert main([*words, "--test-classes", "0.6"]) == 0
    said = capsys.readouterr()
    (count,) = re.findall(
        r"left out (\d+) images of held-out classes, each the only one of its class: \d", said.err
    )
    trained = int(re.search(r"training images\s+(\d+)", said.out)[1])
    tested = int(re.search(r"test queries\s+(\d+), searched among each other", said.out)[1])
    assert int(count) + trained + tested == 18
    assert main([*words, "--test-classes", "0"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert re.search(r"test queries\s+none", said.out)


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The message of a command that must end with code 2 and one line, no traceback."""
    try:
        code: Any = main(words)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    assert len(message.strip().splitlines()[-1]) > 20
    return message


def test_mistakes_end_with_code_2_and_say_what_to_do(photos, tmp_path, capsys):
    manifest, out = photos / "photos.csv", tmp_path / "out"
    csv_words = ["train", *TINY, "--data", "csv", "--sample-size", "6", "--out", str(out)]
    path = ["--data-path", str(manifest)]
    assert "did you mean fedss" in refused([*csv_words, *path, "--method", "fedsss"], capsys)
    assert "needs a path" in refused(csv_words, capsys)
    assert "2 to n = " in refused([*csv_words, *path, "--sample-size", "99"], capsys)
    assert "at least 2" in refused([*csv_words, *path, "--sample-size", "1"], capsys)
    missing = refused([*csv_words, "--data-path", str(tmp_path / "no.csv")], capsys)
    assert "no.csv" in missing
    assert "no.json" in refused(["train", "--config", "no.json", "--out", str(out)], capsys)
    assert "expected a finished run" in refused(["evaluate", str(tmp_path)], capsys)
    assert str(tmp_path) in refused(["report", str(tmp_path / "nothing")], capsys)
    refused(["train", "--rounds", "many", "--out", str(out)], capsys)
    refused(["compare", *GLYPHS, "--methods", "full", "fedsss", "--out", str(out)], capsys)
    assert not (out / "summary.json").exists()

    (photos / "3-1.jpg").write_bytes(b"not an image")
    assert "3-1.jpg" in refused([*csv_words, *path], capsys)
    assert main([*csv_words, *path, "--skip-broken"]) == 0
    assert "left out 1 unreadable" in capsys.readouterr().err
    found = json.loads((out / "config.json").read_text())
    assert found["data"]["skipped_pictures"] == 1
    broken = ["embed", str(out), str(photos), "--out", str(tmp_path / "e.npy")]
    assert "3-1.jpg" in refused(broken, capsys)
    assert main([*broken, "--skip-broken"]) == 0
    assert "npy or .parquet" in refused([*broken[:3], "--skip-broken", "--out", "e.txt"], capsys)

    different = refused([*csv_words, *path, "--skip-broken", "--scale", "9"], capsys)
    assert "scale: 10.0 there, 9.0 now" in different


def test_a_diverging_run_ends_with_code_2(tmp_path, capsys):
    words = ["train", *GLYPHS, "--client-lr", "1e30", "--server-lr", "1e30"]
    message = refused([*words, "--out", str(tmp_path / "run")], capsys)
    assert re.search(
        r"round \d+(, client \d+: expected a finite|: the server's step gave)", message
    )


def test_python_m_fedss_works():
    done = subprocess.run([sys.executable, "-m", "fedss", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "compare" in done.stdout
