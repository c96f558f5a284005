"""A validation task made of training classes, where it is asked for and the data name none."""

import dataclasses
import hashlib
import json
from collections import Counter

import numpy as np
import pytest

import fedss
from fedss.cli import main
from fedss.data import (
    VALIDATION_CLASSES,
    Dataset,
    data_fingerprint,
    deal_images,
    load_dataset,
    parse_partition,
    rotate_classes,
)
from fedss.errors import ConfigError, DataError
from tests.data.made import lots, make_image, save

LABELS = [f"class {i % 40}" for i in range(120)] + ["alone 1", "alone 2", "alone 3"]
CONFIG = fedss.Config(
    data="csv",
    image_size=8,
    channels=3,
    backbone="conv4-4",
    embedding_size=4,
    rounds=3,
    clients_per_round=2,
    batch_size=8,
    workers=1,
    eval_every=1,
    eval_split="validation",
    patience=1,
)


@pytest.fixture
def photos(tmp_path):
    """A CSV without a column split."""
    root = tmp_path / "photos"
    for i in range(len(LABELS)):
        save(root / f"{i}.png", make_image(i, (8, 8)))
    rows = [f"{i}.png,{label},client {i % 5}" for i, label in enumerate(LABELS)]
    (root / "list.csv").write_text("\n".join(["image,label,client", *rows]))
    return root / "list.csv"


@pytest.fixture
def config(photos, tmp_path, monkeypatch):
    monkeypatch.setenv("FEDSS_CACHE", str(tmp_path / "cache"))
    return dataclasses.replace(CONFIG, data_path=str(photos))


def validation_lots(labels, seed):
    digest = {k: hashlib.sha256(f"validation {seed}:{k}".encode()).hexdigest() for k in labels}
    return {label: int(digest[label], 16) / 16**64 for label in labels}


def classes(images):
    return {images.class_names[i] for i in images.labels}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("at_site", [False, True])
def test_other_lots_hold_out_a_share_of_what_the_test_leaves(config, seed, at_site):
    config = dataclasses.replace(config, data_seed=seed)
    data = fedss.load_data(config, at_site=at_site)
    plain = fedss.load_data(
        dataclasses.replace(config, eval_split="test", patience=None), at_site=at_site
    )
    labels = set(LABELS)
    tested = {label for label in labels if lots(labels, seed)[label] < 0.2}
    drawn = validation_lots(labels - tested, seed)
    validated = {label for label in drawn if drawn[label] < VALIDATION_CLASSES}
    paired = {label for label, count in Counter(LABELS).items() if count > 1}
    assert classes(data.test.query) == tested & paired
    assert np.array_equal(data.test.query.pixels, plain.test.query.pixels)
    assert classes(data.validation.query) == validated & paired
    assert classes(data.train) == set(data.train.class_names) == labels - tested - validated
    assert len(data.unpaired) == len((tested | validated) - paired)
    assert plain.validation is None
    assert classes(plain.train) == labels - tested
    held, before = len(validated & paired), len(labels - tested - (validated - paired))
    assert data.remarks[0].startswith(
        f"validation: no images are named for it, so {held} of {before} training classes are held"
    )
    assert not plain.remarks


def test_what_the_data_name_is_kept(config, photos):
    lines = photos.read_text().splitlines()
    rows = [f"{row},{'validation' if row.endswith('client 0') else 'train'}" for row in lines[1:]]
    held = [row.split(",")[1] for row in rows if row.endswith("validation")]
    rows = [r for r in rows if held.count(r.split(",")[1]) > 1 or not r.endswith("validation")]
    photos.write_text("\n".join([f"{lines[0]},split", *rows]))
    data = fedss.load_data(config)
    listed = {row.split(",")[1] for row in rows if row.endswith("validation")}
    assert classes(data.validation.query) == listed
    assert not data.remarks


@pytest.mark.parametrize("source", ["arrays", "a list", "torch", "dataframe"])
def test_sources_in_memory_hold_out_the_same(config, photos, source):
    expected = fedss.load_data(config)
    pixels = np.stack([np.asarray(make_image(i, (8, 8))) for i in range(len(LABELS))])
    clients = [f"client {i % 5}" for i in range(len(LABELS))]
    options = {"validation_classes": VALIDATION_CLASSES, "channels": 3}
    if source == "torch":
        data = Dataset.from_torch(list(zip(pixels, LABELS, strict=True)), clients, **options)
    elif source == "dataframe":
        frame = pytest.importorskip("pandas").read_csv(photos)
        data = Dataset.from_dataframe(frame, root=photos.parent, image_size=8, **options)
    else:
        images = pixels if source == "arrays" else list(pixels)
        data = Dataset.from_arrays(images, LABELS, clients, **options)

    def contents(images):
        rows = zip(images.pixels, images.labels, images.clients, strict=True)
        return sorted((p.tobytes(), images.class_names[k], clients[c]) for p, k, c in rows)

    for part in (
        lambda data: data.train,
        lambda data: data.test.query,
        lambda data: data.validation.query,
    ):
        assert contents(part(data)) == contents(part(expected))
    assert len(data.unpaired) == len(expected.unpaired)
    assert data.remarks == expected.remarks


def test_a_share_that_is_none(photos):
    with pytest.raises(DataError, match=r"validation_classes, the share .* below 1, got 1.5"):
        load_dataset("csv", photos, image_size=8, validation_classes=1.5)


def test_classes_are_held_out_before_they_are_dealt_or_turned(config):
    plain = fedss.load_data(config)
    data = fedss.load_data(dataclasses.replace(config, partition="classes:4", rotations=True))
    dealt = deal_images(plain.train, parse_partition("classes:4", None), config.data_seed)
    train = rotate_classes(dealt)
    assert data_fingerprint(data) == data_fingerprint(dataclasses.replace(plain, train=train))


def test_a_run_chooses_by_it_and_is_judged_by_the_test(config, tmp_path, capsys):
    run = fedss.train(config, tmp_path / "run")
    data = fedss.load_data(config)
    about = json.loads((run.folder / "config.json").read_text())["data"]
    assert about["fingerprint"] == data_fingerprint(data)
    assert about["test_queries"] == len(data.validation.query)
    assert about["train_classes"] == len(data.train.class_names)
    best = fedss.load(run.folder / "best")
    for split in ("validation", "test"):
        assert main(["evaluate", str(run.folder / "best"), "--eval-split", split, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)["map_at_10"]
        by_hand = fedss.evaluate(best, getattr(data, split)).map_at_10
        assert found == pytest.approx(by_hand, abs=1e-6)
    # It goes on as the same run, and comparisons do the same.
    assert fedss.train(config, run.folder).already_done
    compared = fedss.compare(config, [config.method], [0], tmp_path / "compared")
    assert compared[0]["map_at_10"] == run.summary["map_at_10"]


def test_other_images_are_judged_as_a_whole(config, photos, tmp_path, capsys):
    run = fedss.train(config, tmp_path / "run")
    other = tmp_path / "other.csv"
    rows = [f"{photos.parent}/{i}.png,new {i % 3},x,test" for i in range(12)]
    other.write_text("\n".join(["image,label,client,split", *rows]))
    assert main(["evaluate", str(run.folder), "--data-path", str(other), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    test = load_dataset("csv", other, image_size=8, channels=3).test
    assert found["queries"] == 12
    by_hand = fedss.evaluate(fedss.load(run.folder), test).map_at_10
    assert found["map_at_10"] == pytest.approx(by_hand, abs=1e-6)


def test_the_line(config, photos, tmp_path, capsys):
    words = ["train", "--data-path", str(photos), "--image-size", "8", "--backbone", "conv4-4"]
    words += ["--rounds", "1", "--workers", "1", "--eval-split", "validation"]
    for command in (words, ["info", *words[1:5], "--eval-split", "validation"]):
        more = ["--out", str(tmp_path / "run")] if command is words else []
        assert main([*command, *more]) == 0, capsys.readouterr().err
        assert "validation: no images are named for it" in " ".join(capsys.readouterr())


def test_few_classes_and_a_dataset_without_it(config, tmp_path):
    pixels, labels = np.zeros((12, 3, 8, 8), np.uint8), [i % 3 for i in range(12)]
    data = Dataset.from_arrays(pixels, labels, [0] * 12, test_classes=0, validation_classes=0.01)
    assert len(data.validation.query.class_names) == 1
    with pytest.raises(DataError, match=r"all validation images are of one class.*another data_s"):
        fedss.train(config, tmp_path / "run", data=data)
    bare = Dataset.from_arrays(pixels, labels, [0] * 12)
    with pytest.raises(ConfigError, match=r"no validation images.*validation_classes=0.2"):
        fedss.train(config, tmp_path / "run", data=bare)
