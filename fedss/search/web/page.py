"""What a search found, as one HTML file: to be looked at here, or copied from a remote machine."""

import base64
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment

from fedss.inference.pixels import thumbnail
from fedss.search.collection import Collection, Match
from fedss.text import printable

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Nearest images</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root { color-scheme: light dark; }
body { font: 15px/1.4 system-ui, sans-serif; margin: 2rem; }
h2 { font-size: 1rem; margin: 2rem 0 .5rem; overflow-wrap: anywhere; }
ol { display: flex; flex-wrap: wrap; gap: 1rem; list-style: none; padding: 0; margin: 0; }
li { width: 10rem; overflow-wrap: anywhere; }
img { width: 10rem; height: 10rem; object-fit: contain; background: #8882; display: block; }
small { opacity: .7; display: block; }
</style></head><body>
<h1>Nearest images in {{ source }}</h1>
{% for query in queries %}<section><h2>{{ query.name }}</h2>
<ol><li><img src="{{ query.image }}" alt="query"><strong>query</strong></li>
{% for match, image in query.found %}<li><img src="{{ image }}" alt="{{ match.name }}">
<strong>{{ match.label or "" }}</strong> {{ "%.3f" % match.score }}
<small>{{ match.name }}</small></li>
{% endfor %}</ol></section>
{% endfor %}</body></html>
"""


def neighbours_page(
    collection: Collection, queries: Sequence[str | Path], found: Sequence[Sequence[Match]]
) -> str:
    """A page that refers to nothing outside itself.

    Args:
        collection: what was searched.
        queries: image files.
        found: the matches of each, as ``Collection.search`` gives them.
    """
    environment = Environment(autoescape=True, trim_blocks=True)
    return environment.from_string(_PAGE).render(
        source=printable(str(collection.source)),
        queries=[
            {
                "name": printable(str(query)),
                "image": _inline(thumbnail(query)),
                "found": [(_shown(m), _inline(collection.thumbnail(m.position))) for m in matches],
            }
            for query, matches in zip(queries, found, strict=True)
        ],
    )


def _shown(match: Match) -> Match:
    label = None if match.label is None else printable(match.label)
    return Match(match.position, printable(match.name), label, match.score)


def _inline(jpeg: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
