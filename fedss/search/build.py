"""`fedss index`: from pictures to an index, embedding only what is new or was changed."""

import json
import os
import secrets
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from fedss.embedding import PictureList, list_pictures
from fedss.errors import DataError, RunFolderError
from fedss.experiment import load
from fedss.files import replacing
from fedss.models import Embedder
from fedss.run_folder import hold
from fedss.search.collection import (
    ENROLLED,
    INDEX,
    Collection,
    check_model,
    fingerprint,
    open_with,
)
from fedss.search.reading import read_pictures
from fedss.search.shelf import (
    Item,
    changing,
    is_there,
    make_shelf,
    note,
    put,
    read_about,
    read_items,
    read_stamps,
)

OnProgress = Callable[[int, int], None]

_CHUNK = 4096
_LEAVE_OUT = "mend or remove it, or leave such pictures out with skip_broken (--skip-broken)"
_ADVICE = "make room or mend the place, then start the same command again"
Stamp = tuple[int, int]


def build_collection(
    run: str | Path,
    pictures: str | Path,
    folder: str | Path | None = None,
    *,
    skip_broken: bool = False,
    on_progress: OnProgress | None = None,
    backbone: nn.Module | None = None,
) -> Collection:
    """Index the pictures of a folder or a CSV, for search.

    An index that is there already is brought up to date: pictures whose file has the same name,
    size and time of last change keep what was computed, new and changed ones are embedded, deleted
    ones vanish. Enrolled classes stay. The new index takes the old one's place when it is whole;
    a process that dies on the way leaves the old one.

    Args:
        run: the run folder of the model.
        pictures: a folder, or a CSV with the columns ``image`` and perhaps ``label``. In a folder,
            a picture's class is the name of the folder that it lies in.
        folder: where to put the index; None: ``run/index``.
        skip_broken: leave out pictures that cannot be read (``Collection.skipped``).
        on_progress: called with the number of pictures done and of all; None: a bar on stderr.
        backbone: as for ``fedss.load``.

    Raises:
        DataError: no pictures, or one that cannot be read.
        RunFolderError: no finished run; another process is building this index; the place cannot
            be written; classes were enrolled there with another model.
    """
    embedder = load(run, backbone)
    folder = Path(run) / "index" if folder is None else Path(folder)
    found = list_pictures(Path(pictures))
    twice = next((name for name, count in Counter(found.names).items() if count > 1), None)
    if twice is not None:
        raise DataError(f"{pictures}: {twice} is listed more than once; remove one of the lines")
    with hold(folder, _ADVICE):
        if is_there(folder / ENROLLED):
            check_model(folder / ENROLLED, embedder)
        with replacing(folder / INDEX) as beside:
            _write(beside, folder / INDEX, found, embedder, skip_broken, on_progress)
            with beside.open("rb+") as file:
                os.fsync(file.fileno())
        return open_with(folder, embedder)


def _write(
    beside: Path,
    old: Path,
    found: PictureList,
    embedder: Embedder,
    skip_broken: bool,
    on_progress: OnProgress | None,
) -> None:
    model = fingerprint(embedder)
    kept = _kept(old, model, found)
    paths, total = found.paths, len(found.names)
    skipped: list[str] = []
    embedded = 0
    make_shelf(beside, {"model": model, "build": secrets.token_hex(8)})
    with changing(beside, alone=True) as file, _Bar(on_progress) as done:
        done(0, total)
        for start in range(0, total, _CHUNK):
            chunk = range(start, min(start + _CHUNK, total))
            stamps = {at: _stamp(paths[at], found.names[at], skip_broken) for at in chunk}
            same = {
                at: kept[found.names[at]][0]
                for at in chunk
                if found.names[at] in kept and kept[found.names[at]][1] == stamps[at]
            }
            there = read_items(old, list(same.values())) if same else {}
            todo = [at for at in chunk if at not in same]
            broken: dict[int, str] | None = {} if skip_broken else None
            read = {at: there[number] for at, number in same.items()}
            done(start + len(same), total)
            new = [paths[at] for at in todo]
            for block in read_pictures(
                embedder, new, thumbnails=True, broken=broken, advice=_LEAVE_OUT
            ):
                read |= {todo[one.position]: (one.vector_D, one.thumbnail) for one in block}
                done(start + len(read), total)
            put(
                file,
                (
                    Item(found.names[at], found.labels[at], stamps[at], *read[at])
                    for at in chunk
                    if at in read
                ),
            )
            skipped += [found.names[todo[position]] for position in sorted(broken or {})]
            embedded += len(read) - len(same)
            done(chunk.stop, total)
        if len(skipped) == total:
            raise DataError(f"no readable picture among the {total} of {found.source}")
        facts = {
            "source": str(found.source),
            "root": str(found.root),
            "links": found.links,
            "skipped": skipped,
            "embedded": embedded,
        }
        note(file, {"facts": json.dumps(facts)})


def _kept(old: Path, model: str, found: PictureList) -> dict[str, tuple[int, Stamp]]:
    """What an earlier index of the same pictures holds: number and stamp by name."""
    try:
        about = read_about(old)
        same_place = json.loads(about["facts"])["source"] == str(found.source)
        return read_stamps(old) if same_place and about["model"] == model else {}
    except (RunFolderError, KeyError, TypeError, ValueError):
        return {}  # Whatever is wrong with it, the index is now made anew.


def _stamp(path: Path, name: str, skip_broken: bool) -> Stamp | None:
    try:
        status = path.stat()
    except OSError as error:
        if skip_broken:
            return None
        raise DataError(
            f"cannot read picture {name}: {path}: {error.strerror}; {_LEAVE_OUT}"
        ) from error
    return status.st_size, status.st_mtime_ns


class _Bar:
    """Progress as a bar on stderr, where that is a terminal and nobody else wants to be told."""

    def __init__(self, on_progress: OnProgress | None) -> None:
        console = Console(stderr=True)
        self._tell = on_progress
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=on_progress is not None or not console.is_terminal,
        )

    def __enter__(self) -> OnProgress:
        self._bar.start()
        task = self._bar.add_task("pictures", total=None)

        def done(count: int, total: int) -> None:
            self._bar.update(task, completed=count, total=total)
            if self._tell is not None:
                self._tell(count, total)

        return done

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
