"""The class matrix W at the server, read and written by rows, in memory or in a file.

A row that was never written is made from the run's seed whenever it is read, so that a table of
any size is there at once and takes room for the pages alone on which training has touched a row.

Shape suffixes: N all classes, D embedding size, S or U some classes.
"""

import math
import mmap
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryFile

import torch
from torch import Tensor
from torch.nn import functional as F

from fedss.choices import RowDtype
from fedss.core.rounding import to_bfloat16
from fedss.errors import ConfigError, RunFolderError
from fedss.losses.moments import row_sums
from fedss.seeds import generator, numbered_normals

_MOST_CHANGED = 64
_BLOCK = 65536


@dataclass
class ClassRows:
    """W, and what the server optimizer keeps for each row. Written in place, row by row.

    Attributes:
        weight_ND: float32 or bfloat16, one class row per class; of a row never written, anything.
        slots: the optimizer's own values per row, e.g. ``{"momentum": [N, D]}``; same dtype.
        updated_N: int32, rounds that were complete when the row was last written; 0: never,
            -1: before the first round, with a row of another run.
        seed: what rows are made from until they are written.
        sums_EE: :func:`fedss.losses.moments.row_sums` of all rows, if the method needs them.
        changed: ids of the rows written since the last checkpoint, round by round.
        made: ids and rows that were last read before they were written: a round reads them twice.
        folder: where the tables lie as files, if they do.
    """

    weight_ND: Tensor
    slots: Mapping[str, Tensor]
    updated_N: Tensor
    seed: int
    sums_EE: Tensor | None = None
    changed: list[Tensor] = field(default_factory=list)
    made: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    folder: Path | None = None

    @property
    def num_classes(self) -> int:
        """Number of classes n."""
        return len(self.weight_ND)

    @property
    def dim(self) -> int:
        """Embedding size d."""
        return self.weight_ND.shape[1]


def create_class_rows(
    num_classes: int,
    embedding_size: int,
    slots: tuple[str, ...],
    seed: int,
    dtype: RowDtype = "float32",
    folder: Path | None = None,
) -> ClassRows:
    """Rows of uniform direction and length 1; every slot is zero. O(1) time.

    ``dtype`` is how rows and slots are kept: bfloat16 takes half the room, rounded at random so
    that small steps are not lost. With a ``folder`` the tables are sparse files in it, without a
    name: they are gone when the process ends. Both ways give the same bits.

    Raises:
        OSError: the files cannot be made.
        ConfigError: there is no room in memory.
    """
    kept = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    shape = (num_classes, embedding_size)
    return ClassRows(
        _zeros(shape, kept, folder),
        {name: _zeros(shape, kept, folder) for name in slots},
        _zeros((num_classes,), torch.int32, folder),
        seed,
        folder=folder,
    )


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, folder: Path | None) -> Tensor:
    """Zeros behind which there is no page until it is written. (torch.zeros writes them all.)"""
    size = math.prod(shape) * dtype.itemsize
    if folder is None:
        try:
            pages = mmap.mmap(-1, size)
        except OSError as error:
            raise ConfigError(
                f"row_store: a table of {shape[0]:,} classes needs {size / 1e9:.1f} GB, which this "
                f"machine does not give ({error.strerror}); take row_store file or row_dtype "
                "bfloat16"
            ) from error
    else:
        with TemporaryFile(dir=folder) as file:
            file.truncate(size)
            pages = mmap.mmap(file.fileno(), size)
        if hasattr(mmap, "MADV_RANDOM"):
            # Rows are read here and there: reading ahead of each was seen to cost 400 times more.
            pages.madvise(mmap.MADV_RANDOM)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def grow(rows: ClassRows, num_classes: int) -> ClassRows:
    """The same table with more classes, which were never written. O(n).

    Rows keep their ids; the old table must not be used again.
    """
    kept: RowDtype = "float32" if rows.weight_ND.dtype == torch.float32 else "bfloat16"
    grown = create_class_rows(
        num_classes, rows.dim, tuple(rows.slots), rows.seed, kept, rows.folder
    )
    for block in torch.split(rows.updated_N.nonzero()[:, 0], _BLOCK):
        for new, old in zip(_tables(grown), _tables(rows), strict=True):
            new.index_copy_(0, block, old.index_select(0, block))
    grown = replace(grown, changed=rows.changed)
    if rows.sums_EE is None:
        return grown
    return replace(grown, sums_EE=rows.sums_EE + _sums(grown, range(rows.num_classes, num_classes)))


def with_sums(rows: ClassRows) -> ClassRows:
    """The same table with the sums of its rows, which every write keeps from now on. O(n D^2)."""
    return replace(rows, sums_EE=_sums(rows, range(rows.num_classes)))


def _sums(rows: ClassRows, ids: range) -> Tensor:
    sums_EE = torch.zeros(rows.dim + 1, rows.dim + 1, dtype=torch.float64)
    for start in ids[::_BLOCK]:
        block_S = torch.arange(start, min(start + _BLOCK, ids.stop))
        sums_EE += row_sums(read(rows, block_S)[0])
    return sums_EE


def _tables(rows: ClassRows) -> list[Tensor]:
    return [rows.weight_ND, *rows.slots.values(), rows.updated_N]


def read(rows: ClassRows, ids_S: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Rows and slots as last written, float32 [S, D], and after which round, int32 [S]. O(S D)."""
    updated_S = rows.updated_N.index_select(0, ids_S)
    new_S = updated_S == 0
    any_new = bool(new_S.any())
    old_S = ~new_S if any_new else None
    rows_SD = _written(rows.weight_ND, ids_S, old_S)
    slots = {name: _written(slot_ND, ids_S, old_S) for name, slot_ND in rows.slots.items()}
    if any_new:
        new_ids = ids_S[new_S]
        if not rows.made or not torch.equal(rows.made[0][0], new_ids):
            # As they are before training: each a function of seed and id alone.
            normals = numbered_normals(rows.seed, "class rows", new_ids.numpy(), rows.dim)
            rows.made[:] = [(new_ids, F.normalize(torch.from_numpy(normals), dim=1))]
        rows_SD[new_S] = rows.made[0][1]
    return rows_SD, slots, updated_S


def _written(table_ND: Tensor, ids_S: Tensor, old_S: Tensor | None) -> Tensor:
    """Rows of a table, zeros where ``old_S`` is false: there no page is looked at."""
    # index_select and index_copy_ take whole rows: several times faster than indexing with [].
    if old_S is None:
        return table_ND.index_select(0, ids_S).float()
    part_SD = torch.zeros(len(ids_S), table_ND.shape[1])
    part_SD[old_S] = table_ND.index_select(0, ids_S[old_S]).float()
    return part_SD


def write_(
    rows: ClassRows, ids_U: Tensor, rows_UD: Tensor, slots: Mapping[str, Tensor], completed: int
) -> None:
    """Replace some rows and their slots, float32 [U, D], in place. O(U D), with sums O(U D^2).

    ``ids_U`` are int64 and unique; ``completed`` rounds are complete with this one, -1 where there
    was none yet.

    Raises:
        RunFolderError: the tables are files, and their disk may not have room for these rows.
    """
    _check_room(rows, len(ids_U))
    before_EE = None if rows.sums_EE is None else row_sums(read(rows, ids_U)[0])
    # First of all: so a table that was interrupted here shows rows of a round that is not complete.
    rows.updated_N.index_fill_(0, ids_U, completed)
    if rows.sums_EE is not None and before_EE is not None:
        rows.sums_EE.sub_(before_EE)
    rng = generator(rows.seed, "row rounding", completed)
    parts = [(rows.weight_ND, rows_UD), *((rows.slots[name], slots[name]) for name in rows.slots)]
    for table_ND, part_UD in parts:
        if table_ND.dtype == torch.bfloat16:
            part_UD = to_bfloat16(part_UD, rng)
        table_ND.index_copy_(0, ids_U, part_UD)
    if rows.sums_EE is not None:
        # As they were rounded.
        rows.sums_EE.add_(row_sums(read(rows, ids_U)[0]))
    rows.made.clear()
    if len(ids_U) == rows.num_classes:
        rows.changed[:] = [ids_U]
    else:
        rows.changed.append(ids_U)
    if len(rows.changed) > _MOST_CHANGED:
        rows.changed[:] = [torch.unique(torch.cat(rows.changed))]


def newest_write(rows: ClassRows) -> int:
    """The largest of ``updated_N``, also of a row that is only half written. O(n)."""
    return int(rows.updated_N.max())


def _check_room(rows: ClassRows, count: int) -> None:
    """A full disk would end the process without a word, since a mapped page cannot be refused."""
    if rows.folder is None or not hasattr(os, "statvfs"):
        return
    disk, page = os.statvfs(rows.folder), mmap.PAGESIZE
    row = rows.dim * rows.weight_ND.dtype.itemsize
    needed = count * ((1 + len(rows.slots)) * (row + page) + page)
    if disk.f_bavail * disk.f_frsize < needed:
        raise RunFolderError(
            f"{rows.folder}: expected {needed / 1e6:.0f} MB of free disk for the class rows of a "
            f"round, found {disk.f_bavail * disk.f_frsize / 1e6:.0f}; make room and start the same "
            "command again: it goes on from the last checkpoint"
        )


def union(ids: Sequence[Tensor]) -> Tensor:
    """The ids that are in any of these, int64, sorted and unique, as each of them is."""
    ids_U: Tensor = max(ids, key=len)
    # Sorted and unique, ids that end at their own count are 0, 1, 2, ...
    if any(len(ids_S) and int(ids_S[-1]) >= len(ids_U) for ids_S in ids):
        ids_U = torch.unique(torch.cat(list(ids)))
    return ids_U


def rows_of(rows_UD: Tensor, ids_U: Tensor, ids_S: Tensor) -> Tensor:
    """The rows of ``ids_S``, [S, D], from those of ``ids_U``; both sorted, S a part of U.

    A view where S is all of U: as many ids are the same ids.
    """
    if len(ids_S) == len(ids_U):
        return rows_UD
    return rows_UD.index_select(0, torch.searchsorted(ids_U, ids_S))


def add_rows_(rows_UD: Tensor, ids_U: Tensor, rows_SD: Tensor, ids_S: Tensor, weight: int) -> None:
    """``rows_UD[i] += weight rows_SD[i]`` for i in S, in float64; ids as for :func:`rows_of`."""
    if len(ids_S) == len(ids_U):
        rows_UD.add_(rows_SD, alpha=weight)
    else:
        rows_UD.index_add_(0, torch.searchsorted(ids_U, ids_S), weight * rows_SD.double())
