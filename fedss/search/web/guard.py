"""What the page accepts: from which hosts, under which names, how much, which images."""

import errno
import io
import ipaddress
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import urlsplit

from fedss.data.decoding import MAX_PIXELS, PixelLimitError, open_image, quiet_pillow
from fedss.errors import ConfigError, DataError
from fedss.inference.embedding import class_name
from fedss.inference.pixels import Read, read_images
from fedss.models import Embedder
from fedss.search.classes import Threshold
from fedss.search.web import lacks_server

try:
    from starlette.datastructures import Headers, MutableHeaders, UploadFile
    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
except ImportError as error:
    raise lacks_server(error) from error

MOST_IMAGES = 20
"""Images of one enrolment, at most."""
LONGEST_NAME = 200
_JOINERS = "\N{ZERO WIDTH NON-JOINER}\N{ZERO WIDTH JOINER}"  # of Persian, Indic scripts, emoji
_FRAMING = 64 * 1024  # bytes of an upload beside its images: headers of its parts, a class's name

# What a file of each kind begins with. Pillow knows more, and has some of them decoded by other
# programs (EPS by Ghostscript): not what a web page sends.
_BEGINNINGS = re.compile(
    rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|GIF8[79]a|BM|II\*\0|MM\0\*|RIFF....WEBP", re.DOTALL
)
_KINDS = {
    b"\x89P": "image/png",
    b"\xff\xd8": "image/jpeg",
    b"GI": "image/gif",
    b"BM": "image/bmp",
    b"II": "image/tiff",
    b"MM": "image/tiff",
    b"RI": "image/webp",
}
_NO_IMAGE = "is not an image that can be read here: expected PNG, JPEG, WebP, GIF, BMP or TIFF"


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
    """What a page takes. A class is named from ``threshold`` on, which was ``measured``, or else
    comes from the command line; None: nothing is said of that."""

    picture_bytes: int = 20_000_000
    threshold: float | None = None
    measured: Threshold | None = None
    picture_pixels: int = 25_000_000  # decoding takes up to 18 bytes each; a small file has many


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


class Upload(NamedTuple):
    """A file of a form."""

    name: str
    content: bytes


class TooLargeError(OSError):
    """An upload over the limit. An OSError, so that starlette closes the files it has begun."""


class Guard:
    """What holds for every request, whatever its route.

    - The Host header must name this machine. A web page elsewhere can make a name of its own
      resolve to 127.0.0.1 (DNS rebinding), and would then read our answers as its own; but it has
      to ask under that name. Starlette's TrustedHostMiddleware knows no IPv6 addresses, and no way
      to say "any address, but these names only".
    - What changes something must come from our own page, or from no page at all (curl).
    - Reading an upload ends where it is over the limit, whatever its header said.
    """

    def __init__(self, app: ASGIApp, names: frozenset[str], limits: Limits) -> None:
        self._app, self._names, self._limits = app, names, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or let the page do so."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        images = {"/search": 1, "/enrol": MOST_IMAGES}.get(scope["path"], 0)
        limit, read = images * self._limits.picture_bytes + _FRAMING, 0

        async def limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > limit:
                raise TooLargeError
            return message

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        refused = self._refusal(scope["method"], Headers(scope=scope))
        await (refused or self._app)(scope, limited, with_headers)

    def _refusal(self, method: str, headers: Headers) -> Response | None:
        host = headers.get("host", "")
        if not self._is_ours(host):
            return json_error(
                403,
                f"this page is not served under the name {host!r}: open it at the address that "
                "fedss serve has printed",
            )
        origin = headers.get("origin")
        if method not in ("GET", "HEAD") and origin is not None and _netloc(origin) != host.lower():
            return json_error(403, "only this server's own page may change or upload anything")
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


async def read_form(request: Request, limits: Limits, most: int) -> tuple[str, list[Upload]]:
    """The field ``name`` of a form and the files of its field ``picture``, one or more."""
    async with request.form(max_files=most, max_fields=1, max_part_size=_FRAMING) as form:
        uploads: list[Upload] = []
        for file in form.getlist("picture"):
            if not isinstance(file, UploadFile):
                raise HTTPException(400, "picture: expected a file, got text")
            # Of a path that a program has sent, the file's name.
            name = re.split(r"[/\\]", file.filename or "")[-1] or f"image {len(uploads) + 1}"
            content = await file.read(limits.picture_bytes + 1)
            if len(content) > limits.picture_bytes:
                raise HTTPException(413, f"{name} is too large. {too_large(limits)}")
            uploads.append(Upload(name, content))
        name = form.get("name", "")
        if not uploads:
            raise HTTPException(400, "picture: expected a form with a file in this field, got none")
        return name if isinstance(name, str) else "", uploads


def read_uploads(embedder: Embedder, uploads: Sequence[Upload], limits: Limits) -> list[Read]:
    """What was sent, embedded, with thumbnails; nothing of it is stored.

    Raises:
        HTTPException: it is no image, too large, or cannot be read (named, and why).
    """
    for upload in uploads:
        if not upload.content:
            raise HTTPException(415, f"{upload.name} is empty")
        if not _BEGINNINGS.match(upload.content):
            raise HTTPException(415, f"{upload.name} {_NO_IMAGE}")
        try:
            with quiet_pillow():
                open_image(io.BytesIO(upload.content), limits.picture_pixels)
        except PixelLimitError as error:
            raise HTTPException(
                413,
                f"{upload.name} has {error}; fedss serve --max-upload-megapixels sets the limit",
            ) from error
        except Exception:
            continue  # What else is wrong with it is said below.
    files, broken = [io.BytesIO(upload.content) for upload in uploads], dict[int, str]()
    blocks = read_images(embedder, files, thumbnails=True, broken=broken)
    images = [read for block in blocks for read in block]
    for position, reason in broken.items():
        raise HTTPException(415, f"{uploads[position].name} cannot be read: {reason}")
    return images


def check_name(text: str) -> str:
    """A class's name as a page sends it.

    Raises:
        DataError: there is none, or it has letters that cannot be seen.
    """
    name = class_name(" ".join(text.split())) or ""
    visible = all(letter.isprintable() or letter in _JOINERS for letter in name)
    if not name or not visible or len(name) > LONGEST_NAME:
        raise DataError(
            f"the name of a class: expected 1 to {LONGEST_NAME} characters that can be seen, "
            f"got {len(name)}: {name[:40]!r}"
        )
    return name


def json_error(status: int, why: str) -> Response:
    """A mistake as the page's script expects it."""
    return JSONResponse({"error": why}, status)


def image_kind(beginning: bytes) -> str | None:
    """The media type of an image file, told from its first 12 bytes; None: it is no image."""
    if beginning[4:8] == b"ftyp":
        return "image/heic"
    start = _BEGINNINGS.match(beginning)
    return None if start is None else _KINDS[start[0][:2]]


def too_large(limits: Limits) -> str:
    """What to say of an upload over the limit."""
    return (
        f"An image may have {limits.picture_bytes / 1e6:g} MB, and {MOST_IMAGES} can be sent "
        "at once; fedss serve --max-upload-mb sets the limit"
    )
