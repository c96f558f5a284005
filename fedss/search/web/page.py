"""What a search found, as one HTML file: to be looked at here, or copied from a remote machine."""

import base64
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment

from fedss.inference.pixels import thumbnail
from fedss.search.collection import Collection, Match
from fedss.text import printable


def neighbours_page(
    collection: Collection, queries: Sequence[str | Path], matches: Sequence[Sequence[Match]]
) -> str:
    """A page that refers to nothing outside itself; ``matches``: the matches of each query."""
    environment = Environment(autoescape=True, trim_blocks=True)
    environment.filters |= {
        "printable": printable,
        "inline": lambda jpeg: f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}",
    }
    page = (Path(__file__).parent / "static/neighbours.html").read_text(encoding="utf-8")
    return environment.from_string(page).render(
        source=str(collection.source),
        queries=[
            (str(query), thumbnail(query), m) for query, m in zip(queries, matches, strict=True)
        ],
        thumbnail=collection.thumbnail,
    )
