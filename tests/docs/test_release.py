"""The version is the same wherever it is written."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def read(name: str) -> str:
    return (ROOT / name).read_text()


def test_changelog_and_citation_have_the_version_of_the_package():
    version = tomllib.loads(read("pyproject.toml"))["project"]["version"]
    released = re.findall(r"^## (\d\S*)(?: - (\d{4}-\d\d-\d\d))?$", read("CHANGELOG.md"), re.M)
    assert released[0][0] == version
    citation = dict(
        re.findall(r'^(version|date-released): "?([^"\n]+)"?$', read("CITATION.cff"), re.M)
    )
    assert (citation["version"], citation["date-released"]) == released[0]


def test_the_lowest_python_is_one_that_was_tried():
    project = tomllib.loads(read("pyproject.toml"))["project"]
    tried = re.findall(
        r"^Programming Language :: Python :: (3\.\d+)$", "\n".join(project["classifiers"]), re.M
    )
    assert project["requires-python"] == f">={tried[0]}"
    assert f"Python {tried[0]}" in read("README.md")


def test_the_changelog_has_the_headings_of_keep_a_changelog():
    page = read("CHANGELOG.md")
    assert re.findall(r"^## (.+)$", page, re.M)[0] == "Unreleased"
    assert set(re.findall(r"^### (.+)$", page, re.M)) <= {
        "Added",
        "Changed",
        "Deprecated",
        "Fixed",
        "Removed",
        "Security",
    }
