"""What a search found, as one HTML file: to be looked at here, or copied from a remote machine."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from fedss.inference.pixels import Read, read_images
from fedss.search.collection import Collection, Match
from fedss.text import printable

_STATIC = Path(__file__).parent / "static"


def neighbours_page(
    collection: Collection, queries: Sequence[str | Path], matches: Sequence[Sequence[Match]]
) -> str:
    """A page that refers to nothing outside itself; ``matches``: the matches of each query."""
    environment = Environment(autoescape=True, trim_blocks=True)
    environment.filters |= {
        "printable": printable,
        "inline": lambda jpeg: f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}",
    }
    page, style = (
        (_STATIC / name).read_text(encoding="utf-8") for name in ("neighbours.html", "server.css")
    )
    blocks = read_images(collection.embedder, queries, thumbnails=True)
    reads = [read for block in blocks for read in block]
    return environment.from_string(page).render(
        style=Markup(style),
        source=collection.source.name,
        queries=[
            {"name": Path(query).name, **_answer(collection, read, found)}
            for query, read, found in zip(queries, reads, matches, strict=True)
        ],
    )


def _answer(collection: Collection, query: Read, matches: Sequence[Match]) -> dict[str, Any]:
    """What was found, marked where the query's class is known: from its own copy in the index."""
    copy = collection.copy_among(query, matches)
    label = None if copy is None else copy.label
    shown = []
    for match in matches:
        mark, words = "", ""
        if match is copy:
            words = "the query itself"
        elif label is not None:
            same = match.label == label
            mark, words = ("right", "✓ right class") if same else ("wrong", "✗ wrong class")
        shown.append(
            {
                "image": collection.thumbnail(match.position),
                "name": Path(match.name).name,
                "label": match.label,
                "score": match.score,
                "mark": mark,
                "words": words,
            }
        )
    name = None if copy is None else Path(copy.name).name
    return {"image": query.thumbnail, "own": name, "label": label, "matches": shown}
