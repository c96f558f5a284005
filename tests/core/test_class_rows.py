import dataclasses
import hashlib
import mmap
import resource
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from fedss.core.class_rows import (
    ClassRows,
    add_rows_,
    create_class_rows,
    read,
    rows_of,
    union,
    with_sums,
    write_,
)
from fedss.core.optimizers import ServerOptimizer, current_rows, step_rows_
from fedss.core.state import ServerState
from fedss.errors import ConfigError, RunFolderError
from fedss.runs.checkpoint import load_checkpoint, newest_round, save_checkpoint
from fedss.seeds import generator, numbered_normals
from tests.reference import whole

N, D = 50, 4
SLOTS = ("momentum",)


def test_a_row_is_a_function_of_seed_and_id_alone():
    rows = create_class_rows(N, D, SLOTS, 3)
    everything = whole(rows)
    ids = torch.tensor([41, 2, 17])
    assert torch.equal(read(rows, ids)[0], everything[ids])
    more = create_class_rows(10**6, D, (), 3)
    assert torch.equal(read(more, ids)[0], everything[ids])
    assert not torch.equal(whole(create_class_rows(N, D, SLOTS, 4)), everything)
    assert len(everything.unique(dim=0)) == N


def test_rows_made_for_one_request_are_not_those_of_the_next():
    rows = create_class_rows(N, D, SLOTS, 3)
    everything = whole(rows)
    for ids in (torch.tensor([1, 4]), torch.tensor([2, 4]), torch.tensor([2, 4])):
        found = read(rows, ids)[0]
        assert torch.equal(found, everything[ids])
        found.zero_()  # what a reader does to its rows stays with it


def test_initial_rows_have_uniform_direction():
    rows = whole(create_class_rows(20_000, 3, (), 0))
    assert torch.allclose(rows.norm(dim=1), torch.ones(20_000))
    # Standard errors: 0.004 for the mean of a coordinate, 0.002 for that of its square.
    assert rows.mean(dim=0).abs().max() < 0.02
    assert (rows.T @ rows / 20_000 - torch.eye(3) / 3).abs().max() < 0.01
    # Archimedes: on the sphere in three dimensions a coordinate is uniform.
    share = torch.histc(rows[:, 0], 10, -1, 1) / 20_000
    assert (share - 0.1).abs().max() < 0.01


def test_numbered_normals_are_those_of_philox_at_that_counter():
    numbers = np.array([0, 5, 2**62])
    found = numbered_normals(1, "x", numbers, 7)
    key = int.from_bytes(hashlib.sha256(b"1/x").digest()[:16])
    for row, number in zip(found, numbers.tolist(), strict=True):
        peer = np.random.Generator(np.random.Philox(key=key, counter=number << 64))
        assert np.array_equal(row, peer.standard_normal(7, dtype=np.float32))
    assert not np.array_equal(found, numbered_normals(1, "y", numbers, 7))


def some_writes(rows: ClassRows, rounds: int, seed: int, first: int = 0) -> None:
    optimizer, rng = ServerOptimizer("momentum"), np.random.default_rng(seed)
    for round in range(first, first + rounds):
        ids = np.sort(rng.choice(rows.num_classes, rng.integers(1, 12), replace=False))
        update = rng.standard_normal((len(ids), rows.dim), dtype=np.float32)
        step_rows_(optimizer, rows, torch.from_numpy(ids), torch.from_numpy(update), round)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_file_gives_the_same_bits_as_memory_and_leaves_nothing(dtype, tmp_path):
    tables = [create_class_rows(N, D, SLOTS, 0, dtype, folder) for folder in (None, tmp_path)]
    for rows in tables:
        some_writes(rows, 9, seed=1)
    same_tables(*tables)
    assert not list(tmp_path.iterdir())


def test_bfloat16_is_right_on_average():
    """Steps far below bfloat16's resolution are not lost: each is taken with their probability."""
    rows = create_class_rows(4000, 1, (), 0, "bfloat16")
    ids, step = torch.arange(4000), 2.0**-12  # a 32nd of the spacing at 1
    write_(rows, ids, torch.ones(4000, 1), {}, 1)
    for round in range(1, 33):
        write_(rows, ids, read(rows, ids)[0] + step, {}, round + 1)
    moved = read(rows, ids)[0] - 1
    # After 32 steps: mean 2^-7, and the spread of 32 coins of probability 1/32.
    assert abs(moved.mean() / 2**-7 - 1) < 0.1
    assert moved.unique().numel() > 3
    nearest = torch.ones(1).bfloat16()
    assert nearest + step == nearest, "to nearest they would be lost"


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read there")
@pytest.mark.parametrize("place", ["memory", "file"])
def test_neither_making_a_table_nor_a_step_touches_memory_of_size_n(place, tmp_path):
    """W and its momentum are 5 GB that no page stands behind until it is written."""
    n, d, optimizer = 10_000_000, 64, ServerOptimizer("momentum")
    before = resident_bytes()
    rows = create_class_rows(n, d, SLOTS, 0, folder=tmp_path if place == "file" else None)
    ids = torch.arange(0, n, n // 50)
    for round in range(3):
        current_rows(optimizer, rows, ids, round)
        step_rows_(optimizer, rows, ids, torch.ones(len(ids), d), round)
    assert resident_bytes() - before < 30e6
    rows.weight_ND[:200_000] = 1.0
    assert resident_bytes() - before > 40e6, "the measurement sees nothing"


def state_of(rows: ClassRows, round: int) -> ServerState:
    return ServerState(torch.zeros(3), {"momentum": torch.zeros(3)}, rows, round)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 99), st.lists(st.integers(0, 5), min_size=1, max_size=12), st.booleans())
def test_a_checkpoint_of_what_changed_is_the_whole_table(tmp_path_factory, seed, writes, halves):
    folder = tmp_path_factory.mktemp("checkpoints")
    dtype = "bfloat16" if halves else "float32"
    rows = create_class_rows(N, D, SLOTS, seed, dtype)
    for round, count in enumerate(writes, 1):
        some_writes(rows, count, seed + round, first=10 * round)
        save_checkpoint(folder, state_of(rows, round))
        assert not rows.changed
        fresh = create_class_rows(N, D, SLOTS, seed, dtype)
        loaded = load_checkpoint(folder, fresh)
        assert loaded is not None
        assert loaded.round == round
        same_tables(loaded.class_rows, rows)


def same_tables(a: ClassRows, b: ClassRows) -> None:
    assert torch.equal(whole(a), whole(b))
    assert torch.equal(a.updated_N, b.updated_N)
    assert all(torch.equal(a.slots[name], b.slots[name]) for name in b.slots)


def test_a_checkpoint_costs_what_was_touched_and_files_stay_few(tmp_path):
    """A table of ten million rows, of which each round touches 20: bytes and files on disk."""
    rows = create_class_rows(10_000_000, D, SLOTS, 0)
    rng, touched, written = generator(0, "test"), set(), 0
    for round in range(1, 41):
        ids = np.sort(rng.choice(10_000_000, 20, replace=False))
        touched |= set(ids.tolist())
        part = torch.ones(20, D)
        write_(rows, torch.from_numpy(ids), part, {"momentum": part}, round)
        save_checkpoint(tmp_path, state_of(rows, round))
        files = list(tmp_path.glob("rows-*"))
        assert len(files) <= 10
        written += (tmp_path / f"rows-{round:06d}.safetensors").stat().st_size
    per_row = 8 + 4 + 2 * 4 * D
    assert sum(f.stat().st_size for f in tmp_path.glob("rows-*")) < 4 * len(touched) * per_row
    assert written < 8 * len(touched) * per_row, "each row is copied O(log rounds) times"
    loaded = load_checkpoint(tmp_path, create_class_rows(10_000_000, D, SLOTS, 0))
    assert loaded is not None
    touched_M = torch.tensor(sorted(touched))
    assert torch.equal(read(loaded.class_rows, touched_M)[0], read(rows, touched_M)[0])


def test_going_back_to_the_checkpoint_before(tmp_path):
    rows = create_class_rows(N, D, SLOTS, 0)
    for round in (1, 2):
        some_writes(rows, 2, round, first=2 * round)
        save_checkpoint(tmp_path, state_of(rows, round))
        if round == 1:
            kept = dataclasses.replace(
                rows,
                weight_ND=rows.weight_ND.clone(),
                updated_N=rows.updated_N.clone(),
                slots={name: slot.clone() for name, slot in rows.slots.items()},
            )
    for file in (tmp_path / "round-000002").iterdir():
        file.unlink()
    (tmp_path / "round-000002").rmdir()
    loaded = load_checkpoint(tmp_path, create_class_rows(N, D, SLOTS, 0))
    assert loaded is not None
    assert loaded.round == 1
    same_tables(loaded.class_rows, kept)


@pytest.mark.parametrize("last", [10, 100_000, 1_000_000, 10_000_000])
def test_the_newest_checkpoint_is_that_of_the_highest_round(last, tmp_path):
    rows = create_class_rows(N, D, SLOTS, 0)
    (tmp_path / "round-000009.old").mkdir()
    for round in range(last - 3, last + 3):
        some_writes(rows, 1, round)
        save_checkpoint(tmp_path, state_of(rows, round))
        assert newest_round(tmp_path) == round
        loaded = load_checkpoint(tmp_path, create_class_rows(N, D, SLOTS, 0))
        assert loaded.round == round
        same_tables(loaded.class_rows, rows)
    kept = {path.name for path in tmp_path.glob("round-*")}
    assert kept == {"round-000009.old", f"round-{last + 1:06d}", f"round-{last + 2:06d}"}


def test_sums_of_more_rows_than_a_block():
    rows = with_sums(create_class_rows(70_000, 2, (), 0))
    every = read(rows, torch.arange(70_000))[0].double()
    with_one = torch.cat([every, torch.ones(70_000, 1)], dim=1)
    assert torch.allclose(rows.sums_EE, with_one.T @ with_one, rtol=1e-12, atol=1e-9)


@given(st.lists(st.sets(st.integers(0, 6)), min_size=1), st.booleans())
def test_rows_of_several_clients_meet_by_id(parts, with_everything):
    parts = [*parts, set(range(7))] if with_everything else parts
    ids = [torch.tensor(sorted(part), dtype=torch.int64) for part in parts]
    ids_U = union(ids)
    assert ids_U.tolist() == sorted(set().union(*parts))
    rows_UD = torch.randn(len(ids_U), 2)
    by_id = dict(zip(ids_U.tolist(), rows_UD.tolist(), strict=True))
    sums_UD, expected = torch.zeros(len(ids_U), 2, dtype=torch.float64), dict.fromkeys(by_id, 0.0)
    for weight, ids_S in enumerate(ids, start=1):
        rows_SD = rows_of(rows_UD, ids_U, ids_S)
        assert rows_SD.tolist() == [by_id[i] for i in ids_S.tolist()]
        add_rows_(sums_UD, ids_U, rows_SD, ids_S, weight)
        for i in ids_S.tolist():
            expected[i] += weight * by_id[i][0]
    # Products of float32 and small integers are exact in float64, and sums have one order.
    assert sums_UD[:, 0].tolist() == list(expected.values())


def test_a_row_that_is_made_is_forgotten_once_rows_are_written():
    rows = create_class_rows(N, D, SLOTS, 0)
    ids = torch.arange(N)
    before = read(rows, ids)[0]
    assert torch.equal(read(rows, ids)[0], before)
    write_(rows, ids[:3], torch.ones(3, D), {name: torch.zeros(3, D) for name in SLOTS}, 1)
    assert not rows.made
    after = read(rows, ids)[0]
    assert torch.equal(after[3:], before[3:])
    assert torch.equal(after[:3], torch.ones(3, D))
    after.zero_()
    assert torch.equal(read(rows, ids)[0][3:], before[3:])


def test_writing_all_rows_again_and_again_keeps_their_ids_once():
    rows, ids = create_class_rows(N, D, (), 0), torch.arange(N)
    for round in range(1, 9):
        write_(rows, ids, torch.ones(N, D), {}, round)
    assert sum(map(len, rows.changed)) == N


def test_a_checkpoint_of_more_rows_than_a_block(tmp_path):
    n = 70_000
    rows = create_class_rows(n, 2, (), 0, "bfloat16")
    write_(rows, torch.arange(0, n), torch.randn(n, 2), {}, 1)
    save_checkpoint(tmp_path, state_of(rows, 1))
    (file,) = tmp_path.glob("rows-*.safetensors")
    saved = load_file(file)
    assert torch.equal(saved["weight"], rows.weight_ND)
    loaded = load_checkpoint(tmp_path, create_class_rows(n, 2, (), 0, "bfloat16"))
    assert loaded is not None
    assert torch.equal(loaded.class_rows.weight_ND, rows.weight_ND)


def test_a_table_too_large_for_memory_says_what_to_do():
    with pytest.raises(ConfigError, match=r"needs 256000000\.0 GB.*row_store file"):
        create_class_rows(10**15, 64, (), 0)


def test_a_full_disk_is_told_before_a_page_is_refused(tmp_path, monkeypatch):
    rows = create_class_rows(N, D, SLOTS, 0, folder=tmp_path)
    disk = SimpleNamespace(f_bavail=1, f_frsize=mmap.PAGESIZE)
    monkeypatch.setattr("fedss.core.class_rows.os.statvfs", lambda folder: disk)

    def write() -> None:
        write_(rows, torch.arange(3), torch.ones(3, D), {n: torch.ones(3, D) for n in SLOTS}, 1)

    # Of each row a page in W, one in each slot, and one of when it was written; and the rows.
    pages_needed = 3 * (1 + len(SLOTS) + 1)
    for pages in (1, pages_needed - 1):
        disk.f_bavail = pages
        with pytest.raises(RunFolderError, match="free disk for the class rows"):
            write()
        assert not rows.updated_N.any()
    disk.f_bavail = pages_needed + 1
    write()
    assert int(rows.updated_N.sum()) == 3
