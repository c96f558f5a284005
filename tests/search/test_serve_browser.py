"""The web page of a collection in a browser, used as a person would: clicking, dropping, typing."""

import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedss
from fedss.evaluation.verification import REJECT_ALL
from fedss.search import open_collection, remove
from fedss.search.classes import Threshold
from fedss.search.web.guard import make_limits
from fedss.search.web.page import neighbours_page
from tests.search.test_serve import huge_png, served
from tests.serving import COPIES, NAMES, Site, make_site

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
# A newcomer has Python and make: a browser is no package that pip could install. CI installs one.
if CHROMIUM is None:
    pytest.skip("no Chromium on this machine's PATH", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect
expect.set_options(timeout=15_000)

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
REFUSED = re.compile(r"the server responded with a status of 4\d\d")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return make_site(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def address(site: Site) -> Iterator[str]:
    """The command itself; Ctrl-C ends it in peace."""
    words = ["serve", str(site.run), "--port", "0", "--max-upload-mb", "0.2"]
    command = [sys.executable, "-m", "fedss", *words, "--threshold", f"{threshold(site):.4f}"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.search(r"http://127\.0\.0\.1:\d+/", line)
            assert found, line + (process.stderr.read() if process.stderr else "")
            yield found[0]
        finally:
            process.send_signal(signal.SIGINT)
            said = process.communicate(timeout=30)
        assert process.returncode == 0
        assert said == ("stopped\n", "")


def threshold(site: Site) -> float:
    """Between what the new class's fourth image scores before and after it is enrolled."""
    model = fedss.load(site.run)
    new_ND = fedss.embed_files(model, sorted(site.new.glob("*.png"))).embeddings_ND
    gallery_ND = fedss.embed_files(model, sorted(site.photos.glob("*.png"))).embeddings_ND
    means_CD = [*gallery_ND.reshape(len(NAMES), COPIES, -1).mean(1), new_ND[:3].mean(0)]
    scores_C = [mean_D @ new_ND[3] / np.linalg.norm(mean_D) for mean_D in means_CD]
    assert max(scores_C[:-1]) < scores_C[-1] - 0.001
    return float(max(scores_C[:-1]) + scores_C[-1]) / 2


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, address: str, site: Site) -> Iterator[Any]:
    """A fresh page. What it asks for stays here, and what it says on its console is no error."""
    context = browser.new_context(viewport={"width": 1100, "height": 800})
    page = context.new_page()
    page.set_default_timeout(15_000)
    asked: list[str] = []
    faults: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    # Else a chooser is asked for as it is expected, without waiting until the browser knows.
    page.on("filechooser", lambda chooser: None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on(
        "console",
        lambda line: (
            faults.append(line.text)
            if line.type in ("error", "warning") and not REFUSED.search(line.text)
            else None
        ),
    )
    page.goto(address)
    expect(page.get_by_role("heading", level=1)).to_have_text("120 images of 30 classes")
    yield page
    context.close()
    for label in open_collection(site.run / "index", site.run).enrolled:
        remove(site.collection, label)
    assert asked
    assert all(url.startswith((address, "blob:", "data:")) for url in asked), asked
    assert not faults


def results(page: Any) -> list[tuple[str, str]]:
    """Class and score of each neighbour, as a person reads them."""
    items = page.locator("#neighbours > li")
    return [
        (items.nth(i).locator(".name").inner_text(), items.nth(i).locator(".number").inner_text())
        for i in range(items.count())
    ]


def expected(site: Site, query: Path, count: int, without: str = "") -> list[tuple[str, str]]:
    model = fedss.load(site.run)
    files = sorted(file for file in site.photos.glob("*.png") if file.name != without)
    gallery_ND = fedss.embed_files(model, files).embeddings_ND.astype(np.float64)
    cosines_N = gallery_ND @ fedss.embed_files(model, [query]).embeddings_ND[0].astype(np.float64)
    order = np.argsort(-cosines_N, kind="stable")[:count]
    return [(NAMES[int(files[i].name[:2])], f"{cosines_N[i]:.3f}") for i in order]


def test_a_person_searches_browses_enrols_finds_and_removes(page: Any, site: Site) -> None:
    neighbours = page.locator("#neighbours > li")
    expect(page.get_by_role("heading", name="Or start from one of these")).to_be_visible()
    expect(neighbours).to_have_count(24)

    # An image from the file picker, opened with the keyboard.
    query = site.photos / "04-1.png"
    page.get_by_label("Drop an image here").focus()
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Space")
    chooser.value.set_files(query)
    expect(page.get_by_role("heading", name="Nearest images")).to_be_visible()
    expect(page.locator("#identity .who")).to_have_text(NAMES[4])
    assert results(page) == expected(site, query, 24)
    assert page.locator("#neighbours img").first.evaluate("image => image.naturalWidth") > 0
    # It is an image of the index, and said to be; its name leads to the file.
    expect(page.locator("#identity")).to_contain_text("Already in the index")
    original = page.locator("#identity .file")
    expect(original).to_have_text(query.name)
    with page.expect_popup() as popup:
        original.click()
    assert popup.value.evaluate("document.images[0].naturalWidth") > 0
    popup.value.close()
    # Names are text: markup in them does nothing.
    assert page.locator("#neighbours b").count() == 0

    # A click on an image searches with it; Back goes back.
    neighbours.nth(1).locator(".frame").click()
    expect(page.locator("#query")).to_contain_text(".png")
    expect(page.locator("#identity")).to_be_hidden()
    shown = page.locator("#query .file").inner_text()
    expect(neighbours.first.locator(".frame")).not_to_have_attribute("title", query.name)
    assert results(page) == expected(site, site.photos / shown, 24, without=shown)
    page.go_back()
    expect(page.locator("#identity .who")).to_have_text(NAMES[4])
    page.get_by_label("Show").select_option("12")
    expect(neighbours).to_have_count(12)

    # Browse.
    page.get_by_role("link", name="Classes", exact=True).click()
    classes = page.locator("#classes > li")
    expect(classes).to_have_count(30)
    page.get_by_label("Find a class").fill("кош")
    expect(classes).to_have_count(1)
    page.get_by_role("link", name="кошка").click()
    expect(page.get_by_role("heading", name="кошка")).to_be_visible()
    expect(page.locator("#images > li")).to_have_count(4)
    page.locator("#images .frame").nth(2).click()
    expect(page.get_by_role("heading", name="Nearest images")).to_be_visible()

    # Enrol from three images; one more was chosen and is left out again.
    page.get_by_role("link", name="Enrol").click()
    expect(page.get_by_text("None yet.")).to_be_visible()
    button = page.locator("#enrol-button")
    expect(button).to_be_disabled()
    page.get_by_label("Name of the class").fill("новый <img src=x onerror=alert(1)>")
    files = sorted(site.new.glob("*.png"))
    page.locator("#enrol-files").set_input_files([*files[:3], query])
    page.get_by_role("button", name="Leave out image 4").click()
    expect(button).to_have_text("Enrol from 3 images")
    button.click()
    name = "новый <img src=x onerror=alert(1)>"
    expect(page.locator("#enrolled-note")).to_contain_text(f"{name} is enrolled from 3 images")
    expect(page.get_by_role("heading", level=1)).to_have_text("123 images of 31 classes")
    expect(page.locator("#enrolled > li")).to_contain_text(name)
    page.get_by_role("button", name="Find it").click()
    expect(neighbours.first.locator(".badge")).to_have_text("enrolled")

    # A fourth image of it finds it.
    page.locator("#search-file").set_input_files(files[3])
    expect(page.locator("#identity .who")).to_have_text(name)
    assert [label for label, _ in results(page)[:3]] == [name] * 3
    assert open_collection(site.run / "index", site.run).enrolled == {name: 3}

    # Remove it: it is unknown again.
    page.get_by_role("link", name="Enrol").click()
    page.get_by_role("button", name=f"Remove {name}").click()
    page.get_by_role("button", name=f"Keep {name}").click()
    page.get_by_role("button", name=f"Remove {name}").click()
    page.get_by_role("button", name=f"Remove for good {name}").click()
    expect(page.get_by_text("None yet.")).to_be_visible()
    expect(page.get_by_role("heading", level=1)).to_have_text("120 images of 30 classes")
    page.get_by_role("link", name="Search", exact=True).click()
    expect(page.locator("#identity .who")).to_have_text("Unknown")
    sure = page.locator("#identity details p")
    expect(sure).to_be_hidden()
    page.get_by_text("How sure is this?").click()
    expect(sure).to_contain_text("A class is named from 0.")
    assert results(page) == expected(site, files[3], 12)


def test_images_can_be_dropped_and_pasted(page: Any, site: Site) -> None:
    content = list((site.photos / "12-0.png").read_bytes())
    give = """([content, kind, where]) => {
        const files = new DataTransfer();
        files.items.add(new File([new Uint8Array(content)], `${kind}.png`, {type: "image/png"}));
        const values = {bubbles: true, cancelable: true};
        const event = kind === "drop"
            ? new DragEvent("drop", {...values, dataTransfer: files})
            : new ClipboardEvent("paste", {...values, clipboardData: files});
        document.querySelector(where).dispatchEvent(event);
        return event.defaultPrevented;
    }"""
    # Beside the zone, too, where a browser would leave the page and open the image.
    for kind, where in (("drop", "#search-drop"), ("paste", "body"), ("drop", "footer")):
        prevented = page.evaluate(give, [content, kind, where])
        assert prevented == (kind == "drop")
        expect(page.locator("#query")).to_contain_text(f"{kind}.png")
        expect(page.locator("#identity .who")).to_have_text(NAMES[12])
        page.reload()
        expect(page.locator("#query")).to_be_hidden()
    page.get_by_role("link", name="Enrol").click()
    page.evaluate(give, [content, "paste", "body"])
    expect(page.locator("#chosen > li")).to_have_count(1)


def test_what_cannot_be_taken_is_said_on_the_page(page: Any, site: Site, tmp_path: Path) -> None:
    alert = page.get_by_role("alert")
    text, large, pixels = (
        tmp_path / f"{name}" for name in ("notes.txt", "large.png", "pixels.png")
    )
    text.write_text("no image")
    large.write_bytes((site.photos / "00-0.png").read_bytes() + bytes(300_000))
    choose = page.locator("#search-file").set_input_files
    choose(text)
    expect(alert).to_contain_text("notes.txt is not an image that can be read here")
    # The page is as it was before, and stays so: one can start from a sample, or go and come back.
    start = page.get_by_role("heading", name="Or start from one of these")
    expect(start).to_be_visible()
    expect(page.locator("#neighbours > li")).to_have_count(24)
    expect(page.locator("#query")).to_be_hidden()
    expect(page.get_by_text("Drop an image here", exact=True)).to_be_visible()
    page.get_by_role("link", name="Classes", exact=True).click()
    page.get_by_role("link", name="Search", exact=True).click()
    expect(start).to_be_visible()
    expect(alert).to_be_hidden()
    pixels.write_bytes(huge_png(11_000, 11_000))
    choose(pixels)
    expect(alert).to_contain_text("pixels.png has 11,000 x 11,000 = 121,000,000 pixels, above")
    expect(start).to_be_visible()
    choose(large)
    expect(alert).to_contain_text("large.png has 0.3 MB; this server takes images of up to 0.2")
    choose(site.photos / "00-0.png")
    expect(alert).to_be_hidden()
    expect(page.locator("#identity .who")).to_have_text(NAMES[0])
    # What was found stays, and so does the file for another number of images.
    choose(text)
    expect(alert).to_contain_text("notes.txt is not an image")
    expect(page.locator("#query")).to_contain_text("00-0.png")
    expect(page.locator("#identity .who")).to_have_text(NAMES[0])
    page.get_by_label("Show").select_option("12")
    expect(page.locator("#neighbours > li")).to_have_count(12)
    expect(alert).to_be_hidden()

    page.get_by_role("link", name="Enrol").click()
    page.get_by_label("Name of the class").fill("x")
    page.locator("#enrol-files").set_input_files([text, site.photos / "00-0.png"])
    page.locator("#enrol-button").click()
    expect(alert).to_contain_text("notes.txt is not an image")
    expect(page.locator("#chosen > li")).to_have_count(2)
    expect(page.get_by_text("None yet.")).to_be_visible()

    page.goto(page.url.split("#")[0] + "#class?name=nowhere")
    expect(alert).to_contain_text("no class 'nowhere'")
    page.goto(page.url.split("#")[0] + "#search?at=../../about")
    expect(alert).to_contain_text("nothing at")


@pytest.mark.parametrize("width", [400, 820])
def test_narrow_windows_scroll_only_downwards(page: Any, site: Site, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    page.locator("#search-file").set_input_files(site.photos / "04-0.png")
    expect(page.locator("#identity .who")).to_have_text(NAMES[4])
    for view in ("Search", "Classes", "Enrol"):
        page.get_by_role("link", name=view, exact=True).click()
        expect(page.locator("section.view:visible")).to_have_count(1)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_test_that_allows_no_name_is_told(browser: Any, site: Site) -> None:
    limits = make_limits(1, None, Threshold(REJECT_ALL, 0.01, 15))
    with served(site.collection, limits) as server:
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{server.port}/")
        page.locator("#search-file").set_input_files(site.new / "new-3.png")
        identity = page.locator("#identity")
        expect(identity.locator(".who")).to_have_text("Unknown")
        expect(identity).to_contain_text("No class can be named")
        expect(identity).to_contain_text("allows no name at a false-positive rate of 1.0%")
        expect(identity.locator(".tick")).to_have_count(0)
        expect(page.locator("#neighbours > li")).to_have_count(24)
        page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(
    browser: Any, site: Site, address: str, tmp_path: Path, scheme: str
) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="no axe-core").Axe()
    page = browser.new_page(color_scheme=scheme, viewport={"width": 400, "height": 800})

    def check() -> None:
        page.wait_for_load_state("networkidle")
        page.evaluate(
            "document.querySelectorAll('details').forEach((item) => { item.open = true })"
        )
        found = axe.run(page).response["violations"]
        assert not [(v["id"], v["nodes"][0]["html"]) for v in found if v["impact"] != "minor"]

    page.goto(address)
    expect(page.locator("#neighbours > li")).to_have_count(24)
    check()
    for file in (site.new / "new-3.png", site.photos / "00-0.png"):
        page.locator("#search-file").set_input_files(file)
        expect(page.locator("#query")).to_contain_text(file.name)
        check()
    for view in ("#classes", "#class?name=mug+3", "#enrol"):
        page.goto(address + view)
        check()
    queries = [site.photos / "00-0.png", site.new / "new-3.png"]
    matches = site.collection.search(site.collection.embed(queries), 8)
    (tmp_path / "found.html").write_text(neighbours_page(site.collection, queries, matches))
    for report in (tmp_path / "found.html", fedss.write_report(site.run)):
        page.goto(report.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        check()
    page.close()
