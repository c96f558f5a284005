"""From files to a page that searches them: Omniglot's characters, with a class enrolled at once.

    python examples/search_page.py OUT            # 5 minutes on one core
    fedss serve OUT/run --threshold 0.7           # look at it yourself

Images of characters are written as files with a CSV, as your own would be; a model is trained on
the background alphabets; characters of other alphabets are indexed, all but one. With
``--images DIR`` a browser without a window then opens the page, enrols the missing character from
three images, searches with a fourth and takes the screenshots of the documentation
(``pip install playwright``, and Chromium on the PATH).
"""

import argparse
import csv
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import uvicorn
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

import fedss
from fedss.search import Collection, build_collection, remove
from fedss.search.web import guard
from fedss.search.web.app import make_app

# One in whose case it works as often as on average.
MISSING = "Tengwar 22"
THRESHOLD = 0.7


def write_images(images: fedss.Images, folder: Path) -> list[dict[str, str]]:
    """Each image as a PNG, black on white; rows for a CSV."""
    rows = []
    for pixels, label, name in zip(images.pixels, images.labels, images.names, strict=True):
        alphabet, character = images.class_names[label].rsplit("/", 1)
        file = Path(name).name
        if not (folder / file).exists():
            Image.fromarray(255 - pixels[0]).save(folder / file)
        row = {
            "image": file,
            "label": f"{alphabet.replace('_', ' ')} {int(character[-2:])}",
            "client": f"{alphabet} {Path(name).stem[-2:]}",
        }
        rows.append(row)
    return rows


def write_csv(path: Path, rows: list[dict[str, str]]) -> None:
    """A CSV of images, with the columns of the first row."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def make_collection(out: Path, omniglot: str | None, rounds: int) -> Collection:
    """Files, a trained run and an index in ``out``."""
    photos = out / "photos"
    photos.mkdir(parents=True, exist_ok=True)
    data = fedss.load_dataset("omniglot", omniglot, image_size=105)
    assert data.test is not None
    train, test = write_images(data.train, photos), write_images(data.test.query, photos)
    write_csv(
        photos / "photos.csv",
        [row | {"split": "train"} for row in train] + [row | {"split": "test"} for row in test],
    )
    write_csv(photos / "gallery.csv", [row for row in test if row["label"] != MISSING])
    write_csv(photos / "missing.csv", [row for row in test if row["label"] == MISSING])
    config = fedss.Config(
        data="csv", data_path=str(photos / "photos.csv"), image_size=28, rounds=rounds, eval_every=0
    )
    run = fedss.train(config, out / "run").folder
    return build_collection(run, photos / "gallery.csv")


def share_found(vectors_ND: Tensor, labels: list[str], enrolled: int = 3) -> float:
    """How often an image's nearest class is right if its class has but a few images.

    Each class in turn is known by its first images alone, as if just enrolled, all others by all
    of theirs; the class's other images are searched with.
    """
    names = sorted(set(labels))
    rows_N = torch.tensor([names.index(label) for label in labels])
    sums_CD = torch.zeros(len(names), vectors_ND.shape[1]).index_add(0, rows_N, vectors_ND)
    right = total = 0
    for row in range(len(names)):
        of_class_ND = vectors_ND[rows_N == row]
        prototypes_CD = sums_CD.clone()
        prototypes_CD[row] = of_class_ND[:enrolled].sum(0)
        scores_NC = of_class_ND[enrolled:] @ normalize(prototypes_CD).T
        right += int((scores_NC.argmax(1) == row).sum())
        total += len(scores_NC)
    return right / total


@contextmanager
def served(collection: Collection) -> Iterator[str]:
    """The page's address, while it is served by a thread."""
    limits = guard.make_limits(20, THRESHOLD)
    app = make_app(collection, "omniglot", frozenset(), limits)
    with guard.listen("127.0.0.1", 0) as listener:
        web = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off", ws="none"))
        thread = threading.Thread(target=web.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield guard.address_of(listener)
        finally:
            web.should_exit = True
            thread.join()


def take_screenshots(address: str, files: list[Path], folder: Path) -> None:
    """Enrol, search and browse in a browser, and keep what it shows."""
    from playwright.sync_api import sync_playwright

    def keep(page: Any, name: str) -> None:
        page.mouse.move(0, 0)
        page.evaluate("document.activeElement.blur()")
        page.wait_for_load_state("networkidle")
        path = folder / f"search-{name}.png"
        page.screenshot(path=path)
        with Image.open(path) as image:
            image.convert("RGB").quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium") or shutil.which("google-chrome"),
            args=["--no-sandbox", "--disable-gpu"],
        )
        wide, narrow = {"width": 1180, "height": 700}, {"width": 400, "height": 860}
        page = browser.new_page(viewport=wide)
        page.goto(f"{address}#enrol")
        page.get_by_label("Name of the class").fill(MISSING)
        page.locator("#enrol-files").set_input_files(files[:3])
        page.locator("#enrol-button").click()
        page.locator("#enrolled > li").wait_for()
        for name, scheme, size in (("found", "light", wide), ("dark", "dark", narrow)):
            page = browser.new_page(viewport=size, color_scheme=scheme)
            page.goto(address)
            page.locator("#search-file").set_input_files(files[3])
            page.locator("#identity .who").wait_for()
            keep(page, name)
        page = browser.new_page(viewport=wide)
        page.goto(f"{address}#classes?contains=tengwar")
        page.locator("#classes li").first.wait_for()
        keep(page, "classes")
        browser.close()


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for files, run and index")
    parser.add_argument("--omniglot", help="folder with Omniglot's archives (default: fetch them)")
    parser.add_argument("--rounds", type=int, default=300, help="of training (default: 300)")
    parser.add_argument("--images", type=Path, help="folder for screenshots of the page")
    options = parser.parse_args()
    collection = make_collection(options.out, options.omniglot, options.rounds)
    if MISSING in collection.enrolled:
        collection = remove(collection, MISSING)
    with (options.out / "photos" / "missing.csv").open(encoding="utf-8") as file:
        files = [options.out / "photos" / row["image"] for row in csv.DictReader(file)]
    labels = [label or "" for label in collection.labels] + [MISSING] * len(files)
    vectors_ND = torch.cat([collection.vectors_ND, collection.embed(files)])
    share = share_found(vectors_ND, labels)
    print(f"enrolled from 3 images, a class is the nearest of {share:.0%} of its others")
    print(f"fedss serve {options.out / 'run'} --threshold {THRESHOLD}")
    if options.images:
        with served(collection) as address:
            take_screenshots(address, files, options.images)


if __name__ == "__main__":
    main()
