"""Pictures in folders: root/client/class/picture."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from fedss.data.images import Dataset
from fedss.data.manifest import Listing, Row, build_dataset
from fedss.errors import DataError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def folder_dataset(
    root: str | Path,
    *,
    image_size: int = 64,
    channels: int | None = None,
    test_classes: float = 0.2,
    skip_broken: bool = False,
    cache: Path | None = None,
    seed: int = 0,
    at_site: bool = False,
) -> Dataset:
    """Pictures from folders ``root/client/class/picture``; some classes are held out as the test.

    Hidden files and files without the extension of a picture (EXTENSIONS) are passed over. The
    arguments and the result are those of ``csv_dataset``.

    Raises:
        DataError: No pictures, a client without pictures, a picture at another depth, or
            anything amiss with a picture.
    """
    return build_dataset(
        "folder",
        read_folder(Path(root)),
        image_size=image_size,
        channels=channels,
        test_classes=test_classes,
        skip_broken=skip_broken,
        cache=cache,
        seed=seed,
        at_site=at_site,
    )


def read_folder(root: Path) -> Listing:
    """A row for each picture below ``root``; opens none.

    Raises:
        DataError: See ``folder_dataset``.
    """
    layout = f"expected pictures as {root}/client/class/picture, of {', '.join(EXTENSIONS)}"
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; {layout}")
    rows: list[Row] = []
    for parts in _pictures(str(root), ()):
        if len(parts) != 3:
            raise DataError(f"{root.joinpath(*parts)}: a picture at the wrong depth; {layout}")
        # Of millions of pictures, each name of a class is kept once.
        rows.append(Row(parts[0], sys.intern(parts[1]), "/".join(parts), None, 0))
    if not rows:
        raise DataError(f"{root}: no pictures found; {layout}")
    clients = {row.client for row in rows}
    for folder in sorted(root.iterdir()):
        if folder.is_dir() and not folder.name.startswith(".") and folder.name not in clients:
            raise DataError(
                f"{folder}: a client without pictures; {layout}. Add pictures or remove the folder"
            )
    return Listing(root, os.path.abspath(root), rows)


def _pictures(folder: str, above: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Paths of pictures below a folder, in parts, down to the fourth level.

    Links to folders are followed; with so few levels they cannot run in circles.
    """
    try:
        entries = list(os.scandir(folder))
    except PermissionError:
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            if len(above) < 3:
                yield from _pictures(entry.path, (*above, entry.name))
        elif entry.name.lower().endswith(EXTENSIONS) and entry.is_file():
            yield (*above, entry.name)
