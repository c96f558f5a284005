"""Image files in, embeddings with names out."""

import json
import logging

import numpy as np
import pytest
from PIL import Image

from fedss.data.decoding import decode
from fedss.errors import ConfigError, DataError, RunFolderError
from fedss.inference.embedding import Embeddings, embed_files, list_images, write_embeddings
from fedss.models import build_embedder, embed_pixels

MODEL = build_embedder("conv4-4", channels=1, image_size=12, embedding_size=5, seed=0)
RESULT = Embeddings(("a.png", "b.png"), np.eye(2, 3, dtype=np.float32))


@pytest.fixture
def images(tmp_path):
    """Three images p0.png to p2.png."""
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 256, (20, 20), np.uint8)).save(tmp_path / f"p{i}.png")
    return tmp_path


def write_csv(root, content):
    path = root / "images.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_files_are_decoded_as_in_training(images):
    image_list = list_images(images)
    result = embed_files(MODEL, image_list.paths, names=image_list.names)
    assert result.names == ("p0.png", "p1.png", "p2.png")
    expected = embed_pixels(MODEL, np.stack([decode(path, 12, 1) for path in image_list.paths]))
    assert np.array_equal(result.embeddings_ND, expected)


def test_progress_is_told_and_all_broken_images_are_named_at_once(images, caplog):
    files = sorted(images.rglob("*.png"))
    embedder = build_embedder("conv4-4", channels=1, image_size=12, embedding_size=6, seed=0)
    with caplog.at_level(logging.DEBUG, "fedss.progress"):
        embed_files(embedder, files)
    told = [record.progress for record in caplog.records]
    assert {(p.task, p.total, p.unit) for p in told} == {("embed", len(files), "images")}
    assert (told[0].done, told[-1].done) == (0, len(files))
    broken = [images / name for name in ("x.png", "y.png")]
    broken[0].write_bytes(b"no image")
    with pytest.raises(DataError, match=r"cannot read 2 images: .*x\.png: .*; .*y\.png: No such"):
        embed_files(embedder, [*files, *broken])
    assert embed_files(embedder, [*files, *broken], skip_broken=True).skipped == tuple(
        map(str, broken)
    )


@pytest.mark.parametrize(
    "content",
    [
        "image\np1.png\np0.png\n",
        "\ufeffimage,label\np1.png,\n\np0.png,cat\n",
        'label, image \r\n"a\nb", p1.png \r\n,p0.png\r\n',
    ],
)
def test_a_csv_needs_no_column_but_image(images, content):
    image_list = list_images(write_csv(images, content))
    assert image_list.names == ("p1.png", "p0.png")
    assert image_list.paths == [images / "p1.png", images / "p0.png"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("image\ncafé.png\n".encode("latin-1"), "expected text in UTF-8, got byte 0xe9"),
        (b"", r"empty; expected a header line image\[,label\]$"),
        (
            "file,label\nx.png,y\n",
            "line 1: expected the column image and perhaps label; missing: image",
        ),
        ("Image\nx.png\n", "is 'Image' meant as 'image'"),
        ("image,label\np0.png,a\n,b\n", "line 3: empty image"),
        ("image,label\np0.png,a,b\n", "line 2: expected 2 cells, got 3"),
        ("image\n", "no images"),
    ],
)
def test_each_mistake_in_a_csv_is_named_as_in_training(images, content, message):
    path = write_csv(images, content)
    with pytest.raises(DataError, match=message) as caught:
        list_images(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("second", ["p0.png", "./p0.png", "x/../p0.png", "absolute"])
def test_a_csv_lists_an_image_once_as_in_training(images, second):
    second = images / "p0.png" if second == "absolute" else second
    path = write_csv(images, f"image,label\np0.png,a\np1.png,a\n{second},b\n")
    message = r"images\.csv, line 4: p0\.png is listed already in line 2; each image has one"
    with pytest.raises(DataError, match=message):
        list_images(path)


def test_names_of_a_csv_are_paths_from_where_it_lies(images, tmp_path):
    path = write_csv(images, f"image\n./p1.png\n{images / 'p0.png'}\n../other.png\n")
    image_list = list_images(path)
    assert image_list.names == ("p1.png", "p0.png", str(images.parent / "other.png"))
    assert image_list.paths == [images / "p1.png", images / "p0.png", images.parent / "other.png"]
    # A link to a CSV lists what lies beside the link, as in training.
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "list.csv"
    link.symlink_to(path)
    Image.new("L", (9, 9)).save(tmp_path / "links" / "p1.png")
    assert list_images(link).paths[0] == tmp_path / "links" / "p1.png"


def test_places_without_images_are_named(tmp_path):
    with pytest.raises(DataError, match="no image found"):
        list_images(tmp_path)
    with pytest.raises(DataError, match="expected a folder of images or a CSV"):
        list_images(tmp_path / "none")


def test_any_name_is_read_back_and_no_other_file_is_touched(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    names = ("a\nb.png", 'caf\udce9,"x".png')
    written = write_embeddings(tmp_path / "notes.npy", Embeddings(names, RESULT.embeddings_ND))
    assert written == [tmp_path / "notes.npy", tmp_path / "notes.names.json"]
    assert tuple(json.loads(written[1].read_bytes())) == names
    assert np.array_equal(np.load(written[0]), RESULT.embeddings_ND)
    assert {path.name for path in tmp_path.iterdir()} == {*(p.name for p in written), "notes.txt"}
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_name_that_parquet_cannot_keep_is_named(tmp_path):
    pytest.importorskip("pyarrow")
    odd = Embeddings(("a.png", "caf\udce9.png"), RESULT.embeddings_ND)
    with pytest.raises(DataError, match=r"in UTF-8, which 'caf\\udce9\.png' is not; .*\.npy"):
        write_embeddings(tmp_path / "e.parquet", odd)
    assert not list(tmp_path.iterdir())


def test_places_that_cannot_be_written_are_named(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"ends in \.npy or \.parquet"):
        write_embeddings(tmp_path / "e.txt", RESULT)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match=r"found a file: .*/file; choose another place"):
        write_embeddings(tmp_path / "file" / "e.npy", RESULT)
    (tmp_path / "folder.npy").mkdir()
    message = rf"cannot write {tmp_path}/folder\.npy: Is a directory; .*another one \(--out\)$"
    with pytest.raises(RunFolderError, match=message):
        write_embeddings(tmp_path / "folder.npy", RESULT)
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(RunFolderError, match="No space left") as caught:
        write_embeddings(tmp_path / "e.npy", RESULT)
    assert "checkpoint" not in str(caught.value)
    assert len(list(tmp_path.iterdir())) == 2
