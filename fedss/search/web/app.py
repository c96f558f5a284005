"""A collection as a web page of this machine: search, browse, enrol.

The routes are few and fixed. Pictures are asked for by number and classes by name: no request
names a file. What the page's script asks for is answered in JSON, mistakes as
``{"error": "what is wrong and what to do"}``.
"""

import asyncio
import errno
import io
import ipaddress
import os
import re
import socket
import threading
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import torch

from fedss.data.decoding import MAX_PIXELS, PixelLimitError, open_picture, quiet_pillow
from fedss.errors import ConfigError, DataError, FedssError, RunFolderError
from fedss.inference.embedding import class_name
from fedss.inference.pixels import Read, read_pictures
from fedss.models import Embedder
from fedss.search.classes import Threshold, identify, keep, remove
from fedss.search.collection import ENROLLED, INDEX, Collection, Match, reopen

try:
    import uvicorn
    from python_multipart.exceptions import FormParserError
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.datastructures import Headers, MutableHeaders, UploadFile
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import FileResponse, JSONResponse, Response
    from starlette.routing import Route
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
except ImportError as error:
    raise ConfigError(
        f'fedss serve needs a web server ({error}): pip install "fedss[serve]"'
    ) from error

T = TypeVar("T")

MOST_PICTURES = 20
"""Pictures of one enrolment, at most."""
_PER_PAGE = 60
_SAMPLE = 24
_MOST_NEIGHBOURS = 200
_LONGEST_NAME = 200
_JOINERS = "\N{ZERO WIDTH NON-JOINER}\N{ZERO WIDTH JOINER}"  # of Persian, Indic scripts, emoji
_FRAMING = 64 * 1024  # bytes of an upload beside its pictures: headers of its parts, a class's name

# What a file of each kind begins with. Pillow knows more, and has some of them decoded by other
# programs (EPS by Ghostscript): not what a web page sends.
_BEGINNINGS = re.compile(
    rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|GIF8[79]a|BM|II\*\0|MM\0\*|RIFF....WEBP", re.DOTALL
)
_NO_PICTURE = "is not a picture that can be read here: expected PNG, JPEG, WebP, GIF, BMP or TIFF"

_HERE = Path(__file__).parent / "static"
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


@dataclass(frozen=True)
class Limits:
    """What a page takes.

    Attributes:
        picture_bytes: the largest picture.
        threshold: the least cosine at which a class is named; None: nothing is said of that.
        measured: where the threshold comes from; None: from the command line.
        picture_pixels: the picture of most pixels. Decoding takes up to 18 bytes for each, and a
            file of few bytes may have very many.
    """

    picture_bytes: int = 20_000_000
    threshold: float | None = None
    measured: Threshold | None = None
    picture_pixels: int = 25_000_000


def make_limits(
    max_upload_mb: float,
    threshold: float | None = None,
    measured: Threshold | None = None,
    max_upload_megapixels: float = 25.0,
) -> Limits:
    """Checked limits, with a threshold as given, or else as an evaluation has measured it.

    Raises:
        ConfigError: a size or a threshold out of range.
    """
    if not 0.001 <= max_upload_mb <= 1000:
        raise ConfigError(f"--max-upload-mb: expected 0.001 to 1000, got {max_upload_mb:g}")
    most = MAX_PIXELS / 1e6
    if not 0.01 <= max_upload_megapixels <= most:
        raise ConfigError(
            f"--max-upload-megapixels: expected 0.01 to {most:g}, got {max_upload_megapixels:g}"
        )
    if threshold is not None and not -1.0 <= threshold <= 1.0:
        raise ConfigError(f"--threshold: expected a cosine from -1 to 1, got {threshold:g}")
    size, pixels = round(max_upload_mb * 1e6), round(max_upload_megapixels * 1e6)
    if threshold is not None or measured is None:
        return Limits(size, threshold, None, pixels)
    return Limits(size, measured.threshold, measured, pixels)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0: any that is free.

    Raises:
        ConfigError: the port is in use or not allowed, or the address is not this machine's.
    """
    if not 0 <= port <= 65535:
        raise ConfigError(f"--port: expected a number from 0 (any free one) to 65535, got {port}")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address, family=family)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"--port {port} of {host} is in use by another program, perhaps another fedss "
                "serve: choose another port, or --port 0 for any that is free"
            ) from error
        if error.errno == errno.EACCES:
            raise ConfigError(
                f"--port {port}: not allowed for you ({error.strerror}): choose one from 1024 on"
            ) from error
        raise ConfigError(
            f"--host {host}: this machine cannot listen there ({error.strerror or error}): leave "
            "it out to serve this machine alone, or give an address of this machine"
        ) from error
    except UnicodeError as error:
        raise ConfigError(f"--host {host!r}: not the name of a host") from error


def is_loopback(listener: socket.socket) -> bool:
    """Whether only this machine reaches a socket."""
    return ipaddress.ip_address(listener.getsockname()[0].split("%")[0]).is_loopback


def address_of(listener: socket.socket) -> str:
    """The page's address, to be opened in a browser on this machine."""
    host, port = listener.getsockname()[:2]
    if ipaddress.ip_address(host.split("%")[0]).is_unspecified:
        host = "::1" if ":" in host else "127.0.0.1"
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


def serve(
    collection: Collection, title: str, listener: socket.socket, host: str, limits: Limits
) -> None:
    """Answer on ``listener`` until the process is interrupted (KeyboardInterrupt).

    Args:
        collection: what is shown and searched; enrolling and removing change its folder.
        title: what to call it on the page.
        listener: from ``listen``.
        host: the name it was asked for: requests under this name are answered, and under
            ``localhost``, this machine's name (unless on loopback) and any address.
        limits: what it takes.
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

    ``GET`` ``/``, ``/about``, ``/sample``, ``/thumbnail/N``, ``/neighbours/N?count``,
    ``/classes?contains&page``, ``/pictures?class&page``, ``/enrolled``; ``POST`` ``/search?count``
    (a form with ``picture``), ``/enrol`` (a form with ``name`` and ``picture``, several times);
    ``DELETE`` ``/enrolled?name``.

    Args:
        collection: what is shown and searched.
        title: what to call it on the page.
        names: of this machine, in requests; any other name is refused, any address is not.
        limits: what it takes.
    """
    site, decoding = _Site(collection, title, limits), asyncio.Lock()

    def most_bytes(path: str) -> int:
        pictures = {"/search": 1, "/enrol": MOST_PICTURES}.get(path, 0)
        return pictures * limits.picture_bytes + _FRAMING

    def answer(work: Callable[[Request], Any]) -> Callable[[Request], Response]:
        return lambda request: JSONResponse(work(request))

    async def read(uploads: Sequence[_Upload]) -> list[Read]:
        # One upload at a time, so that memory is bounded; whoever sends none need not wait.
        async with decoding:
            return await run_in_threadpool(_read, collection.embedder, uploads, limits)

    async def search(request: Request) -> Response:
        count = _number(request, "count", 24, _MOST_NEIGHBOURS)
        _, uploads = await _form(request, limits, most=1)
        (query,) = await read(uploads)
        return JSONResponse(await run_in_threadpool(site.search, query, count))

    async def enrol_class(request: Request) -> Response:
        name, uploads = await _form(request, limits, most=MOST_PICTURES)
        name, names = _new_name(name), [upload.name for upload in uploads]
        pictures = await read(uploads)
        return JSONResponse(await run_in_threadpool(site.enrol, name, pictures, names))

    def file(name: str, request: Request) -> Response:
        return FileResponse(_HERE / name)

    def thumbnail(request: Request) -> Response:
        return Response(site.thumbnail(request.path_params["position"]), media_type="image/jpeg")

    return Starlette(
        routes=[
            Route("/", partial(file, "server.html")),
            Route("/server.css", partial(file, "server.css")),
            Route("/server.js", partial(file, "server.js")),
            Route("/about", answer(site.about)),
            Route("/sample", answer(site.sample)),
            Route("/thumbnail/{position:int}", thumbnail),
            Route("/neighbours/{position:int}", answer(site.neighbours)),
            Route("/classes", answer(site.classes)),
            Route("/pictures", answer(site.pictures)),
            Route("/enrolled", answer(site.enrolled)),
            Route("/enrolled", answer(site.remove), methods=["DELETE"]),
            Route("/search", search, methods=["POST"]),
            Route("/enrol", enrol_class, methods=["POST"]),
        ],
        middleware=[Middleware(_Guard, names=names, most_bytes=most_bytes)],
        exception_handlers={
            HTTPException: _http_error,
            FedssError: lambda request, error: _refused(400, str(error)),
            RunFolderError: lambda request, error: _refused(503, str(error)),
            FormParserError: lambda request, error: _refused(400, f"not a form: {error}"),
            ClientDisconnect: lambda request, error: Response(status_code=400),
            _TooLargeError: lambda request, error: _too_large(limits),
            Exception: lambda request, error: _refused(
                500, f"{type(error).__name__}: fedss serve has printed what went wrong"
            ),
        },
    )


@dataclass(frozen=True)
class _Upload:
    name: str
    content: bytes


class _Site:
    """What the routes answer with. One request at a time works with the collection."""

    def __init__(self, collection: Collection, title: str, limits: Limits) -> None:
        self._title, self._limits = title, limits
        self._lock = threading.Lock()
        self._files = [collection.folder / name for name in (INDEX, ENROLLED)]
        self._show(collection)

    def _show(self, collection: Collection) -> None:
        self._stamps = _stamps(self._files)
        self._collection = collection
        self._firsts = {}
        for position in reversed(range(len(collection))):
            label = collection.labels[position]
            if label is not None:
                self._firsts[label] = position
        # The names of files need not be text, but what a page sends back is.
        self._labels = {_text(label): label for label in sorted(self._firsts, key=_natural)}

    def _with_collection(self, work: Callable[[Collection], T]) -> T:
        """``work`` on the collection as it is now: other processes may index and enrol, too."""
        with self._lock:
            if _stamps(self._files) != self._stamps:
                self._show(reopen(self._collection))
            return work(self._collection)

    def about(self, request: Request) -> dict[str, Any]:
        return self._with_collection(
            lambda there: {
                "title": self._title,
                "pictures": len(there),
                "classes": len(there.classes),
                "unlabelled": sum(label is None for label in there.labels),
                "limit_bytes": self._limits.picture_bytes,
                "most_pictures": MOST_PICTURES,
                "longest_name": _LONGEST_NAME,
                "threshold_note": self._threshold_note(len(there.classes)),
            }
        )

    def _threshold_note(self, classes: int) -> str:
        measured = self._limits.measured
        return "" if measured is None else measured.worth(classes)

    def sample(self, request: Request) -> dict[str, Any]:
        def some(there: Collection) -> list[dict[str, Any]]:
            count = min(_SAMPLE, len(there))
            return [self._picture(there, i * len(there) // count) for i in range(count)]

        return {"pictures": self._with_collection(some)}

    def thumbnail(self, position: int) -> bytes:
        def small(there: Collection) -> bytes:
            return there.thumbnail(self._checked(there, position))

        return self._with_collection(small)

    def neighbours(self, request: Request) -> dict[str, Any]:
        count = _number(request, "count", 24, _MOST_NEIGHBOURS)

        def near(there: Collection) -> dict[str, Any]:
            position = self._checked(there, request.path_params["position"])
            (found,) = there.search(there.vectors_ND[position][None], count + 1)
            others = [match for match in found if match.position != position][:count]
            return {
                "query": self._picture(there, position),
                "neighbours": [self._match(there, match) for match in others],
                "identity": None,
            }

        return self._with_collection(near)

    def search(self, query: Read, count: int) -> dict[str, Any]:
        limits, query_1D = self._limits, torch.from_numpy(query.vector_D)[None]

        def near(there: Collection) -> dict[str, Any]:
            (found,) = there.search(query_1D, count)
            identity = None
            if there.classes:
                least = -1.0 if limits.threshold is None else limits.threshold
                (who,) = identify(there, query_1D, least)
                identity = {
                    "label": None if who.label is None else _text(who.label),
                    "nearest": _text(who.nearest),
                    "score": who.score,
                    "threshold": limits.threshold,
                }
            return {
                "neighbours": [self._match(there, match) for match in found],
                "identity": identity,
            }

        return self._with_collection(near)

    def classes(self, request: Request) -> dict[str, Any]:
        wanted = _folded(request.query_params.get("contains", ""))

        def matching(there: Collection) -> dict[str, Any]:
            labels = [label for text, label in self._labels.items() if wanted in _folded(text)]
            some, place = _page(request, labels)
            return {
                "total": len(self._labels),
                "matching": len(labels),
                "classes": [self._class(there, label) for label in some],
                **place,
            }

        return self._with_collection(matching)

    def pictures(self, request: Request) -> dict[str, Any]:
        def of_class(there: Collection) -> dict[str, Any]:
            label = self._label(request.query_params.get("class", ""))
            some, place = _page(request, there.pictures_of(label))
            pictures = [self._picture(there, position) for position in some]
            return {**self._class(there, label), "pictures": pictures, **place}

        return self._with_collection(of_class)

    def enrolled(self, request: Request) -> dict[str, Any]:
        def of_all(there: Collection) -> list[dict[str, Any]]:
            return [
                {**self._class(there, label), "count": there.enrolled[label]}
                for label in sorted(there.enrolled, key=_natural)
            ]

        return {"classes": self._with_collection(of_all)}

    def enrol(self, name: str, pictures: Sequence[Read], names: Sequence[str]) -> dict[str, Any]:
        def add(there: Collection) -> dict[str, Any]:
            label = self._labels.get(name, name)
            now = keep(there, label, pictures, names)
            self._show(now)
            # The last one of the class: its first pictures may lie in the index.
            return {
                "name": _text(label),
                "count": len(pictures),
                "position": max(now.pictures_of(label)),
            }

        return self._with_collection(add)

    def remove(self, request: Request) -> dict[str, Any]:
        def take_out(there: Collection) -> dict[str, Any]:
            name = request.query_params.get("name", "")
            self._show(remove(there, self._labels.get(name, name)))
            return {"removed": name}

        return self._with_collection(take_out)

    def _checked(self, there: Collection, position: int) -> int:
        if position >= len(there):
            raise HTTPException(404, f"no picture {position}: there are {len(there)}, from 0 on")
        return position

    def _label(self, name: str) -> str:
        if name not in self._labels:
            raise HTTPException(404, f"no class {name!r} in this collection")
        return self._labels[name]

    def _picture(self, there: Collection, position: int) -> dict[str, Any]:
        label = there.labels[position]
        return {
            "position": position,
            "name": _text(there.names[position]),
            "label": None if label is None else _text(label),
            "enrolled": position >= there.indexed,
        }

    def _match(self, there: Collection, match: Match) -> dict[str, Any]:
        return {**self._picture(there, match.position), "score": match.score}

    def _class(self, there: Collection, label: str) -> dict[str, Any]:
        return {
            "name": _text(label),
            "count": there.classes[label],
            "enrolled": label in there.enrolled,
            "position": self._firsts[label],
        }


class _TooLargeError(OSError):
    """An upload over the limit. An OSError, so that starlette closes the files it has begun."""


class _Guard:
    """What holds for every request, whatever its route.

    - The Host header must name this machine. A web page elsewhere can make a name of its own
      resolve to 127.0.0.1 (DNS rebinding), and would then read our answers as its own; but it has
      to ask under that name. Starlette's TrustedHostMiddleware knows no IPv6 addresses, and no way
      to say "any address, but these names only".
    - What changes something must come from our own page, or from no page at all (curl).
    - Reading an upload ends where it is over the limit, whatever its header said.
    """

    def __init__(
        self, app: ASGIApp, names: frozenset[str], most_bytes: Callable[[str], int]
    ) -> None:
        self._app, self._names, self._most_bytes = app, names, most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit, read = self._most_bytes(scope["path"]), 0

        async def limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > limit:
                raise _TooLargeError
            return message

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        refusal = self._refusal(scope["method"], Headers(scope=scope))
        await (refusal or self._app)(scope, limited, with_headers)

    def _refusal(self, method: str, headers: Headers) -> Response | None:
        host = headers.get("host", "")
        if not self._is_ours(host):
            return _refused(
                403,
                f"this page is not served under the name {host!r}: open it at the address that "
                "fedss serve has printed",
            )
        origin = headers.get("origin")
        if method not in ("GET", "HEAD") and origin is not None and _netloc(origin) != host.lower():
            return _refused(403, "only this server's own page may change or upload anything")
        return None

    def _is_ours(self, host: str) -> bool:
        name = ""
        try:
            name = urlsplit(f"//{host}").hostname or ""
            ipaddress.ip_address(name)
        except ValueError:
            return name in self._names
        return True


def _netloc(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


async def _form(request: Request, limits: Limits, most: int) -> tuple[str, list[_Upload]]:
    """The field ``name`` of a form and the files of its field ``picture``, one or more."""
    async with request.form(max_files=most, max_fields=1, max_part_size=_FRAMING) as form:
        uploads: list[_Upload] = []
        for file in form.getlist("picture"):
            if not isinstance(file, UploadFile):
                raise HTTPException(400, "picture: expected a file, got text")
            # Of a path that a program has sent, the file's name.
            name = re.split(r"[/\\]", file.filename or "")[-1] or f"picture {len(uploads) + 1}"
            content = await file.read(limits.picture_bytes + 1)
            if len(content) > limits.picture_bytes:
                raise HTTPException(413, f"{name} is too large. {_too_large_text(limits)}")
            uploads.append(_Upload(name, content))
        name = form.get("name", "")
        if not uploads:
            raise HTTPException(400, "picture: expected a form with a file in this field, got none")
        return name if isinstance(name, str) else "", uploads


def _read(embedder: Embedder, uploads: Sequence[_Upload], limits: Limits) -> list[Read]:
    """What was sent, embedded, with thumbnails; nothing of it is stored.

    Raises:
        HTTPException: it is no picture, too large, or cannot be read (named, and why).
    """
    for upload in uploads:
        if not upload.content:
            raise HTTPException(415, f"{upload.name} is empty")
        if not _BEGINNINGS.match(upload.content):
            raise HTTPException(415, f"{upload.name} {_NO_PICTURE}")
        try:
            with quiet_pillow():
                open_picture(io.BytesIO(upload.content), limits.picture_pixels)
        except PixelLimitError as error:
            raise HTTPException(
                413,
                f"{upload.name} has {error}; fedss serve --max-upload-megapixels sets the limit",
            ) from error
        except Exception:
            continue  # What else is wrong with it is said below.
    files, broken = [io.BytesIO(upload.content) for upload in uploads], dict[int, str]()
    blocks = read_pictures(embedder, files, thumbnails=True, broken=broken)
    pictures = [read for block in blocks for read in block]
    for position, reason in broken.items():
        raise HTTPException(415, f"{uploads[position].name} cannot be read: {reason}")
    return pictures


def _new_name(text: str) -> str:
    """A class's name as a page sends it.

    Raises:
        DataError: there is none, or it has letters that cannot be seen.
    """
    name = class_name(" ".join(text.split())) or ""
    visible = all(letter.isprintable() or letter in _JOINERS for letter in name)
    if not name or not visible or len(name) > _LONGEST_NAME:
        raise DataError(
            f"the name of a class: expected 1 to {_LONGEST_NAME} characters that can be seen, "
            f"got {len(name)}: {name[:40]!r}"
        )
    return name


def _page(request: Request, items: Sequence[T]) -> tuple[Sequence[T], dict[str, int]]:
    pages = max(1, -(-len(items) // _PER_PAGE))
    page = min(_number(request, "page", 1, 10**9), pages)
    return items[(page - 1) * _PER_PAGE : page * _PER_PAGE], {"page": page, "pages": pages}


def _number(request: Request, name: str, default: int, most: int) -> int:
    text = request.query_params.get(name, str(default))
    if not re.fullmatch(r"[0-9]{1,9}", text) or not 1 <= int(text) <= most:
        raise HTTPException(400, f"{name}: expected a number from 1 to {most}, got {text[:40]!r}")
    return int(text)


def _stamps(files: Sequence[Path]) -> list[tuple[int, int] | None]:
    stamps: list[tuple[int, int] | None] = []
    for file in files:
        try:
            status = file.stat()
            stamps.append((status.st_mtime_ns, status.st_size))
        except OSError:
            stamps.append(None)
    return stamps


def _text(name: str) -> str:
    """A name as a page can show it: file names of Linux need not be text."""
    return os.fsencode(name).decode("utf-8", "replace")


def _folded(name: str) -> str:
    return unicodedata.normalize("NFKC", name).casefold()


def _natural(name: str) -> list[tuple[int, int, str]]:
    """For sorting as people do: "class 2" before "class 10"."""
    parts = re.split(r"([0-9]{1,18})", _folded(name))
    return [(0, int(part), "") if i % 2 else (1, 0, part) for i, part in enumerate(parts)]


def _refused(status: int, why: str) -> Response:
    return JSONResponse({"error": why}, status)


def _too_large(limits: Limits) -> Response:
    return _refused(413, _too_large_text(limits))


def _too_large_text(limits: Limits) -> str:
    return (
        f"A picture may have {limits.picture_bytes / 1e6:g} MB, and {MOST_PICTURES} can be sent "
        "at once; fedss serve --max-upload-mb sets the limit"
    )


def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    why = {404: f"nothing at {request.url.path}", 405: f"{request.method} is not for this path"}
    plain = error.detail in ("Not Found", "Method Not Allowed")
    return JSONResponse(
        {"error": why[error.status_code] if plain else error.detail},
        error.status_code,
        headers=error.headers,
    )
