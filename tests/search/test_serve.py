"""The web page of a collection, asked as browsers, programs and attackers ask."""

import http.client
import io
import json
import os
import re
import secrets
import socket
import struct
import threading
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import numpy as np
import pytest
import torch
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import fedss
from fedss.cli import main
from fedss.data.decoding import open_image, quiet_pillow
from fedss.errors import ConfigError
from fedss.evaluation.verification import REJECT_ALL
from fedss.search import Collection, Threshold, build_collection, enrol, open_collection, remove
from fedss.search.web import app as page_app
from fedss.search.web import guard
from tests.serving import COPIES, NAMES, Site, make_site

MEGABYTE = 1_000_000


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        return self.json["error"]


@dataclass(frozen=True)
class Server:
    port: int

    def ask(
        self,
        method: str,
        target: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
        chunked: bool = False,
    ) -> Answer:
        """One request, with the target as it stands: nothing is normalized."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, target, body, headers or {}, encode_chunked=chunked)
            answer = connection.getresponse()
            headers = {name.lower(): value for name, value in answer.getheaders()}
            return Answer(answer.status, headers, answer.read())
        finally:
            connection.close()

    def get(self, path: str, **values: object) -> Answer:
        return self.ask("GET", f"{path}?{urlencode(values)}" if values else path)

    def send(
        self,
        path: str,
        files: Sequence[tuple[str, bytes]],
        headers: dict[str, str] | None = None,
        **fields: str,
    ) -> Answer:
        body, kind = form(files, fields)
        return self.ask("POST", path, body, {"content-type": kind, **(headers or {})})


def form(files: Sequence[tuple[str, bytes]], fields: dict[str, str]) -> tuple[bytes, str]:
    boundary = secrets.token_hex(16)
    start = f'--{boundary}\r\ncontent-disposition: form-data; name="'.encode()
    parts = [start + f'{k}"\r\n\r\n{v}\r\n'.encode() for k, v in fields.items()]
    for name, content in files:
        head = f'picture"; filename="{name}"\r\ncontent-type: image/png\r\n\r\n'.encode()
        parts.append(start + head + content + b"\r\n")
    return b"".join(parts) + f"--{boundary}--\r\n".encode(), (
        f"multipart/form-data; boundary={boundary}"
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return make_site(tmp_path_factory.mktemp("site"))


@contextmanager
def served(collection: Collection, limits: guard.Limits) -> Iterator[Server]:
    listener = guard.listen("127.0.0.1", 0)
    app = page_app.make_app(collection, "a run", frozenset({"localhost"}), limits)
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off", ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield Server(listener.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


@pytest.fixture(scope="module")
def server(site: Site) -> Iterator[Server]:
    with served(site.collection, guard.Limits(MEGABYTE, 0.999)) as server:
        yield server


@pytest.fixture(autouse=True)
def nothing_enrolled_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "site" in request.fixturenames:
        site = request.getfixturevalue("site")
        for label in open_collection(site.run / "index", site.run).enrolled:
            remove(site.collection, label)


def png(seed: int = 0) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (40, 40), np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).save(out, "PNG")
    return out.getvalue()


def huge_png(width: int, height: int) -> bytes:
    """An image of many pixels, said in 60 bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"\0")), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def nearest_by_hand(site: Site, query: Path) -> tuple[list[str], np.ndarray]:
    """Names and cosines of all indexed images, best first, from files alone."""
    model = fedss.load(site.run)
    files = sorted(site.photos.glob("*.png"))
    rows_ND = fedss.embed_files(model, files).embeddings_ND.astype(np.float64)
    query_D = fedss.embed_files(model, [query]).embeddings_ND[0].astype(np.float64)
    cosines_N = rows_ND @ query_D
    order = np.argsort(-cosines_N, kind="stable")
    return [files[i].name for i in order], cosines_N[order]


def test_an_uploaded_image_finds_what_exact_search_finds(site: Site, server: Server) -> None:
    query = site.new / "new-0.png"
    names, cosines = nearest_by_hand(site, query)
    answer = server.send("/search?count=30", [("photo.png", query.read_bytes())]).json
    matches = answer["neighbours"]
    assert [match["name"] for match in matches] == names[:30]
    assert [match["score"] for match in matches] == pytest.approx(list(cosines[:30]), abs=1e-5)
    assert [m["label"] for m in matches] == [NAMES[int(m["name"][:2])] for m in matches]
    assert not any(match["enrolled"] for match in matches)


def test_the_guide_names_the_field_that_is_read(server: Server) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "serve.md").read_text()
    (field,) = set(re.findall(r"files? `(\w+)`", guide)) | set(re.findall(r"curl -F (\w+)=", guide))
    # `send` uses it, and what has none is told its name.
    assert server.send("/search", [("x.png", png())]).status == 200
    assert server.send("/search", []).error.startswith(f"{field}: expected a form")


def test_an_image_of_the_index_is_known_as_its_own(site: Site, server: Server) -> None:
    file = site.photos / "05-2.png"
    answer = server.send("/search?count=5", [("renamed.png", file.read_bytes())]).json
    assert (answer["copy"]["name"], answer["copy"]["label"]) == ("05-2.png", NAMES[5])
    # Almost the same is not the same.
    with Image.open(file) as image:
        pixels = np.array(image)
    pixels[0, 0] ^= 1
    changed = io.BytesIO()
    Image.fromarray(pixels.repeat(2, 0).repeat(2, 1)).save(changed, "PNG")
    assert server.send("/search", [("x.png", changed.getvalue())]).json["copy"] is None
    assert (
        server.send("/search", [("x.png", (site.new / "new-0.png").read_bytes())]).json["copy"]
        is None
    )
    assert server.get("/neighbours/17").json["copy"] is None


def test_the_original_of_an_image_is_its_file(site: Site, server: Server) -> None:
    position, file = site.collection.names.index("05-2.png"), site.photos / "05-2.png"
    content = file.read_bytes()
    answer = server.get(f"/original/{position}")
    assert (answer.status, answer.body) == (200, content)
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["content-disposition"].startswith("inline")
    assert server.get(f"/original/{len(site.collection)}").status == 404
    try:
        # What browsers might run is never sent, whatever has taken the image's place.
        file.write_bytes(b"<script>alert(1)</script>")
        assert server.get(f"/original/{position}").status == 404
        file.write_bytes(b"II*\0" + bytes(20))
        answer = server.get(f"/original/{position}")
        assert answer.headers["content-disposition"].startswith("attachment")
        file.unlink()
        assert (
            "05-2.png: the file of this image is not" in server.get(f"/original/{position}").error
        )
    finally:
        file.write_bytes(content)
    enrolled = enrol(site.collection, "new one", [site.new / "new-0.png"])
    assert server.get(f"/original/{len(enrolled) - 1}").status == 404
    remove(enrolled, "new one")


def test_a_click_on_an_image_searches_with_it_and_leaves_it_out(site: Site, server: Server) -> None:
    position = 17
    answer = server.get(f"/neighbours/{position}", count=12).json
    query = site.collection.path(position)
    assert query is not None
    assert answer["query"]["name"] == query.name
    names, cosines = nearest_by_hand(site, query)
    others = [(name, at) for name, at in zip(names, cosines, strict=True) if name != query.name]
    assert [match["name"] for match in answer["neighbours"]] == [name for name, _ in others[:12]]
    scores = [match["score"] for match in answer["neighbours"]]
    assert scores == pytest.approx([at for _, at in others[:12]], abs=1e-5)


def test_an_image_of_no_class_is_unknown(site: Site) -> None:
    unknown, known = (site.new / "new-0.png").read_bytes(), (site.photos / "03-0.png").read_bytes()
    sums = np.zeros((len(NAMES), 16))
    np.add.at(sums, np.arange(len(site.collection)) // COPIES, site.collection.vectors_ND.numpy())
    prototypes = sums / np.linalg.norm(sums, axis=1, keepdims=True)
    files = [site.new / "new-0.png", site.photos / "03-0.png"]
    cosines = fedss.embed_files(fedss.load(site.run), files).embeddings_ND @ prototypes.T
    threshold = float(cosines.max(1).mean())
    assert cosines[0].max() < threshold < cosines[1].max()
    with served(site.collection, guard.Limits(MEGABYTE, threshold)) as server:
        first, second = (
            server.send("/search", [("x.png", content)]).json["identity"]
            for content in (unknown, known)
        )
    assert first["label"] is None
    assert first["nearest"] == NAMES[int(cosines[0].argmax())]
    assert first["score"] == pytest.approx(cosines[0].max(), abs=1e-5)
    assert second["label"] == second["nearest"] == NAMES[3]
    assert first["threshold"] == second["threshold"] == threshold


def test_classes_are_found_by_name_in_any_script(server: Server) -> None:
    listing = server.get("/classes").json
    assert (listing["total"], listing["matching"], listing["pages"]) == (len(NAMES), len(NAMES), 1)
    mugs = [item["name"] for item in listing["classes"] if item["name"].startswith("mug")]
    assert mugs == [f"mug {number}" for number in range(1, 20)]
    assert {item["name"] for item in listing["classes"]} == set(NAMES)
    for wanted, names in {
        "КОШКА": {"кошка"},
        "ünïcode": {"Ünïcode É"},
        "U\u0308NI\u0308CODE": {"Ünïcode É"},
        "unicode e": {"Ünïcode É"},
        "猫": {"猫"},
        "passwd": {"../../etc/passwd"},
        "no such class": set(),
    }.items():
        matching = server.get("/classes", contains=wanted).json
        assert {item["name"] for item in matching["classes"]} == names
    for item in listing["classes"]:
        images = server.get("/pictures", **{"class": item["name"]}).json
        assert images["count"] == item["count"] == COPIES
        number = NAMES.index(item["name"])
        files = [image["name"] for image in images["pictures"]]
        assert files == [f"{number:02}-{copy}.png" for copy in range(COPIES)]
    assert server.get("/pictures", **{"class": "no such class"}).status == 404


def test_long_lists_come_in_pages(site: Site, server: Server, monkeypatch) -> None:
    monkeypatch.setattr(page_app, "_PER_PAGE", 7)
    whole = [
        server.get("/classes", page=page, contains="mug").json["classes"] for page in (1, 2, 3)
    ]
    assert [len(part) for part in whole] == [7, 7, 5]
    names = [item["name"] for part in whole for item in part]
    assert names == [f"mug {number}" for number in range(1, 20)]
    beyond = server.get("/classes", page=99, contains="mug").json
    assert (beyond["page"], beyond["pages"]) == (3, 3)
    for page in ("0", "-1", "x", "1e3", "9" * 30):
        assert server.get("/classes", page=page).status == 400


def test_thumbnails_are_small_images_asked_for_by_number(site: Site, server: Server) -> None:
    answer = server.get("/thumbnail/5")
    assert answer.headers["content-type"] == "image/jpeg"
    with (
        Image.open(io.BytesIO(answer.body)) as small,
        Image.open(site.photos / "01-1.png") as large,
    ):
        assert small.size == large.size
        difference = np.asarray(small.convert("L"), float) - np.asarray(large, float)
    assert np.abs(difference).mean() < 8
    assert server.get(f"/thumbnail/{len(site.collection)}").status == 404
    assert server.get(f"/thumbnail/{10**30}").status == 404


@pytest.mark.parametrize(
    "target",
    [
        "/../server.py",
        "/server.py",
        "/thumbnail/../server.py",
        "/thumbnail/..%2f..%2fpage.py",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/..%5c..%5cpage.py",
        "//etc/passwd",
        "/thumbnail/-1",
        "/thumbnail/5/../../server.py",
        "/thumbnail/%00",
        "/thumbnail/index.sqlite",
        "/index/index.sqlite",
        "/original/index.sqlite",
        "/original/../../photos.csv",
        "/server.js%00.png",
        "/static/../server.py",
        "/neighbours/../../server.py",
        "http://127.0.0.1/../server.py",
    ],
)
def test_no_path_leads_to_a_file(server: Server, target: str) -> None:
    answer = server.ask("GET", target)
    assert answer.status == 404
    assert set(answer.json) == {"error"}
    assert b"root:" not in answer.body
    assert b"SQLite" not in answer.body
    assert b"import" not in answer.body


def test_a_class_named_like_a_path_is_a_name(server: Server) -> None:
    listing = server.get("/pictures", **{"class": "../../etc/passwd"}).json
    assert [image["label"] for image in listing["pictures"]] == ["../../etc/passwd"] * COPIES
    assert server.get("/pictures", **{"class": "/etc/passwd"}).status == 404


def test_searching_stores_nothing(site: Site, server: Server) -> None:
    def state() -> dict[str, bytes]:
        return {str(p): p.read_bytes() for p in site.run.rglob("*") if p.is_file()}

    before = state()
    server.send("/search", [("x.png", png())])
    server.send("/search", [("x.txt", b"no image")])
    server.send("/enrol", [("x.txt", b"no image")], name="never")
    assert state() == before


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"just some text", "expected PNG, JPEG"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "expected PNG, JPEG"),
        (b"<!doctype html><script>alert(1)</script>", "expected PNG, JPEG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "expected PNG, JPEG"),
        (png()[:700], "cannot be read"),
        (b"BM" + bytes(60), "cannot be read"),
        (b"\xff\xd8\xff and no more", "no image, it begins with"),
    ],
    ids=["empty", "text", "svg", "html", "eps", "truncated", "bmp", "jpeg"],
)
def test_what_is_no_image_is_refused_by_its_content(
    server: Server, content: bytes, said: str
) -> None:
    for path in ("/search", "/enrol"):
        answer = server.send(path, [("holiday.png", content)], name="x")
        assert answer.status == 415
        assert answer.error.startswith("holiday.png ")
        assert said in answer.error
        assert "0x" not in answer.error


@pytest.mark.parametrize(
    ("width", "height", "said"),
    [
        (50_000, 50_000, "2,500,000,000 pixels,"),
        (11_585, 11_585, "11,585 x 11,585 = 134,212,225 pixels,"),
        (25_000_001, 1, "25,000,001 x 1 = 25,000,001 pixels,"),
    ],
)
def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(
    server: Server, width: int, height: int, said: str
) -> None:
    """The first is above Pillow's own limit, too, the second below that of training."""
    large = huge_png(width, height)
    limit = "above the limit of 25,000,000: save it smaller; fedss serve --max-upload-megapixels"
    for path in ("/search", "/enrol"):
        answer = server.send(
            path, [("good.png", png()), ("large.png", large)][path == "/search" :], name="x"
        )
        assert answer.status == 413
        assert answer.error == f"large.png has {said} {limit} sets the limit"
    # One of just as many pixels as are allowed is looked at: this one has no data.
    answer = server.send("/search", [("full.png", huge_png(25_000_000, 1))])
    assert answer.status == 415
    assert answer.error.startswith("full.png cannot be read")


def test_images_of_too_many_pixels_leave_the_callers_file_open(site: Site) -> None:
    for content in (huge_png(11_586, 11_586), b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"):
        file = io.BytesIO(content)
        with (
            quiet_pillow(),
            pytest.raises(ValueError, match=r"above the limit of 134,217,728|PostScript"),
        ):
            open_image(file)
        assert not file.closed


def test_others_are_answered_while_an_image_is_decoded(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only one is decoded at a time; who sends none need not wait for it."""
    begun, go_on, at_once = threading.Event(), threading.Event(), list[int]()
    read = guard.read_images  # type: ignore[attr-defined]

    def slow(*arguments: Any, **named: Any) -> Any:
        at_once.append(1)
        begun.set()
        assert go_on.wait(30)
        assert len(at_once) == 1
        yield from read(*arguments, **named)
        at_once.clear()

    monkeypatch.setattr(guard, "read_images", slow)
    with served(site.collection, guard.Limits()) as server:
        answers: list[Answer] = []

        def send(path: str) -> None:
            answers.append(server.send(path, [("x.png", png())], name="slow one"))

        threads = [threading.Thread(target=send, args=(path,)) for path in ("/search", "/enrol")]
        for thread in threads:
            thread.start()
        assert begun.wait(30)
        for path in ("/about", "/sample", "/thumbnail/0", "/neighbours/0", "/classes"):
            assert server.get(path).status == 200
        go_on.set()
        for thread in threads:
            thread.join()
        assert [answer.status for answer in answers] == [200, 200]


def test_an_image_may_have_any_name(server: Server) -> None:
    for name in ("notes.txt", "猫.png", "", "..", "x.php"):
        assert server.send("/search", [(name, png())]).status == 200


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP", "TIFF", "WEBP", "JPEG"])
def test_images_of_each_kind_are_read(site: Site, server: Server, kind: str) -> None:
    out = io.BytesIO()
    options = {"lossless": True} if kind == "WEBP" else {}
    with Image.open(site.photos / "05-2.png") as image:
        image.save(out, kind, **options)
    best = server.send("/search", [("x", out.getvalue())]).json["neighbours"][0]
    assert best["name"] == "05-2.png"
    assert best["score"] == pytest.approx(1, abs=0.01 if kind == "JPEG" else 1e-5)


def test_uploads_over_the_limit_are_refused(server: Server) -> None:
    large = png() + bytes(MEGABYTE)
    answer = server.send("/search", [("large.png", large)])
    assert answer.status == 413
    assert answer.error.startswith("large.png is too large. An image may have 1 MB")
    # Far over it, reading ends before the form does, also where it is no image that is large.
    for name in ("picture", "other"):
        body, kind = form([("large.png", png() + bytes(2 * MEGABYTE))], {})
        body = body.replace(b'name="picture"', f'name="{name}"'.encode())
        for chunked in (False, True):
            blocks = iter([body[i : i + 65536] for i in range(0, len(body), 65536)])
            size = {"transfer-encoding": "chunked"} if chunked else {}
            sent: Any = blocks if chunked else body
            answer = server.ask("POST", "/search", sent, {"content-type": kind, **size}, chunked)
            assert answer.status == 413
            assert answer.error.startswith("An image may have 1 MB")
            assert "--max-upload-mb" in answer.error
    full = png() + bytes(MEGABYTE - len(png()))
    assert server.send("/search", [("full.png", full)]).status == 200
    many = [(f"{i}.png", png(i)) for i in range(guard.MOST_IMAGES + 1)]
    answer = server.send("/enrol", many, name="many")
    assert answer.status == 400
    assert str(guard.MOST_IMAGES) in answer.error
    assert server.send("/search", many[:2]).status == 400


def test_what_is_no_form_is_refused(server: Server) -> None:
    kind = "multipart/form-data; boundary=b"
    for body, headers in (
        (b"", {}),
        (png(), {"content-type": "image/png"}),
        (b"picture=abc", {"content-type": "application/x-www-form-urlencoded"}),
        (b"garbage", {"content-type": kind}),
        (b"garbage", {"content-type": "multipart/form-data"}),
        (b"--b\r\n\r\n\r\n--b--", {"content-type": kind}),
        (
            b'--b\r\ncontent-disposition: form-data; name="picture"\r\n\r\ntext\r\n--b--\r\n',
            {"content-type": kind},
        ),
    ):
        answer = server.ask("POST", "/search", body, headers)
        assert answer.status == 400, body
        assert len(answer.error) > 10
    for path, method in (("/search", "GET"), ("/", "POST"), ("/enrolled", "PUT")):
        answer = server.ask(method, path)
        assert answer.status == 405
        assert answer.error == f"{method} is not for this path"
    for count in ("0", "-3", "many", "201"):
        answer = server.send(f"/search?count={count}", [("x.png", png())])
        assert answer.status == 400
        assert "expected a number from 1 to 200" in answer.error


@given(st.binary(max_size=300), st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM"]))
@settings(max_examples=40)
def test_no_bytes_break_the_server(server: Server, content: bytes, start: bytes) -> None:
    answer = server.send("/search", [("x", start + content)])
    assert answer.status in (200, 415)
    body, kind = form([("x", png())], {})
    broken = body[: len(content) * 3] + content + body[len(content) * 3 + 5 :]
    assert server.ask("POST", "/search", broken, {"content-type": kind}).status in (200, 400, 415)


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "[", "localhost."]
)
def test_a_name_that_is_not_ours_is_refused(server: Server, host: str) -> None:
    for method, path in (("GET", "/"), ("GET", "/sample"), ("GET", "/thumbnail/0")):
        answer = server.ask(method, path, headers={"host": host})
        assert answer.status in (400, 403)
        assert b"pictures" not in answer.body


@pytest.mark.parametrize("host", ["localhost:{}", "127.0.0.1:{}", "[::1]:{}", "LOCALHOST:{}"])
def test_this_machine_is_answered_under_each_of_its_names(server: Server, host: str) -> None:
    answer = server.ask("GET", "/about", headers={"host": host.format(server.port)})
    assert answer.status == 200


@pytest.mark.parametrize(
    "origin",
    ["https://evil.example", "null", "http://127.0.0.1:1", "http://localhost", "http://[", ""],
)
def test_other_pages_change_nothing(server: Server, origin: str) -> None:
    headers = {"origin": origin}
    answers = [
        server.send("/enrol", [("x.png", png())], headers, name="theirs"),
        server.send("/search", [("x.png", png())], headers),
        server.ask("DELETE", "/enrolled?name=theirs", headers=headers),
    ]
    assert [answer.status for answer in answers] == [403, 403, 403]
    assert server.get("/enrolled").json == {"classes": []}
    own = {"origin": f"http://127.0.0.1:{server.port}"}
    assert server.send("/search", [("x.png", png())], own).status == 200


def test_every_answer_forbids_what_it_does_not_need(server: Server) -> None:
    for path in ("/", "/server.js", "/about", "/thumbnail/0", "/nothing", "/thumbnail/99999"):
        answer = server.get(path)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert answer.headers["cache-control"] == "no-store"
        assert "access-control-allow-origin" not in answer.headers
    page = server.get("/").body.decode()
    script = server.get("/server.js").body.decode()
    style = server.get("/server.css").body.decode()
    assert not re.search(r"https?:|//[a-z]", page + style)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", script)
    assert not re.search(r"\son\w+=|style=|<script>|<style>", page)


def test_a_new_class_is_enrolled_found_and_removed(site: Site, server: Server) -> None:
    files = [(f"new-{i}.png", (site.new / f"new-{i}.png").read_bytes()) for i in range(5)]
    name = "  Новый \u212b\n класс <i> "
    done = server.send("/enrol", files[:3], name=name).json
    shown = "Новый Å класс <i>"
    assert done == {"name": shown, "count": 3, "position": len(site.collection) + 2}
    assert server.get(f"/thumbnail/{done['position']}").status == 200
    search = server.send("/search?count=3", files[3:4]).json
    assert {match["label"] for match in search["neighbours"]} == {shown}
    assert all(match["enrolled"] for match in search["neighbours"])
    assert {match["name"] for match in search["neighbours"]} == {n for n, _ in files[:3]}
    rows = fedss.embed_files(
        fedss.load(site.run), [site.new / n for n, _ in files[:4]]
    ).embeddings_ND
    mean = rows[:3].mean(0)
    cosine = float(rows[3] @ mean / np.linalg.norm(mean))
    assert search["identity"]["nearest"] == shown
    assert search["identity"]["score"] == pytest.approx(cosine, abs=1e-5)
    again = server.send("/enrol", files[4:], name=shown).json
    assert again["count"] == 1
    (listed,) = server.get("/enrolled").json["classes"]
    assert (listed["name"], listed["count"]) == (shown, 4)
    # It stays for the next process.
    assert open_collection(site.run / "index", site.run).enrolled == {shown: 4}
    removed = server.ask("DELETE", f"/enrolled?name={quote(shown)}")
    assert removed.json == {"removed": shown}
    assert server.get("/enrolled").json == {"classes": []}
    assert server.get("/about").json["pictures"] == len(site.collection)
    assert server.ask("DELETE", f"/enrolled?name={quote(shown)}").status == 400


def test_images_can_be_added_to_an_indexed_class_and_taken_out(site: Site, server: Server) -> None:
    content = (site.new / "new-0.png").read_bytes()
    # A path that a program sends as a file's name is only a name, and of it the last part.
    server.send("/enrol", [("../../../tmp/evil.png", content)], name=NAMES[0])
    both = server.get("/pictures", **{"class": NAMES[0]}).json
    assert both["count"] == COPIES + 1
    assert [image["enrolled"] for image in both["pictures"]] == [False] * COPIES + [True]
    assert both["pictures"][-1]["name"] == "evil.png"
    server.ask("DELETE", f"/enrolled?name={quote(NAMES[0])}")
    assert server.get("/pictures", **{"class": NAMES[0]}).json["count"] == COPIES
    assert "was enrolled" in server.ask("DELETE", f"/enrolled?name={quote(NAMES[0])}").error


@pytest.mark.parametrize("name", ["می\u200cخواهم", "👩\u200d🚀", "क्\u200dष", "x" * 200])
def test_a_class_may_have_a_name_in_any_script(server: Server, name: str) -> None:
    assert server.send("/enrol", [("x.png", png())], name=name).json["name"] == name
    (listed,) = server.get("/enrolled").json["classes"]
    assert listed["name"] == name
    assert server.ask("DELETE", f"/enrolled?name={quote(name)}").status == 200


@pytest.mark.parametrize("name", ["a\x00b", "a\u202eb", "a\x1bb", " a\u200bb"])
def test_what_nobody_sees_of_a_name_is_left_out(server: Server, name: str) -> None:
    assert server.send("/enrol", [("x.png", png())], name=name).json["name"] == "ab"
    assert server.ask("DELETE", f"/enrolled?name={quote(name)}").status == 200


@pytest.mark.parametrize("name", ["", "   ", "x" * 201, "\u200b\x00"])
def test_a_class_needs_a_name_that_can_be_seen(server: Server, name: str) -> None:
    answer = server.send("/enrol", [("x.png", png())], name=name)
    assert answer.status == 400
    assert "class" in answer.error
    assert server.get("/enrolled").json == {"classes": []}


def test_one_broken_image_of_several_is_named_and_none_is_kept(server: Server) -> None:
    files = [("a.png", png(1)), ("b.png", png(2)[:600]), ("c.png", png(3))]
    answer = server.send("/enrol", files, name="half")
    assert answer.status == 415
    assert answer.error.startswith("b.png cannot be read")
    assert server.get("/enrolled").json == {"classes": []}


def test_what_other_processes_enrol_is_seen(site: Site, server: Server) -> None:
    before = open_collection(site.run / "index", site.run)
    after = enrol(before, "from elsewhere", [site.new / "new-1.png"])
    assert [c["name"] for c in server.get("/enrolled").json["classes"]] == ["from elsewhere"]
    remove(after, "from elsewhere")
    assert server.get("/enrolled").json == {"classes": []}


def test_names_that_are_no_text_are_shown(site: Site) -> None:
    raw, shown = os.fsdecode(b"caf\xe9"), "caf\\udce9"
    collection = enrol(site.collection, raw, [site.new / "new-2.png"])
    with served(collection, guard.Limits()) as server:
        (listed,) = server.get("/enrolled").json["classes"]
        assert listed["name"] == shown
        assert server.get("/pictures", **{"class": shown}).json["count"] == 1
        server.ask("DELETE", f"/enrolled?name={quote(shown)}")
        assert server.get("/enrolled").json == {"classes": []}


def test_what_a_measured_threshold_is_worth_is_said(site: Site) -> None:
    limits = guard.make_limits(1, None, Threshold(0.9, 0.01, 15, supported=False))
    with served(site.collection, limits) as server:
        note = server.get("/about").json["threshold_note"]
    # Twice as many classes: 1 - 0.99 ** 2.
    assert "1.0% are named among 15 classes, as measured; here about 2.0%" in note
    assert "too few images" in note


def test_a_test_that_allows_no_name_names_nobody_and_shows_neighbours(site: Site) -> None:
    limits = guard.make_limits(1, None, Threshold(REJECT_ALL, 0.01, 15))
    with served(site.collection, limits) as server:
        note = server.get("/about").json["threshold_note"]
        answer = server.send("/search?count=3", [("x.png", png())])
    assert "the test of this run allows no name at a false-positive rate of 1.0%" in note
    assert answer.status == 200
    assert len(answer.json["neighbours"]) == 3
    assert answer.json["identity"]["label"] is None
    assert answer.json["identity"]["nearest"] in NAMES
    assert answer.json["identity"]["threshold"] > 1


def test_images_without_a_class_are_found(site: Site, tmp_path: Path) -> None:
    for file in site.photos.glob("0[0-3]-0.png"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    collection = build_collection(site.run, tmp_path, tmp_path / "index")
    with served(collection, guard.Limits(MEGABYTE, 0.5)) as server:
        assert server.get("/about").json["unlabelled"] == 4
        assert server.get("/classes").json["classes"] == []
        answer = server.send("/search", [("x.png", png())]).json
        assert [match["label"] for match in answer["neighbours"]] == [None] * 4
        assert answer["identity"] is None


def test_the_default_is_this_machine_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with guard.listen("127.0.0.1", 0) as listener:
        assert guard.is_loopback(listener)
        assert guard.address_of(listener) == f"http://127.0.0.1:{listener.getsockname()[1]}/"
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: 127.0.0.1, this machine alone)" in text


def test_a_port_in_use_is_named(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["serve", str(site.run), "--port", str(port)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"fedss serve: --port {port} of 127.0.0.1 is in use")
    assert "--port 0" in line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--port", "65536"], "--port: expected a number from 0"),
        (["--port", "-1"], "--port: expected a number from 0"),
        (["--host", "192.0.2.1", "--port", "0"], "--host 192.0.2.1: this machine cannot listen"),
        (["--host", "x" * 300, "--port", "0"], "not the name of a host"),
        (["--max-upload-mb", "0"], "--max-upload-mb: expected 0.001 to 1000"),
        (["--max-upload-megapixels", "200"], "--max-upload-megapixels: expected 0.01 to 134.218"),
        (["--threshold", "2"], "--threshold: expected a cosine"),
        (["--threshold", "nan"], "--threshold: expected a cosine"),
        (["--index", "nowhere", "--port", "0"], "nowhere"),
    ],
)
def test_mistakes_end_with_one_line(
    site: Site, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", str(site.run), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_other_machines_are_let_in_with_a_warning(
    site: Site, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def interrupted(collection, title, listener, host, limits):
        seen.append((len(collection), title, host, limits))
        raise KeyboardInterrupt

    monkeypatch.setattr(page_app, "serve", interrupted)
    words = ["serve", str(site.run), "--host", "0.0.0.0", "--port", "0", "--max-upload-mb", "2"]
    assert main(words) == 0
    said = capsys.readouterr()
    assert "no password" in said.err
    assert re.search(r"120 images at http://127\.0\.0\.1:\d+/", said.out)
    assert [entry[:3] for entry in seen] == [(120, "run", "0.0.0.0")]
    assert seen[0][3].picture_bytes == 2 * MEGABYTE
    assert main(["serve", str(site.run), "--port", "0"]) == 0
    assert capsys.readouterr().err == ""


def test_a_damaged_evaluation_stops_nobody_who_gives_a_threshold(
    site: Site, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_app, "serve", lambda *_: None)
    path = site.run / "verification.json"
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[:100])
        assert main(["serve", str(site.run), "--port", "0"]) == 2
        assert "delete it and run fedss evaluate" in capsys.readouterr().err
        assert main(["serve", str(site.run), "--port", "0", "--threshold", "0.5"]) == 0
    finally:
        path.write_bytes(whole)


def test_the_threshold_of_an_evaluation_is_taken_unless_one_is_given() -> None:
    measured = Threshold(0.7, 0.01, 500)
    limits = guard.make_limits(20, None, measured)
    assert limits.threshold == 0.7
    assert limits.measured == measured
    assert guard.make_limits(20, 0.5, measured) == guard.Limits(20 * MEGABYTE, 0.5)
    assert guard.make_limits(20, None, None, 7.5).picture_pixels == 7_500_000
    assert guard.make_limits(20) == guard.Limits(20 * MEGABYTE, None)
    with pytest.raises(ConfigError):
        guard.make_limits(20, torch.inf)
