"""CSV read strictly: what is told apart, what is refused, and by which line."""

import csv
import io
import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedss.data.names import composed, look_alikes
from fedss.data.table import read_table
from fedss.errors import DataError
from fedss.inference.embedding import list_images

COLUMNS = ("image", "label", "client")


@pytest.fixture
def write(tmp_path):
    def written(content):
        path = tmp_path / "p.csv"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return written


def rows(path):
    return list(read_table(path, COLUMNS, optional="split").rows)


def mistake(path):
    with pytest.raises(DataError) as caught:
        rows(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


# Quotes


TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=8)


@given(st.lists(st.tuples(TEXT, TEXT, TEXT), min_size=1, max_size=5), st.sampled_from([0, 1]))
def test_what_a_writer_of_csv_writes_is_read_back(tmp_path_factory, cells, quoting):
    cells = [row for row in cells if all(map(composed, row))] or [("a", "b", "c")]
    file = io.StringIO()
    csv.writer(file, quoting=quoting).writerows([COLUMNS, *cells])
    path = tmp_path_factory.mktemp("csv") / "p.csv"
    path.write_text(file.getvalue(), encoding="utf-8", newline="")
    found = [tuple(row) for _, row in rows(path)]
    assert found == [tuple(cell.strip() for cell in row) for row in cells]


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_lines_may_end_in_any_way_and_values_in_quotes_may_break(write, ending):
    lines = ["image,label,client,note", 'a.png,"a, ""b""",x,"one', 'two"', "", ' "b.png" ,c, x ,']
    path = write("\ufeff" + ending.join(lines))
    assert rows(path) == [(2, ["a.png", 'a, "b"', "x"]), (5, ["b.png", "c", "x"])]


def test_kinds_of_line_ends_may_be_mixed(write):
    path = write("image,label,client\r\na.png,a,x\nb.png,b,x\rc.png,c,x\r\r\nd.png,d,x")
    assert [row[0] for _, row in rows(path)] == ["a.png", "b.png", "c.png", "d.png"]


LINES = [f"p{i}.png,class{i},shop{i % 2}" for i in range(12)]


def test_a_stray_quote_is_never_taken_and_named_by_its_line(write):
    """At whatever place of whatever line."""
    for line, place in itertools.product((0, 4, 11), range(19)):
        lines = LINES.copy()
        lines[line] = lines[line][:place] + '"' + lines[line][place:]
        assert f"line {line + 2}: " in mistake(write("\n".join(["image,label,client", *lines])))


def test_two_stray_quotes_in_two_lines_swallow_no_rows(write):
    for places in itertools.product(range(20), repeat=2):
        lines = LINES.copy()
        for line, place in zip((3, 8), places, strict=True):
            lines[line] = lines[line][:place] + '"' + lines[line][place:]
        assert "line 5: " in mistake(write("\n".join(["image,label,client", *lines])))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ('"12" plate"', r'expected a comma after the value in quotes "12", got plate"; .*"12"" pl'),
        ('12" plate', r'a double quote within a value: 12" plate; .* twice: "12"" plate"'),
        ('plate"', r'a double quote within a value: plate"'),
        ('"plate', r'a double quote begins a value, and no other one ends it: "plate'),
        ('"a"b', r'expected a comma after the value in quotes "a", got b'),
    ],
)
def test_a_mistake_with_quotes_says_how_to_write_it(write, value, message):
    said = mistake(write(f"image,label,client\na.png,x,x\nb.png,{value},x\nc.png,x,x\n"))
    assert re.search(f"line 3: {message}", said)


@pytest.mark.parametrize("text", ['a.png,"cup,x\nb.png",mug,x', 'a.png,"cup,x\nb.png"'])
def test_a_quote_that_closes_in_another_row_is_told_everywhere(write, text):
    path = write(f"image,label,client\n{text}\n")
    assert "line 2: expected 3 cells" in mistake(path)
    with pytest.raises(DataError, match="goes on to line 3: remove a double quote"):
        list_images(path)


def test_images_without_a_class_are_counted(write):
    found = list_images(write("image,label\na.png,cup\nb.png,\n"))
    assert (found.labels, found.lines) == (("cup", None), (2, 3))
    assert found.remarks == ("1 without a class: label is empty",)


def test_one_name_has_one_spelling(write):
    path = write('image,label,client\na.png,"12"" plate",x\nb.png, "12"" plate" ,x\n')
    assert {row[1] for _, row in rows(path)} == {'12" plate'}


# The header


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("image,label,client,label", "2 columns are called label, or nearly so: 'label', 'label'"),
        ("image,label,client,Label", "2 columns are called label, or nearly so: 'label', 'Label'"),
        ("image,label,client,label_", "2 columns are called label"),
        ("image,label,client,IMAGE", "2 columns are called image"),
        ("image,label,client,split,Split", "2 columns are called split"),
        ("image,label,client,note,note", "2 columns are called note, or nearly so: 'note', 'note'"),
        ("image,label,client,note,Note", "2 columns are called note"),
        ("image,label,client,Split", "is 'Split' meant as 'split'. Rename the column: to 'split'"),
        ("image,label,client,splits", "is 'splits' meant as 'split'"),
        ("image,label,client,spilt", "is 'spilt' meant as 'split'"),
        ("image,Label,client", "missing: label.* is 'Label' meant as 'label'"),
        ('"image";"label";"client"', "separated with semicolons; separate .* with commas"),
        ("image\tlabel\tclient", "separated with tabs; separate"),
        ("image|label|client", "separated with bars; separate"),
        ("sep=;", "a note for Excel; remove this line"),
    ],
)
def test_a_header_that_may_mean_something_else_is_refused(write, header, message):
    said = mistake(write(f"{header}\na.png,b,c,d,e\n"))
    assert re.search(f"line 1: .*{message}", said)


@pytest.mark.parametrize("column", ["label", "client", "split", "note"])
def test_an_index_is_as_strict_with_its_header(write, column):
    others = ",".join({"image", "label", "client", "split"} - {column})
    for more in (column, column.capitalize()):
        with pytest.raises(DataError, match=f"line 1: 2 columns are called {column}"):
            list_images(write(f"{others},{column},{more}\na.png,b\n"))
    if column == "note":
        return
    for near in (column.capitalize(), f"{column}s", f"{column[:-2]}{column[-1]}{column[-2]}"):
        with pytest.raises(DataError, match=f"line 1: is '{near}' meant as '{column}'"):
            list_images(write(f"image,{near}\na.png,b\n"))
        with pytest.raises(DataError, match=f"is '{near}' meant as '{column}'"):
            rows(write(f"{others},{near}\na.png,b\n"))


def test_a_name_of_two_words_is_no_slip_where_its_like_is_not_read(write):
    assert len(list_images(write("image,client_id\na.png,7\n")).paths) == 1
    with pytest.raises(DataError, match="is 'client_id' meant as 'client'"):
        rows(write("image,label,client_id\na.png,b,7\n"))


def test_columns_that_are_not_read_are_told(write):
    path = write("image,label,client,Notes,,photographer\na.png,b,c,d,e,f\n")
    assert read_table(path, COLUMNS).remarks == ("columns not read: Notes, photographer",)
    found = list_images(write("image,category,client,split\na.png,b,c,d\n"))
    assert found.remarks == (
        "no column label: these images have no class",
        "columns not read: category",
    )
    assert list_images(write("image,label,client,split\na.png,b,c,d\n")).remarks == ()


# The file


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("image,label,client\n".encode("utf-16"), "expected text in UTF-8, got UTF-16. Save"),
        ("image,label,client\n".encode("utf-16-le"), r"line 1: a zero byte \(NUL\)"),
        (b"image,label,client\na.png,b,c\r\nb.png,b\0b,c\n", r"line 3: a zero byte \(NUL\)"),
        ("image,label,client\na.png,café,c\n".encode("latin-1"), "line 2: .*got byte 0xe9"),
        (b"image,label,client\na.png;b;c\n", "line 2: empty label; .*with commas, not semicolons"),
        ("image,label,client\na.png,\u200b\ufeff,c\n".encode(), "line 2: empty label"),
        ("image,label,client\n\u200b,,\n".encode(), "no images"),
    ],
)
def test_a_file_that_is_something_else_is_named(write, content, message):
    assert re.search(message, mistake(write(content)))


# Names

UNSEEN = (
    "\u200b\u200c\u200d\u200e\u200f\u2060\ufeff\xad"
    "\u202a\u202e\u2066\u2069\u061c\u034f\u2800\u3164\x07"
)


@pytest.mark.parametrize("unseen", UNSEEN, ids=ascii)
def test_what_nobody_sees_makes_no_other_class(unseen):
    for name in (f"{unseen}cup", f"cup{unseen}", f"c{unseen}up", f"{unseen} cup {unseen}"):
        assert composed(name) == "cup"
    assert composed(unseen) == ""


def test_spaces_of_any_kind_and_number_are_one():
    for space in (" ", "  ", "\t", "\n", "\xa0", "\u2009", "\u3000", " \u2028 "):
        assert composed(f"blue{space}mug") == "blue mug"


def test_what_shapes_letters_and_emoji_stays():
    for name in (
        "می\u200cخواهم",
        "क्\u200dष",
        "👩\u200d🚀",
        "❤\ufe0f",
        "🏴\U000e0067\U000e007f",
        "葛\U000e0100",
    ):
        assert composed(name) == name


def test_names_that_look_alike_are_told():
    alike = [("cup", "сup"), ("Cat", "cat"), ("ﬁsh", "fish"), ("ＡＢ", "ab"), ("x‐y", "x-y")]
    for pair in alike:
        (said,) = look_alikes(pair, "classes")
        assert said.startswith("classes whose names look alike are kept apart: '")
        assert said.isascii()
        assert look_alikes(pair[:1], "classes") == ()
    many = look_alikes([name for pair in alike for name in pair], "classes")
    assert many[0].endswith("; and 2 more")
