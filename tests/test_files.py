import errno
import os
import signal
import subprocess
import sys

import pytest

from fedss.errors import RunFolderError
from fedss.files import atomic, remove_litter, write_file, writing


def test_a_file_is_whole_or_the_old_one(tmp_path):
    path = tmp_path / "a[1].json"
    write_file(path, b"old")
    with pytest.raises(KeyError), atomic(path) as file:
        raise KeyError(file.write(b"half"))
    assert path.read_bytes() == b"old"
    with atomic(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_the_mode_is_that_of_any_new_file(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_file(tmp_path / "file", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~umask


def test_what_kills_left_is_removed_on_request_and_nothing_else(tmp_path):
    script = f"""
import os, signal
from pathlib import Path
from fedss.files import atomic
with atomic(Path({str(tmp_path / "a[1].json")!r})) as file:
    os.kill(os.getpid(), signal.SIGKILL)
"""
    for _ in range(2):
        code = subprocess.run([sys.executable, "-c", script], check=False).returncode
        assert code == -signal.SIGKILL
    litter = set(tmp_path.iterdir())
    assert len(litter) == 2
    inner = tmp_path / "inner"
    inner.mkdir()
    others = {inner, inner / ".a.json.0123abcd.tmp"}
    others |= {tmp_path / name for name in (".mine.tmp", "a.0123abcd.tmp", ".a.0123abcd.tmp.txt")}
    for other in others - {inner}:
        other.write_bytes(b"")
    write_file(tmp_path / "a[1].json", b"whole")
    remove_litter(tmp_path, older_than=3600)
    assert litter <= set(tmp_path.iterdir())
    old = litter.pop()
    os.utime(old, (0, 0))
    remove_litter(tmp_path, older_than=3600)
    assert not old.exists()
    assert litter <= set(tmp_path.iterdir())
    remove_litter(tmp_path)
    assert set(tmp_path.rglob("*")) == others | {tmp_path / "a[1].json"}
    remove_litter(tmp_path / "none")


def test_of_writers_at_once_each_puts_a_whole_file_in_place(tmp_path):
    path = tmp_path / "file"
    with atomic(path) as slow:
        slow.write(b"slow")
        write_file(path, b"fast")
        assert path.read_bytes() == b"fast"
    assert path.read_bytes() == b"slow"
    assert list(tmp_path.iterdir()) == [path]


def test_a_lost_file_is_no_success(tmp_path):
    path = tmp_path / "file"
    write_file(path, b"old")
    with pytest.raises(FileNotFoundError) as caught, atomic(path):
        next(tmp_path.glob(".*.tmp")).unlink()
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"old"


def test_a_failed_write_says_where_why_and_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(RunFolderError) as caught, writing(tmp_path):
        write_file(tmp_path / "none" / "a.json", b"")
    assert f"cannot write {tmp_path / 'none' / 'a.json'}: No such file" in str(caught.value)
    assert "same command again: it goes on from the last checkpoint" in str(caught.value)

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    message = f"cannot write {tmp_path}: No space left on device; make room$"
    with pytest.raises(RunFolderError, match=message), writing(tmp_path, "make room"):
        write_file(tmp_path / "a.json", b"")


@pytest.mark.parametrize("below", ["", "run", "runs/run"])
def test_a_file_where_a_folder_should_be_is_named(tmp_path, below):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / below
    message = f"cannot write into {folder}: expected a folder, found a file: {tmp_path / 'file'};"
    with pytest.raises(RunFolderError, match=message) as caught, writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    assert "checkpoint" not in str(caught.value)
