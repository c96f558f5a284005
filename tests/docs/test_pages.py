"""README and docs: links lead somewhere, commands have their options, no page is left out."""

import re
import unicodedata
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path

import pytest

from fedss.cli import main
from fedss.data import DATASETS

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
    ROOT / "benchmarks" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
# Pages of the site that docs/site_hooks/ makes; all others are files in docs/.
GENERATED = re.compile(r"reference/.*|(benchmarks|changelog|contributing|security)\.md")
LINK = re.compile(r"\]\((?!https?:)([^)\s#]*)(?:#([^)\s]+))?\)")
# A command at the start of a line or of a code span, up to a comment or the span's end. (A run is
# called "fedss seed 0" in what is printed.)
COMMAND = re.compile(r"(?:^|`|-m )fedss (?!seed \d)([a-z]+)\b((?:\\\n|[^`\n#])*)", re.M)

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    found = set()
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    for heading in re.findall(r"^#+ (.+)$", text, re.M):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        kept = (c for c in words if c in "-_ " or unicodedata.category(c)[0] in "LNM")
        found.add("".join(kept).replace(" ", "-"))
    return found


@pages
def test_links_lead_somewhere(page):
    links = LINK.findall(page.read_text())
    for path, anchor in links:
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {path}"
        if anchor:
            assert anchor in anchors(target), f"{page.name} links to {path}#{anchor}"


@cache
def options_of(command: str) -> frozenset[str]:
    basic = options_in(command, "--help")
    return options_in(command, "--help-all") if "--help-all" in basic else basic


def options_in(command: str, flag: str) -> frozenset[str]:
    with redirect_stdout(StringIO()) as shown, pytest.raises(SystemExit) as ended:
        main([command, flag])
    assert ended.value.code == 0, f"there is no command fedss {command}"
    return frozenset(re.findall(r"--[a-z][a-z0-9-]*", shown.getvalue()))


@pages
def test_commands_have_the_options_that_are_given(page):
    for command, words in COMMAND.findall(page.read_text()):
        given = set(re.findall(r"(?<!\S)--[a-z][a-z0-9-]*", words))
        assert given <= options_of(command), f"fedss {command}{words}"


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs" / "get-started.md"])
def test_commands_for_beginners_need_basic_options_alone(page):
    for command, words in COMMAND.findall(page.read_text()):
        assert {*re.findall(r"(?<!\S)--[a-z][a-z0-9-]*", words)} <= options_in(command, "--help")


def test_the_navigation_of_the_site_has_every_page_once():
    _, nav = (ROOT / "mkdocs.yml").read_text().split("\nnav:\n")
    listed = [page for page in re.findall(r"[\w/-]+\.md$", nav, re.M) if not GENERATED.match(page)]
    there = (page.relative_to(ROOT / "docs") for page in (ROOT / "docs").rglob("*.md"))
    assert sorted(listed) == sorted(map(str, there))


def test_every_data_set_has_a_section():
    page = ROOT / "docs" / "datasets.md"
    rows = dict(re.findall(r"^\| \[`([a-z0-9-]+)`\]\(#([^)]+)\)", page.read_text(), re.M))
    assert rows.keys() == {*DATASETS} - {"csv", "folder"}
    assert set(rows.values()) <= anchors(page)


def test_every_image_is_shown():
    shown = "".join(page.read_text() for page in PAGES)
    assert not [p.name for p in (ROOT / "docs" / "images").iterdir() if p.name not in shown]
