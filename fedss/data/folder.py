"""Pictures in folders: root/client/class/picture."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from fedss.data.manifest import Listing, Row, composed
from fedss.errors import DataError

EXTENSIONS = (
    *(".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(".avif", ".heic", ".heif"),
)


def read_folder(root: Path) -> Listing:
    """The pictures in folders ``root/client/class/picture``; opens none.

    Hidden files and files without the extension of a picture (EXTENSIONS) are passed over. Links
    are followed as long as they stay below ``root``.

    Raises:
        DataError: No pictures, a client without pictures, a picture at another depth, a link that
            leads out of ``root``, a name of nothing but spaces, or a folder that cannot be read.
    """
    layout = f"expected pictures as {root}/client/class/picture, of {', '.join(EXTENSIONS)}"
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; {layout}")
    rows: list[Row] = []
    for parts in _pictures(str(root), os.path.realpath(root), ()):
        if len(parts) != 3:
            raise DataError(f"{root.joinpath(*parts)}: a picture at the wrong depth; {layout}")
        client, label = map(composed, parts[:2])
        if not (client and label):
            raise DataError(
                f"{root.joinpath(*parts)}: a client or class whose name is nothing but spaces; "
                "give the folder a name"
            )
        # Of millions of pictures, each name of a class is kept once.
        rows.append(Row(client, sys.intern(label), "/".join(parts), None, 0))
    if not rows:
        raise DataError(f"{root}: no pictures found; {layout}")
    clients = {row.client for row in rows}
    for folder in sorted(root.iterdir()):
        hidden = folder.name.startswith(".")
        if folder.is_dir() and not hidden and composed(folder.name) not in clients:
            raise DataError(
                f"{folder}: a client without pictures; {layout}. Add pictures or remove the folder"
            )
    return Listing(root, os.path.abspath(root), rows)


def _pictures(folder: str, root: str, above: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Paths of pictures below a folder, in parts, down to the fourth level.

    Links within ``root``, a real path, are followed; with so few levels they cannot run in
    circles. What is called a picture and is no file comes too: it will be missed.
    """
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        raise DataError(
            f"{folder}: cannot read this folder: {error.strerror}; mend its rights or move it away"
        ) from error
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_symlink():
            _check_inside(entry.path, root)
        # Unlike entry.is_dir(), it has an answer to a link that leads to itself.
        if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
            if len(above) < 3:
                yield from _pictures(entry.path, root, (*above, entry.name))
        elif entry.name.lower().endswith(EXTENSIONS):
            yield (*above, entry.name)


def _check_inside(link: str, root: str) -> None:
    target = os.path.realpath(link)
    if not target.startswith(os.path.join(root, "")):
        raise DataError(
            f"{link}: a link out of the folder, to {target}; what a folder shares should lie in "
            "it. Remove the link, move its target here, or list the pictures in a CSV, which may "
            "name any file"
        )
