"""Links of the documentation to files of the repository, as pages of the site; no other host.

A hook of mkdocs (mkdocs.yml). The pages of docs/ are read in the repository, too, where a link to
``../fedss/config.py`` opens the file. The site must hold what it links to, since it is read without
a network: each linked file becomes a page, text files as they are and notebooks cell by cell.
"""

import json
import os
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent.parent
# Files of the repository that are pages of their own.
PAGES = {
    "README.md": "index.md",
    "benchmarks/README.md": "benchmarks.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
LANGUAGES = {".py": "python", ".toml": "toml", ".json": "json", ".txt": "text", ".cff": "yaml"}

# Groups: the text up to the address, the path, the anchor.
_LINK = re.compile(r"(\]\()(?![a-z]+:|#)([^)\s#]+)(#[^)\s]+)?(?=\))")
_ELSEWHERE = re.compile(r"<(?:script|link|img|iframe)\b[^>]*(?:src|href)=.?(?:https?:)?//")
_FENCE = re.compile(r"^```.*?^```", re.M | re.S)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Headings get the anchors that they have where the repository is read."""
    config.mdx_configs.setdefault("toc", {})["slugify"] = slug
    return config


def slug(heading: str, separator: str) -> str:
    """The anchor of a heading, as tests/docs/test_pages.py and hosts of repositories make it."""
    kept = (c for c in heading.lower() if c in "-_ " or unicodedata.category(c)[0] in "LNM")
    return "".join(kept).replace(" ", separator)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each file of the repository that a page links to, and what these link to."""
    known = {f"docs/{file.src_uri}": file.src_uri for file in files}
    todo = [(path, (ROOT / path).read_text()) for path in known if _is_page(path)]
    known_pages = set(known.values())
    for path, page in PAGES.items():
        known[path] = page
        if page not in known_pages:
            text = (ROOT / path).read_text()
            todo.append((path, text))
            files.append(File.generated(config, page, content=text))
    while todo:
        path, text = todo.pop()
        for target in _targets(path, text):
            if target in known or not (ROOT / target).exists():
                continue
            known[target] = page = f"source/{target.rstrip('/')}.md"
            files.append(File.generated(config, page, content=_source(target)))
            todo += [(target, f"](./{file.name})") for file in _files(ROOT / target)]
    _PAGE_OF.clear()
    _PAGE_OF.update(known)
    return files


_PAGE_OF: dict[str, str] = {}


def _is_page(path: str) -> bool:
    return path.endswith(".md") and (ROOT / path).exists()


def _targets(path: str, text: str) -> Iterator[str]:
    for link in _LINK.finditer(_FENCE.sub("", text)):
        yield _resolve(path, link[2])


def _resolve(path: str, link: str) -> str:
    place = PurePosixPath(path)
    return os.path.normpath((place if (ROOT / path).is_dir() else place.parent) / link)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links to files of the repository at their pages."""
    source = page.file.src_uri
    at_home = {uri: path for path, uri in PAGES.items() if uri != "index.md"}
    path = at_home.get(source, f"docs/{source}")
    if source.startswith(("source/", "reference/")):
        return markdown

    def point(link: re.Match[str]) -> str:
        uri = _PAGE_OF.get(_resolve(path, link[2]))
        if uri is None:
            return link[0]
        return link[1] + os.path.relpath(uri, PurePosixPath(source).parent) + (link[3] or "")

    parts, end = [], 0
    for fence in _FENCE.finditer(markdown):
        parts += [_LINK.sub(point, markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, _LINK.sub(point, markdown[end:])])


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Show a bar within code in a table as a bar: hosts of repositories want it written as \\|."""
    return re.sub(r"<td.*?</td>", lambda cell: cell[0].replace("\\|", "|"), html, flags=re.S)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Refuse a page that would load something from another host."""
    if loads := _ELSEWHERE.search(output):
        raise PluginError(f"{page.file.src_uri} loads from another host: {loads[0]}")
    return output


def _source(path: str) -> str:
    """A file of the repository as a page that search leaves out."""
    head = f"---\nsearch:\n  exclude: true\n---\n\n# `{path}`\n\n"
    place = ROOT / path
    if place.is_dir():
        return head + "\n".join(f"- [{f.name}]({place.name}/{f.name}.md)" for f in _files(place))
    if place.suffix == ".ipynb":
        return head + "\n\n".join(_cells(place))
    return head + _fenced(place.read_text(), LANGUAGES.get(place.suffix, "text"))


def _files(folder: Path) -> list[Path]:
    """The text files of a folder; none of what is no folder."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return [file for file in files if file.suffix in LANGUAGES]


def _cells(notebook: Path) -> Iterator[str]:
    for cell in json.loads(notebook.read_text())["cells"]:
        text = "".join(cell["source"])
        yield _fenced(text, "python") if cell["cell_type"] == "code" else text


def _fenced(text: str, language: str) -> str:
    return f"~~~~{language}\n{text.rstrip()}\n~~~~\n"
