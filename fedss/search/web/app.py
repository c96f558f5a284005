"""The page's routes, and what they answer with: search, browse, enrol.

The routes are few and fixed. Images are asked for by number and classes by name: no request names
a file. What the page's script asks for is answered in JSON, mistakes as
``{"error": "what is wrong and what to do"}``.
"""

import asyncio
import re
import socket
import threading
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from fedss.errors import FedssError, RunFolderError
from fedss.inference.pixels import Read
from fedss.search.classes import identify, keep, remove
from fedss.search.collection import ENROLLED, INDEX, Collection, Match, reopen
from fedss.search.store import file_fingerprint
from fedss.search.web import lacks_server
from fedss.search.web.guard import (
    LONGEST_NAME,
    MOST_IMAGES,
    Guard,
    Limits,
    TooLargeError,
    Upload,
    check_name,
    image_kind,
    is_loopback,
    json_error,
    read_form,
    read_uploads,
    too_large,
)
from fedss.text import encodable

try:
    import uvicorn
    from python_multipart.exceptions import FormParserError
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import FileResponse, JSONResponse, Response
    from starlette.routing import Route
except ImportError as error:
    raise lacks_server(error) from error

T = TypeVar("T")

_PER_PAGE = 60
_SAMPLE = 24
_MOST_NEIGHBOURS = 200
_SHOWN_BY_BROWSERS = ("image/png", "image/jpeg", "image/gif", "image/webp", "image/bmp")
_STATIC = Path(__file__).parent / "static"


def serve(
    collection: Collection, title: str, listener: socket.socket, host: str, limits: Limits
) -> None:
    """Answer on ``listener`` until the process is interrupted (KeyboardInterrupt).

    Requests under the name ``host`` are answered, and under ``localhost``, this machine's name
    (unless on loopback) and any address.
    """
    names = {"localhost", host.lower()}
    if not is_loopback(listener):
        names.add(socket.gethostname().lower())
    app = make_app(collection, title, frozenset(names), limits)
    settings = uvicorn.Config(
        app,
        log_level="warning",
        lifespan="off",
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=2,
    )
    uvicorn.Server(settings).run(sockets=[listener])


def make_app(
    collection: Collection, title: str, names: frozenset[str], limits: Limits
) -> Starlette:
    """The page and what it asks for, as an ASGI application.

    ``GET`` ``/``, ``/about``, ``/sample``, ``/thumbnail/N``, ``/original/N``,
    ``/neighbours/N?count``, ``/classes?contains&page``, ``/pictures?class&page``, ``/enrolled``;
    ``POST`` ``/search?count`` (a form with ``picture``), ``/enrol`` (a form with ``name`` and
    ``picture``, several times); ``DELETE`` ``/enrolled?name``. Requests under another than this
    machine's ``names`` are refused.
    """
    site, decoding = _Site(collection, title, limits), asyncio.Lock()

    def answer(work: Callable[[Request], Any]) -> Callable[[Request], Response]:
        return lambda request: JSONResponse(work(request))

    async def read(uploads: Sequence[Upload]) -> list[Read]:
        # One upload at a time, so that memory is bounded; whoever sends none need not wait.
        async with decoding:
            return await run_in_threadpool(read_uploads, collection.embedder, uploads, limits)

    async def search(request: Request) -> Response:
        count = _number(request, "count", 24, _MOST_NEIGHBOURS)
        _, uploads = await read_form(request, limits, most=1)
        (query,) = await read(uploads)
        return JSONResponse(await run_in_threadpool(site.search, query, count))

    async def enrol_class(request: Request) -> Response:
        name, uploads = await read_form(request, limits, most=MOST_IMAGES)
        name, names = check_name(name), [upload.name for upload in uploads]
        images = await read(uploads)
        return JSONResponse(await run_in_threadpool(site.enrol, name, images, names))

    def file(name: str, request: Request) -> Response:
        return FileResponse(_STATIC / name)

    return Starlette(
        routes=[
            Route("/", partial(file, "server.html")),
            Route("/server.css", partial(file, "server.css")),
            Route("/server.js", partial(file, "server.js")),
            Route("/about", answer(site.about)),
            Route("/sample", answer(site.sample)),
            Route("/thumbnail/{position:int}", site.thumbnail),
            Route("/original/{position:int}", site.original),
            Route("/neighbours/{position:int}", answer(site.neighbours)),
            Route("/classes", answer(site.classes)),
            Route("/pictures", answer(site.images)),
            Route("/enrolled", answer(site.enrolled)),
            Route("/enrolled", answer(site.remove), methods=["DELETE"]),
            Route("/search", search, methods=["POST"]),
            Route("/enrol", enrol_class, methods=["POST"]),
        ],
        middleware=[Middleware(Guard, names=names, limits=limits)],
        exception_handlers={
            HTTPException: _http_error,
            FedssError: lambda request, error: json_error(400, str(error)),
            RunFolderError: lambda request, error: json_error(503, str(error)),
            FormParserError: lambda request, error: json_error(400, f"not a form: {error}"),
            ClientDisconnect: lambda request, error: Response(status_code=400),
            TooLargeError: lambda request, error: json_error(413, too_large(limits)),
            Exception: lambda request, error: json_error(
                500, f"{type(error).__name__}: fedss serve has printed what went wrong"
            ),
        },
    )


class _Site:
    """What the routes answer with. One request at a time works with the collection."""

    def __init__(self, collection: Collection, title: str, limits: Limits) -> None:
        self._title, self._limits = title, limits
        self._lock = threading.Lock()
        self._files = [collection.folder / name for name in (INDEX, ENROLLED)]
        self._show(collection)

    def _show(self, collection: Collection) -> None:
        self._fingerprints = [*map(file_fingerprint, self._files)]
        self._collection = collection
        last_first = reversed([*enumerate(collection.labels)])
        self._firsts = {label: at for at, label in last_first if label is not None}
        # The names of files need not be text, but what a page sends back is.
        self._labels = {_shown(label): label for label in sorted(self._firsts, key=_natural)}

    @contextmanager
    def _current(self) -> Iterator[Collection]:
        """The collection as it is now, for one alone: other processes may index and enrol, too."""
        with self._lock:
            if [*map(file_fingerprint, self._files)] != self._fingerprints:
                self._show(reopen(self._collection))
            yield self._collection

    def about(self, request: Request) -> dict[str, Any]:
        measured = self._limits.measured
        with self._current() as collection:
            note = "" if measured is None else measured.worth(len(collection.classes))
            return {
                "title": self._title,
                "pictures": len(collection),
                "classes": len(collection.classes),
                "unlabelled": sum(label is None for label in collection.labels),
                "limit_bytes": self._limits.picture_bytes,
                "most_pictures": MOST_IMAGES,
                "longest_name": LONGEST_NAME,
                "threshold_note": note,
            }

    def sample(self, request: Request) -> dict[str, Any]:
        with self._current() as collection:
            count = min(_SAMPLE, len(collection))
            images = [self._image(collection, i * len(collection) // count) for i in range(count)]
            return {"pictures": images}

    def thumbnail(self, request: Request) -> Response:
        with self._current() as collection:
            position = self._checked(collection, request.path_params["position"])
            return Response(collection.thumbnail(position), media_type="image/jpeg")

    def original(self, request: Request) -> Response:
        """The indexed file as it is: shown if browsers know its kind, else to be saved."""
        with self._current() as collection:
            position = self._checked(collection, request.path_params["position"])
            path, name = collection.path(position), _shown(Path(collection.names[position]).name)
        kind = None
        if path is not None and path.is_file():
            with path.open("rb") as file:
                kind = image_kind(file.read(12))
        if path is None or kind is None:
            raise HTTPException(404, f"{name}: the file of this image is not there (any more)")
        shown = kind in _SHOWN_BY_BROWSERS
        way = "inline" if shown else "attachment"
        return FileResponse(path, media_type=kind, filename=name, content_disposition_type=way)

    def neighbours(self, request: Request) -> dict[str, Any]:
        count = _number(request, "count", 24, _MOST_NEIGHBOURS)
        with self._current() as collection:
            position = self._checked(collection, request.path_params["position"])
            (matches,) = collection.search(collection.vectors_ND[position][None], count + 1)
            others = [match for match in matches if match.position != position][:count]
            return {
                "query": self._image(collection, position),
                "neighbours": [self._match(collection, match) for match in others],
                "identity": None,
                "copy": None,
            }

    def search(self, query: Read, count: int) -> dict[str, Any]:
        query_1D, threshold = torch.from_numpy(query.vector_D)[None], self._limits.threshold
        with self._current() as collection:
            (matches,) = collection.search(query_1D, count)
            identity = None
            if collection.classes:
                (who,) = identify(collection, query_1D, -1.0 if threshold is None else threshold)
                identity = {
                    "label": None if who.label is None else _shown(who.label),
                    "nearest": _shown(who.nearest),
                    "score": who.score,
                    "threshold": threshold,
                }
            copy = collection.copy_among(query, matches)
            return {
                "neighbours": [self._match(collection, match) for match in matches],
                "identity": identity,
                "copy": None if copy is None else self._image(collection, copy.position),
            }

    def classes(self, request: Request) -> dict[str, Any]:
        wanted = _plain(request.query_params.get("contains", ""))
        with self._current() as collection:
            labels = [label for text, label in self._labels.items() if wanted in _plain(text)]
            page, place = _page(request, labels)
            return {
                "total": len(self._labels),
                "matching": len(labels),
                "classes": [self._class(collection, label) for label in page],
                **place,
            }

    def images(self, request: Request) -> dict[str, Any]:
        with self._current() as collection:
            name = request.query_params.get("class", "")
            if name not in self._labels:
                raise HTTPException(404, f"no class {name!r} in this collection")
            label = self._labels[name]
            some, place = _page(request, collection.images_of(label))
            images = [self._image(collection, position) for position in some]
            return {**self._class(collection, label), "pictures": images, **place}

    def enrolled(self, request: Request) -> dict[str, Any]:
        with self._current() as collection:
            classes = [
                {**self._class(collection, label), "count": collection.enrolled[label]}
                for label in sorted(collection.enrolled, key=_natural)
            ]
            return {"classes": classes}

    def enrol(self, name: str, images: Sequence[Read], names: Sequence[str]) -> dict[str, Any]:
        with self._current() as collection:
            label = self._labels.get(name, name)
            now = keep(collection, label, images, names)
            self._show(now)
            # The last one of the class: its first images may lie in the index.
            position = max(now.images_of(label))
            return {"name": _shown(label), "count": len(images), "position": position}

    def remove(self, request: Request) -> dict[str, Any]:
        with self._current() as collection:
            name = request.query_params.get("name", "")
            self._show(remove(collection, self._labels.get(name, name)))
            return {"removed": name}

    def _checked(self, collection: Collection, position: int) -> int:
        if position >= len(collection):
            raise HTTPException(404, f"no image {position}: there are {len(collection)}, from 0 on")
        return position

    def _image(self, collection: Collection, position: int) -> dict[str, Any]:
        label = collection.labels[position]
        return {
            "position": position,
            "name": _shown(collection.names[position]),
            "label": None if label is None else _shown(label),
            "enrolled": position >= collection.indexed,
        }

    def _match(self, collection: Collection, match: Match) -> dict[str, Any]:
        return {**self._image(collection, match.position), "score": match.score}

    def _class(self, collection: Collection, label: str) -> dict[str, Any]:
        return {
            "name": _shown(label),
            "count": collection.classes[label],
            "enrolled": label in collection.enrolled,
            "position": self._firsts[label],
        }


def _page(request: Request, items: Sequence[T]) -> tuple[Sequence[T], dict[str, int]]:
    pages = max(1, -(-len(items) // _PER_PAGE))
    page = min(_number(request, "page", 1, 10**9), pages)
    return items[(page - 1) * _PER_PAGE : page * _PER_PAGE], {"page": page, "pages": pages}


def _number(request: Request, name: str, default: int, most: int) -> int:
    text = request.query_params.get(name, str(default))
    if not re.fullmatch(r"[0-9]{1,9}", text) or not 1 <= int(text) <= most:
        raise HTTPException(400, f"{name}: expected a number from 1 to {most}, got {text[:40]!r}")
    return int(text)


def _shown(name: str) -> str:
    """A name as a page can show it: file names of Linux need not be text."""
    return encodable(name, "utf-8")


def _folded(name: str) -> str:
    return unicodedata.normalize("NFKC", name).casefold()


def _plain(name: str) -> str:
    """Without case and accents: "cafe" finds "Café"."""
    apart = unicodedata.normalize("NFKD", _folded(name))
    return "".join(c for c in apart if not unicodedata.combining(c))


def _natural(name: str) -> list[tuple[int, int, str]]:
    """For sorting as people do: "class 2" before "class 10"."""
    parts = re.split(r"([0-9]{1,18})", _folded(name))
    return [(0, int(part), "") if i % 2 else (1, 0, part) for i, part in enumerate(parts)]


def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    why = {404: f"nothing at {request.url.path}", 405: f"{request.method} is not for this path"}
    plain = error.detail in ("Not Found", "Method Not Allowed")
    return JSONResponse(
        {"error": why[error.status_code] if plain else error.detail},
        error.status_code,
        headers=error.headers,
    )
