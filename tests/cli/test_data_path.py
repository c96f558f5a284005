"""What lies at ``--data-path`` says what ``--data`` is, where that is not given."""

import json
import zipfile

import pytest

from fedss.cli import main
from fedss.cli.options import with_data_at_path
from tests.cli.test_cli import TINY, photos, refused  # noqa: F401
from tests.data.made import make_image, save


@pytest.fixture
def classes(tmp_path):
    """Folders class/image, of six classes of four images."""
    for i in range(24):
        save(tmp_path / "classes" / f"class {i % 6}" / f"{i}.png", make_image(i))
    return tmp_path / "classes"


def config_of(run):
    return json.loads((run / "config.json").read_text())["config"]


def test_a_csv_a_zip_and_folders_need_no_name(photos, classes, tmp_path, capsys):  # noqa: F811
    csv_file = photos / "photos.csv"
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for file in photos.glob("*.*"):
            if file.suffix != ".zip":
                archive.write(file, file.name)
    shown = []
    for words in (
        ["--data", "csv", "--data-path", str(csv_file)],
        ["--data-path", str(csv_file)],
        ["--data-path", str(tmp_path / "photos.zip")],
        ["--data-path", str(tmp_path / "photos.zip" / "photos.csv")],
    ):
        assert main(["info", *TINY, *words, "--sample-size", "4"]) == 0
        shown.append(capsys.readouterr().out)
    assert shown == shown[:1] * 4

    words = ["--data-path", str(classes), "--test-classes", "0.5", "--sample-size", "2"]
    assert "wrong depth" in refused(["info", *TINY, *words], capsys)
    assert main(["info", *TINY, *words, "--partition", "classes:1"]) == 0
    assert "data set folder" in capsys.readouterr().out
    missing = refused(["info", "--data-path", str(tmp_path / "none")], capsys)
    assert "found neither file nor folder" in missing


def test_columns_are_renamed_and_stay_so(photos, tmp_path, capsys):  # noqa: F811
    path, run = photos / "photos.csv", tmp_path / "run"
    text = path.read_text()
    (photos / "renamed.csv").write_text(text.replace("image,label", "path,species", 1))
    words = ["--data-path", str(photos / "renamed.csv"), "--columns", "image=path,label=species"]
    assert main(["train", *TINY, *words, "--sample-size", "4", "--out", str(run)]) == 0
    assert config_of(run)["data"] == "csv"
    assert config_of(run)["columns"] == "image=path,label=species"
    capsys.readouterr()
    assert main(["evaluate", str(run), "--json"]) == 0
    own = json.loads(capsys.readouterr().out)
    # Another list, with the usual names, in the place of the run's own.
    other = ["--data-path", str(path), "--columns", "image=image", "--json"]
    assert main(["evaluate", str(run), *other]) == 0
    assert json.loads(capsys.readouterr().out)["map_at_10"] == own["map_at_10"]
    assert "one column 'path'" in refused(["evaluate", str(run), "--data-path", str(path)], capsys)


@pytest.mark.parametrize(
    ("values", "named", "data"),
    [
        ({}, {"data_path": "PATH"}, "csv"),
        ({"data": "glyphs"}, {"data_path": "PATH"}, "csv"),
        ({"data": "folder"}, {"data_path": "PATH"}, "csv"),
        ({"data": "lfw"}, {"data_path": "PATH"}, "lfw"),
        ({"data": "folder", "data_path": "PATH"}, {}, "folder"),
        ({}, {"data": "folder", "data_path": "PATH"}, "folder"),
        ({}, {}, None),
    ],
)
def test_a_name_that_is_given_or_published_stays(tmp_path, values, named, data):
    from argparse import Namespace

    (tmp_path / "a.csv").write_text("")
    named = {k: str(tmp_path / "a.csv") if v == "PATH" else v for k, v in named.items()}
    found = with_data_at_path({**values, **named}, Namespace(**named))
    assert found.get("data") == data
