"""What TensorBoard reads back."""

import dataclasses
import io
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from google.protobuf import text_format
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

import fedss
from fedss.data import RetrievalTask
from fedss.runs.tensorboard import add_projection, choose_points, draw_neighbours, open_writer
from tests.training.test_experiment import DATA, SMALL, train

QUERY = DATA.test.query


def events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0}).Reload()


def projector(folder: Path) -> ProjectorConfig:
    text = (folder / "tensorboard" / "projector_config.pbtxt").read_text()
    return text_format.Parse(text, ProjectorConfig())


def test_a_run_shows_scalars_neighbours_and_the_projector(tmp_path, capsys):
    run = train(tmp_path / "run", dataclasses.replace(SMALL, lr_decay_start=0.5))
    board = events(run.folder)
    drawn = {tag: [e.value for e in board.Scalars(tag)] for tag in board.Tags()["scalars"]}
    assert drawn["train/client_lr"] == pytest.approx([0.05] * 4 + [0.05 * 2 / 3, 0.05 / 3])
    assert drawn["train/class_row_lr"] == pytest.approx([2.0] * 4 + [4 / 3, 2 / 3])
    assert drawn["train/clients"] == [3] * 6
    assert drawn["train/class_rows_per_client"] == [6] * 6
    phases = [tag for tag in drawn if tag.startswith("seconds/") and tag != "seconds/round"]
    assert sum(drawn["seconds/round"]) == pytest.approx(sum(sum(drawn[tag]) for tag in phases))
    images = board.Images("test/neighbours")
    assert [image.step for image in images] == [2, 4, 6]
    sheet = Image.open(io.BytesIO(images[-1].encoded_image_string))
    assert sheet.size == (6 * 66 + 8, 6 * 66 + 4)
    (embedding,) = projector(run.folder).embeddings
    logs = run.folder / "tensorboard"
    names = (logs / embedding.metadata_path).read_text().splitlines()
    chosen = choose_points(QUERY.labels, SMALL.data_seed)
    assert names == [QUERY.class_names[i] for i in QUERY.labels[chosen]]
    with torch.no_grad():
        expected = run.embedder.eval()(torch.from_numpy(QUERY.pixels[chosen]))
    assert np.loadtxt(logs / embedding.tensor_path) == pytest.approx(expected.numpy(), abs=1e-5)
    sprite = np.asarray(Image.open(logs / embedding.sprite.image_path))
    width, height = embedding.sprite.single_image_dim
    per_row = sprite.shape[1] // width
    for i, pixels in enumerate(QUERY.pixels[chosen]):
        y, x = height * (i // per_row), width * (i % per_row)
        tile = sprite[y : y + height, x : x + width, 0].astype(int)
        assert np.abs(tile - pixels[0]).max() <= 1
    assert "warning" not in capsys.readouterr().out


def test_a_resumed_run_shows_nothing_twice(tmp_path, capsys):
    def stop(record: dict) -> None:
        if record["round"] == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", on_round=stop)
    time.sleep(1)  # TensorBoard names files by the second.
    run = train(tmp_path / "run")
    board = events(run.folder)
    assert [e.step for e in board.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [e.step for e in board.Images("test/neighbours")] == [2, 4, 6]
    # Stopped between the last checkpoint and the summary.
    shown = (run.folder / "retrieval.npz").read_bytes()
    for name in ("summary.json", "retrieval.npz"):
        (run.folder / name).unlink()
    again = train(run.folder)
    assert again.summary == run.summary
    assert (run.folder / "retrieval.npz").read_bytes() == shown
    assert len(projector(run.folder).embeddings) == 1
    assert [e.step for e in events(run.folder).Images("test/neighbours")] == [2, 4, 6]
    assert "warning" not in capsys.readouterr().out


def test_a_report_written_under_way_is_written_anew_in_the_end(tmp_path):
    def look(record: dict) -> None:
        if record["round"] == 3:
            fedss.write_report(tmp_path / "run")

    run = train(tmp_path / "run", on_round=look)
    assert "Not finished" not in (run.folder / "report.html").read_text()


@given(arrays(np.int64, st.integers(1, 300), elements=st.integers(0, 80)), st.integers(0, 9))
def test_points_are_whole_classes_as_far_as_there_is_room(labels, seed):
    chosen = choose_points(labels, seed)
    assert np.array_equal(chosen, np.unique(chosen))
    assert np.array_equal(chosen, choose_points(labels, seed))
    classes, counts = np.unique(labels, return_counts=True)
    taken, of_each = np.unique(labels[chosen], return_counts=True)
    assert len(taken) == min(50, len(classes))
    assert np.array_equal(of_each, np.minimum(counts[np.isin(classes, taken)], 10))
    if (counts > 1).sum() >= 50:
        assert (counts[np.isin(classes, taken)] > 1).all()


@pytest.mark.parametrize(("pairs", "singles"), [(60, 200), (20, 200)])
def test_classes_of_several_images_come_first(pairs, singles):
    labels = np.concatenate([np.arange(pairs).repeat(2), pairs + np.arange(singles)])
    for seed in range(3):
        taken = np.unique(labels[choose_points(labels, seed)])
        assert len(taken) == 50
        assert (taken < pairs).sum() == min(pairs, 50)


def test_frames_tell_right_from_wrong_also_without_colours():
    pixels = np.zeros((1, 3, 3, 100, 100), np.uint8)
    sheet = draw_neighbours(pixels, np.array([[4, 4, 5]]))
    left = [4 + column * 66 + (4 if column else 0) for column in range(3)]
    edges = [sheet[4:66, x].astype(int) for x in left]
    assert (edges[0] == 255).all()
    assert (edges[1] == (10, 122, 85)).all()
    assert {tuple(color) for color in edges[2]} == {(179, 38, 30), (255, 255, 255)}
    assert (sheet[7:63, left[2] + 3 : left[2] + 59] == 0).all()


def test_a_gallery_of_large_colour_images_with_strange_names(tmp_path):
    rng = np.random.default_rng(0)
    gallery = dataclasses.replace(
        QUERY,
        pixels=rng.integers(0, 256, (9, 3, 96, 96), dtype=np.uint8),
        labels=np.arange(9) // 3,
        clients=QUERY.clients[:9],
        names=QUERY.names[:9],
        class_names=["a\tb\nc", " ", "größe"],
    )
    found = torch.zeros(9, 4), torch.arange(36.0).reshape(9, 4)
    with open_writer(tmp_path, 1) as writer:
        add_projection(writer, RetrievalTask(gallery, gallery), found, 0, 12)
    (embedding,) = projector(tmp_path).embeddings
    logs = tmp_path / "tensorboard"
    names = (logs / embedding.metadata_path).read_text(encoding="utf-8").split("\n")
    assert names == ["a b c"] * 3 + ["–"] * 3 + ["größe"] * 3 + [""]
    assert list(embedding.sprite.single_image_dim) == [48, 48]
    assert np.array_equal(np.loadtxt(logs / embedding.tensor_path), found[1])
    assert not list(logs.glob("**/*.png"))
