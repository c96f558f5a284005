"""Omniglot (Lake, Salakhutdinov, Tenenbaum, Science 2015): 1,623 characters, 20 drawers each."""

import hashlib
import http.client
import io
import re
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fedss.data.assembly import images_of
from fedss.data.cache import cache_folder, cached_array, stamp
from fedss.data.decoding import decode
from fedss.data.images import Dataset, Images, RetrievalTask
from fedss.data.manifest import ListedImage
from fedss.errors import DataError
from fedss.files import write_file

_URL = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python/"
# MD5 of the original archives, as torchvision publishes them.
_MD5 = {
    "images_background": "68d2efa1b9178cc56df9314c21c6e718",
    "images_evaluation": "6b91aef0f799c5bb55b94e3f2daec811",
}
_IMAGE = re.compile(r"(?P<alphabet>[^/]+)/(?P<character>character\d+)/\d+_(?P<drawer>\d+)\.png")
_VALIDATION_ALPHABETS = 6


def omniglot_dataset(
    root: str | Path | None = None, *, image_size: int = 28, cache: Path | None = None
) -> Dataset:
    """Omniglot as a federation: a client is one drawer of one alphabet.

    Training: the 964 characters of the 30 background alphabets, 19,280 images at 600 clients.
    Of the 20 evaluation alphabets, sorted by name, the first six are for validation, 150 characters
    and 3,000 images; the other 14 are the test, 509 characters and 10,180 images. Ink is 255, the
    ground 0.

    Args:
        root: Folder with ``images_background.zip`` and ``images_evaluation.zip`` (a repacked
            archive will do), or with these archives unpacked. None is ``omniglot`` in the cache
            folder. Archives that are not there are fetched.
        image_size: Side of the images (the originals have 105).
        cache: Folder for the decoded images; see ``cache_folder``.

    Raises:
        DataError: Images neither there nor to be had, or broken, or of another layout.
    """
    place = cache_folder(cache) / "omniglot" if root is None else Path(root)
    with ExitStack() as stack:
        trained = _open(place, "images_background", stack)
        unseen = _open(place, "images_evaluation", stack)
        alphabets = sorted({name.split("/")[0] for name in unseen.stamps})
        chosen = set(alphabets[:_VALIDATION_ALPHABETS])

        def part(archive: _Archive, title: str, keep: Callable[[str], bool]) -> Images:
            return _images(archive, keep, image_size, cache, f"omniglot: {title}")

        return Dataset(
            "omniglot",
            train=part(trained, "train", lambda alphabet: True),
            test=RetrievalTask(part(unseen, "test", lambda alphabet: alphabet not in chosen)),
            validation=RetrievalTask(part(unseen, "validation", chosen.__contains__)),
        )


@dataclass(frozen=True)
class _Archive:
    """Images by name (alphabet/character/file), zipped or not; the stamp changes with them."""

    place: Path
    stamps: dict[str, object]
    read: Callable[[str], bytes]


def _open(place: Path, name: str, stack: ExitStack) -> _Archive:
    packed, folder = place / f"{name}.zip", place / name
    if not packed.is_file() and not folder.is_dir():
        _fetch(name, packed)
    if packed.is_file():
        try:
            pack = stack.enter_context(zipfile.ZipFile(packed))
        except (zipfile.BadZipFile, OSError) as error:
            raise DataError(
                f"{packed}: not a whole zip archive ({error}); remove it to download it again"
            ) from error
        stamps: dict[str, object] = {
            info.filename.removeprefix(f"{name}/"): (info.file_size, info.CRC)
            for info in pack.infolist()
            if info.filename.startswith(f"{name}/")
        }
        archive = _Archive(packed, stamps, lambda inner: pack.read(f"{name}/{inner}"))
    else:
        files = {path.relative_to(folder).as_posix(): path for path in folder.glob("*/*/*.png")}
        archive = _Archive(
            folder,
            {inner: stamp(path) for inner, path in files.items()},
            lambda inner: files[inner].read_bytes(),
        )
    images = {inner: s for inner, s in archive.stamps.items() if _IMAGE.fullmatch(inner)}
    if not images:
        raise DataError(
            f"{archive.place}: expected images {name}/<alphabet>/character<NN>/<GGGG>_<DD>.png, "
            f"found none among {len(archive.stamps)} entries"
        )
    return replace(archive, stamps=images)


def _images(
    archive: _Archive, keep: Callable[[str], bool], image_size: int, cache: Path | None, title: str
) -> Images:
    rows = []
    for name in archive.stamps:
        match = _IMAGE.fullmatch(name)
        if match and keep(match["alphabet"]):
            client = f"{match['alphabet']}/drawer{match['drawer']}"
            label = f"{match['alphabet']}/{match['character']}"
            rows.append(ListedImage(client, label, name, None, 0))
    rows.sort()

    def ink() -> Iterator[np.ndarray]:
        for row in rows:
            try:
                image = decode(io.BytesIO(archive.read(row.name)), image_size, 1)
            except Exception as error:
                raise DataError(
                    f"{archive.place}: {row.name} cannot be read ({error}); download it again"
                ) from error
            yield 255 - image[None]

    key = ("omniglot", *((row.name, archive.stamps[row.name]) for row in rows))
    shape = (len(rows), 1, image_size, image_size)
    pixels = cached_array(key, shape, ink(), cache=cache, title=title)
    named = [row._replace(name=f"{archive.place.stem}/{row.name}") for row in rows]
    return images_of(pixels, named, named)


def _fetch(name: str, packed: Path) -> None:
    try:
        with urllib.request.urlopen(f"{_URL}{name}.zip", timeout=30) as answer:
            content = answer.read()
        digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if digest != _MD5[name]:
            raise OSError(f"expected MD5 {_MD5[name]}, got {digest}")
        packed.parent.mkdir(parents=True, exist_ok=True)
        write_file(packed, content)
    except (OSError, http.client.HTTPException) as error:
        raise DataError(
            f"Omniglot: expected {name}.zip or the folder {name}/ in {packed.parent}, found "
            f"neither, and fetching {_URL}{name}.zip failed ({error}). Get images_background.zip "
            "and images_evaluation.zip from https://github.com/brendenlake/omniglot "
            "(folder python/) and put them there"
        ) from error
