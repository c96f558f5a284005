"""Images in folders: root/client/class/image."""

import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from PIL import Image

from fedss.data.archive import Archive, find_archive, open_archive
from fedss.data.manifest import NOBODY, ListedImage, Listing
from fedss.data.names import composed
from fedss.errors import DataError

# What Pillow knows by name and cannot decode: data that need a handler, a player or Windows.
_UNDECODED = ("BUFR", "GRIB", "HDF5", "MPEG", "WMF", "EPS")
_HEIF = (".heic", ".heics", ".heif", ".heifs", ".hif")
# Thumbnails, deleted files and snapshots of Synology, QNAP, NetApp, macOS, Windows, Android, ext4.
# fmt: off
_SYSTEM_FOLDERS = (
    "@eadir", "@tmp", "@sharesnap", "#recycle", "#snapshot", "@recycle", "@recently-snapshot",
    "~snapshot", "@__thumb", "__macosx", "network trash folder", "temporary items", "$recycle.bin",
    "recycler", "system volume information", "lost.dir", "lost+found",
)
# fmt: on
_FOUND = re.compile(r"found\.\d{3}")  # by Windows, when it mends a disk


@cache
def extensions() -> frozenset[str]:
    """Endings of the files that count as images in a folder: of all that can be decoded here."""
    known = Image.registered_extensions()
    decoded = {*Image.OPEN, "MPO"} - {*_UNDECODED}  # MPO comes as JPEG
    return frozenset(_HEIF) | {ending for ending, kind in known.items() if kind in decoded}


def passed_over(name: str, is_folder: bool) -> str | None:
    """The kind of a file or folder that is skipped in a folder of images; None: it is not.

    The one rule in training and in search: hidden files and folders, folders that systems make for
    themselves, and files without the ending of an image are skipped, counted by kind, and shown.
    """
    if name.startswith("."):
        return "hidden folders" if is_folder else "hidden files"
    if is_folder:
        plain = name.casefold()
        systems = plain in _SYSTEM_FOLDERS or _FOUND.fullmatch(plain)
        return f"system folders {name}" if systems else None
    ending = os.path.splitext(name)[1].lower()
    if ending in extensions():
        return None
    return f"{ending} files" if ending else "files without an ending"


def read_folder(root: Path, *, dealt: bool = False) -> Listing:
    """The images in folders ``root/client/class/image``; opens none.

    What is none of the images is passed over and counted (``passed_over``), and so are folders
    within those of classes. Links are followed as long as they stay below ``root``.

    Args:
        root: The folder; or a zip or tar of such folders, or of one in which they are.
        dealt: Images get other clients, so there may be none: ``root/class/image``.

    Raises:
        DataError: No images, a client without images, an image at another depth, a link that
            leads out of ``root``, a name of nothing but spaces, or a folder that cannot be read.
    """
    layout = f"expected images as {root}/client/class/image, such as 1.jpg or 1.png"
    if dealt:
        layout += f", or as {root}/class/image"
    over: Counter[str] = Counter()
    archive = open_archive(root) if find_archive(root) == (root, "") else None
    source = root
    if archive is not None:
        root, places = _packed(archive, over)
    elif root.is_dir():
        places = list(_images(str(root), os.path.realpath(root), (), over))
    else:
        raise DataError(f"{root}: no such folder; {layout}")
    depth = 2 if dealt and all(len(parts) == 2 for parts in places) else 3
    rows: list[ListedImage] = []
    for parts in places:
        if len(parts) != depth:
            if not dealt and all(len(parts) == 2 for parts in places):
                layout += ". Without clients, a partition deals the images to some (--partition)"
            raise DataError(f"{root.joinpath(*parts)}: an image at the wrong depth; {layout}")
        client, label = map(composed, parts[:2] if depth == 3 else (NOBODY, parts[0]))
        if not (client and label):
            raise DataError(
                f"{root.joinpath(*parts)}: a client or class whose name is nothing but spaces; "
                "give the folder a name"
            )
        # Of millions of images, each name of a class is kept once.
        rows.append(ListedImage(client, sys.intern(label), "/".join(parts), None, 0))
    if not rows:
        raise DataError(f"{root}: no images found{besides(over)}; {layout}")
    if archive is None:
        _check_no_folder_is_empty(
            root, {composed(parts[0]) for parts in places}, depth, over, layout
        )
    return Listing(source, os.path.abspath(root), rows, passed_over=over, archive=archive)


def _check_no_folder_is_empty(
    root: Path, names: set[str], depth: int, over: Mapping[str, int], layout: str
) -> None:
    for folder in sorted(root.iterdir()):
        counts = folder.is_dir() and not passed_over(folder.name, True)
        if counts and composed(folder.name) not in names:
            raise DataError(
                f"{folder}: a {'client' if depth == 3 else 'class'} without images"
                f"{besides(over)}; {layout}. Add images or remove the folder"
            )


def _packed(archive: Archive, over: Counter[str]) -> tuple[Path, list[tuple[str, ...]]]:
    """The folder in an archive, or the archive, in which all images are, and their paths below it.

    What is passed over is counted as in a folder.
    """
    if archive.links:
        over["links in the archive"] += archive.links
    found, skipped = [], set[tuple[str, ...]]()
    for name in archive.names:
        parts = tuple(part for part in name.split("/") if part not in ("", "."))
        kinds = (passed_over(part, i < len(parts) - 1) for i, part in enumerate(parts))
        if kind := next(((i, kind) for i, kind in enumerate(kinds) if kind), None):
            place = parts[: kind[0] + 1]
            over[kind[1]] += place not in skipped
            skipped.add(place)
        else:
            found.append(parts)
    # An archive of a folder has that at the top.
    within = len({parts[0] for parts in found}) == 1 and all(len(parts) > 3 for parts in found)
    places = [parts[1:] if within else parts for parts in found]
    deep = {parts[:4] for parts in places if len(parts) > 4}
    if deep:
        over["folders below those of classes"] += len(deep)
    kept = [parts for parts in places if len(parts) <= 4]
    return (archive.path / found[0][0] if within else archive.path), kept


def besides(over: Mapping[str, int]) -> str:
    """What was passed over, as the end of a message; empty where nothing was."""
    kinds = ", ".join(f"{kind} ({count:,})" for kind, count in sorted(over.items()))
    return f"; passed over: {kinds}" if over else ""


def _images(
    folder: str, root: str, above: tuple[str, ...], over: Counter[str]
) -> Iterator[tuple[str, ...]]:
    """Paths of images below a folder, in parts, down to the fourth level; counts others.

    Links within ``root``, a real path, are followed; with so few levels they cannot run in
    circles. What is called an image and is no file comes too: it will be missed.
    """
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        raise DataError(
            f"{folder}: cannot read this folder: {error.strerror}; change its rights or move it"
        ) from error
    for entry in entries:
        # Unlike entry.is_dir(), it has an answer to a link that leads to itself.
        is_folder = os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()
        if entry.is_symlink() and not entry.name.startswith("."):
            target = os.path.realpath(entry.path)
            if not target.startswith(os.path.join(root, "")):
                raise DataError(
                    f"{entry.path}: a link out of the folder, to {target}; what a folder shares "
                    "should lie in it. Remove the link, move its target here, or list the images "
                    "in a CSV, which may name any file"
                )
        if kind := passed_over(entry.name, is_folder):
            over[kind] += 1
        elif not is_folder:
            yield (*above, entry.name)
        elif len(above) < 3:
            yield from _images(entry.path, root, (*above, entry.name), over)
        else:
            over["folders below those of classes"] += 1
