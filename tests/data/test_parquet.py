"""A list in Parquet is the same list as a CSV."""

import pytest

from fedss.data import load_dataset, locate
from fedss.errors import DataError
from tests.data.made import GOOD, load, same, write_csv

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def write(root, columns):
    path = root / "images.parquet"
    parquet.write_table(pyarrow.table(columns), path)
    return path


def columns_of(lines, names="image,label,client,split"):
    return dict(
        zip(names.split(","), zip(*(x.split(",") for x in lines), strict=True), strict=True)
    )


def test_the_same_list(root):
    expected = load(write_csv(root, GOOD))
    path = write(root, {**columns_of(GOOD), "size": [1] * 7})
    assert locate(path) == ("csv", path)
    data = load(path)
    assert same(data, expected)
    assert data.remarks == ("columns not read: size",)
    renamed = write(root, columns_of(GOOD, "file,species,phone,split"))
    assert same(load(renamed, columns="image=file,label=species,client=phone"), expected)


def test_numbers_and_categories_are_names(root):
    lines = [f"p{i}.png,{i % 3},{i % 2}" for i in range(9)]
    expected = load(write_csv(root, lines, "image,label,client"))
    columns = {
        "image": [f"p{i}.png" for i in range(9)],
        "label": [i % 3 for i in range(9)],
        "client": pyarrow.array([str(i % 2) for i in range(9)]).dictionary_encode(),
    }
    assert same(load(write(root, columns)), expected)
    del columns["client"]
    path = write_csv(root, [f"{line[:-1]}nobody" for line in lines], "image,label,client")
    dealt = load(path, partition="class")
    assert same(load(write(root, columns), partition="class"), dealt)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": ["a", None]}, r"images\.parquet, row 2: empty label"),
        ({"label": [1.5, 2.0]}, "row 1: expected label to be text or a whole number, got a float"),
        ({"image": [{"bytes": b"", "path": ""}] * 2}, "got a dict; images within .*huggingface"),
        ({"image": ["p0.png", "./p0.png"]}, "line 2: p0.png is listed already in line 1"),
        ({"split": ["train", "tset"]}, "line 2: expected split .* is 'test' meant"),
        ({"Label": ["a", "b"]}, "2 columns are called label"),
    ],
)
def test_mistakes_are_named(root, changes, message):
    columns = {"image": ["p0.png", "p1.png"], "label": ["a", "b"], "client": ["x", "y"]}
    with pytest.raises(DataError, match=message):
        load(write(root, {**columns, **changes}))


def test_what_is_no_parquet(root):
    (root / "bad.parquet").write_bytes(b"image,label,client\n")
    for name in ("bad.parquet", "none.parquet"):
        with pytest.raises(DataError, match=f"{name}: cannot be read as Parquet"):
            load_dataset("csv", root / name)
    with pytest.raises(DataError, match=r"missing: client; found: image, label"):
        load(write(root, {"image": ["p0.png"], "label": ["a"]}))
    with pytest.raises(DataError, match="no images"):
        load(
            write(
                root, {name: pyarrow.array([], "string") for name in ("image", "label", "client")}
            )
        )
