"""`fedss index`: from images to an index, embedding only what is new or was changed."""

import json
import logging
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from fedss.errors import DataError, RunFolderError
from fedss.files import replacing
from fedss.inference.embedding import ImageList, list_images, refuse_broken
from fedss.inference.model import load
from fedss.inference.pixels import read_images
from fedss.log import Progress, progress_log
from fedss.models import Embedder, fingerprint
from fedss.runs.folder import lock_folder
from fedss.search.collection import ENROLLED, INDEX, Collection, check_model, open_with
from fedss.search.store import (
    Item,
    add_items,
    create_store,
    file_fingerprint,
    read_fingerprints,
    read_items,
    read_metadata,
    store_exists,
    transaction,
    write_metadata,
)

OnProgress = Callable[[int, int], None]

_LOG = logging.getLogger("fedss.search")

_UNFINISHED = "unfinished.sqlite"
# What an interrupted build loses at most.
_CHUNK = 1024
_ADVICE = "make room or check permissions, then start the same command again"
Stamp = tuple[int, int]


def build_collection(
    run: str | Path,
    images: str | Path,
    folder: str | Path | None = None,
    *,
    skip_broken: bool = False,
    replace: bool = False,
    on_progress: OnProgress | None = None,
    backbone: nn.Module | str | None = None,
    trust_code: bool = False,
) -> Collection:
    """Index the images of a folder or a CSV, for search.

    An index that is there already is brought up to date: images whose file has the same name
    and is unchanged (``file_fingerprint``) keep what was computed, new and
    changed ones are embedded, deleted ones vanish. Enrolled classes stay. The new index takes the
    old one's place when it is whole; a process that dies on the way leaves the old one, and the
    next one goes on where it was.

    Args:
        run: the run folder of the model.
        images: a folder, or a CSV with the columns ``image`` and perhaps ``label``. In a folder,
            an image's class is the name of the folder that it lies in.
        folder: where to put the index; None: ``run/index``.
        skip_broken: leave out images that cannot be read (``Collection.skipped``).
        replace: embed all images anew, in place of an index that is there, whatever its model or
            images. Classes that were enrolled with another model are removed.
        on_progress: called with the number of images done and of all; None: progress is
            logged.
        backbone: as for ``fedss.load``.
        trust_code: as for ``fedss.load``.

    Raises:
        DataError: no images, or some that cannot be read; what was embedded is kept for the next
            time.
        RunFolderError: no finished run; another process is building this index; the place cannot
            be written; an index or enrolled classes of another model are there, or
            an index without any of these images (without ``replace``).
    """
    embedder = load(run, backbone, trust_code)
    folder = (Path(run) / "index" if folder is None else Path(folder)).absolute()
    image_list = list_images(Path(images))
    with lock_folder(folder, _ADVICE):
        if not replace:
            if store_exists(folder / ENROLLED):
                check_model(folder / ENROLLED, embedder)
            _check_old(folder / INDEX, image_list, embedder)
        _build(folder, image_list, embedder, skip_broken, replace, on_progress)
        if replace:
            _remove_other_enrolled(folder / ENROLLED, embedder)
        return open_with(folder, embedder)


def _remove_other_enrolled(path: Path, embedder: Embedder) -> None:
    """Remove the classes that were enrolled with another model: no vector of theirs is of use."""
    if store_exists(path):
        try:
            check_model(path, embedder)
        except RunFolderError:
            path.unlink()
            _LOG.warning("removed the classes enrolled with another model: enrol them again")


def _check_old(index: Path, image_list: ImageList, embedder: Embedder) -> None:
    """Whether an index that is there is this one's predecessor; a damaged one is made anew.

    Raises:
        RunFolderError: it is of another model or has none of these images; it may have taken
            hours to make.
    """
    try:
        source = json.loads(read_metadata(index)["facts"])["source"]
    except (RunFolderError, KeyError, TypeError, ValueError):
        return
    check_model(index, embedder)
    # A folder that was moved has the same names of images.
    moved = source != str(image_list.source)
    if moved and not read_fingerprints(index).keys() & set(image_list.names):
        raise RunFolderError(
            f"{index} is the index of {source}, not of {image_list.source}: choose another place "
            "(--index), or replace it (--replace)"
        )


def _build(
    folder: Path,
    image_list: ImageList,
    embedder: Embedder,
    skip_broken: bool,
    replace: bool,
    on_progress: OnProgress | None,
) -> None:
    """New images go to a store of their own, from which an interrupted build goes on."""
    index, unfinished = folder / INDEX, folder / _UNFINISHED
    model = fingerprint(embedder)
    metadata: dict[str, Any] = {
        "source": str(image_list.source),
        "root": str(image_list.root),
        "passed_over": image_list.passed_over,
        "remarks": image_list.remarks,
    }
    if not skip_broken:
        image_list.check_files()
    stamps = [file_fingerprint(path) for path in image_list.paths]

    def places() -> dict[int, tuple[Path, int]]:
        """File and number of each image that is embedded already."""
        stored = {}
        for file in (unfinished,) if replace else (index, unfinished):
            held = _held(file, model, image_list)
            for at, name in enumerate(image_list.names):
                number, stamp = held.get(name, (0, None))
                if stamp is not None and stamp == stamps[at]:
                    stored[at] = (file, number)
        return stored

    before = places()
    if not any(file == unfinished for file, _ in before.values()):
        unfinished.unlink(missing_ok=True)
        create_store(unfinished, {"model": model, "build": "", "facts": json.dumps(metadata)})
    todo = [at for at in range(len(stamps)) if at not in before]
    broken = _embed(unfinished, image_list, stamps, todo, embedder, on_progress)
    if not skip_broken:
        named = [(image_list.names[at], why, image_list.where(at)) for at, why in broken.items()]
        refuse_broken(named)
    after = places()
    if not after:
        raise DataError(f"no readable image among the {len(stamps)} of {image_list.source}")
    metadata |= {
        "skipped": [image_list.names[at] for at in broken],
        "embedded": sum(file == unfinished for file, _ in after.values()),
    }
    with replacing(index) as beside:
        create_store(beside, {"model": model, "build": secrets.token_hex(8)})
        with transaction(beside, alone=True) as file:
            write_metadata(file, {"facts": json.dumps(metadata)})
            for chunk in _chunks(sorted(after)):
                read = {
                    (store, number): item
                    for store in (index, unfinished)
                    for number, item in read_items(
                        store, [after[at][1] for at in chunk if after[at][0] == store]
                    )
                }
                for at in chunk:
                    item = Item(
                        image_list.names[at], image_list.labels[at], stamps[at], *read[after[at]]
                    )
                    add_items(file, [item])
        with beside.open("rb+") as whole:
            os.fsync(whole.fileno())
    unfinished.unlink()


def _embed(
    unfinished: Path,
    image_list: ImageList,
    stamps: Sequence[Stamp | None],
    todo: Sequence[int],
    embedder: Embedder,
    on_progress: OnProgress | None,
) -> dict[int, str]:
    """Add images to a store, some at a time; those that cannot be read, and why."""
    paths, total = image_list.paths, len(stamps)
    unreadable: dict[int, str] = {}
    done = on_progress or _log_progress(f"index {image_list.source.name}")
    count = total - len(todo)
    done(count, total)
    for chunk in _chunks(todo):
        broken: dict[int, str] = {}
        blocks = read_images(embedder, [paths[at] for at in chunk], thumbnails=True, broken=broken)
        items = []
        for block in blocks:
            for one in block:
                at = chunk[one.position]
                items.append(
                    Item(image_list.names[at], None, stamps[at], one.vector_D, one.thumbnail)
                )
            done(count + len(items), total)
        with transaction(unfinished) as file:
            add_items(file, items)
        unreadable |= {chunk[position]: broken[position] for position in sorted(broken)}
        count += len(chunk)
        done(count, total)
    return unreadable


def _chunks(positions: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(positions), _CHUNK):
        yield positions[start : start + _CHUNK]


def _held(file: Path, model: str, image_list: ImageList) -> dict[str, tuple[int, Stamp | None]]:
    """What an earlier index of the same images holds: number and stamp by name."""
    try:
        about = read_metadata(file)
        same_place = json.loads(about["facts"])["source"] == str(image_list.source)
        return read_fingerprints(file) if same_place and about["model"] == model else {}
    except (RunFolderError, KeyError, TypeError, ValueError):
        return {}  # Whatever is wrong with it, the index is now made anew.


def _log_progress(task: str) -> OnProgress:
    log = progress_log()
    return lambda done, total: log(Progress(task, done, total, "images"), False)
