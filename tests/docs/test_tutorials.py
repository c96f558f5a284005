"""The first steps of the documentation run, word for word but for the number of rounds."""

import re
import shlex
from pathlib import Path

import pytest

from fedss.cli import main

DOCS = Path(__file__).parents[2] / "docs"


def blocks(page: str, language: str = "") -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", (DOCS / page).read_text(), re.M | re.S)
    return [text for name, text in found if name == language]


def commands(page: str) -> list[list[str]]:
    """The page's commands of fedss, without the name."""
    lines = "".join(blocks(page)).replace("\\\n", "").splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("fedss ")]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDSS_CACHE", str(tmp_path / "cache"))


def test_the_home_page_has_the_quickstart_of_the_readme():
    """Which a test of its own runs."""
    readme = (DOCS.parent / "README.md").read_text()
    for block in blocks("index.md", "python") + blocks("index.md"):
        assert f"\n{block}```\n" in readme


def test_photographs_become_a_search(capsys):
    (program,) = blocks("tutorials/photographs.md", "python")
    exec(program, {})
    ran = []
    for words in commands("tutorials/photographs.md"):
        if words[0] != "serve":
            words = ["1" if word == "80" else word for word in words]
            assert main(words) == 0, words
            ran.append(words[0])
    assert ran == ["info", "train", "index", "search", "enrol", "search", "identify"]
    said = capsys.readouterr().out
    # What the tutorial says of the data, and that a class is found once it is enrolled.
    assert re.search(r"training classes n +111\b", said)
    assert re.search(r"test queries +234\b", said)
    before, after = said.split("enrolled 3 ")
    assert not re.search(r"blue mug +new/[123].jpg", before)
    assert re.search(r"blue mug +new/[123].jpg", after)


def test_the_app_of_a_federation_is_written():
    (words,) = (words for words in commands("tutorials/federation.md") if words[0] == "app")
    assert main(words) == 0
    assert Path(words[1], "pyproject.toml").exists()
