import os
import signal
import subprocess
import sys

import pytest

from fedss.files import atomic, write_file


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


def test_the_next_to_finish_removes_what_kills_left(tmp_path):
    path = tmp_path / "a[1].json"
    script = f"""
import os, signal
from pathlib import Path
from fedss.files import atomic
with atomic(Path({str(path)!r})) as file:
    os.kill(os.getpid(), signal.SIGKILL)
"""
    for _ in range(2):
        code = subprocess.run([sys.executable, "-c", script], check=False).returncode
        assert code == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2
    with atomic(tmp_path / "a[1].json.part"):  # another file, whose name begins the same
        write_file(path, b"whole")
        assert len(list(tmp_path.iterdir())) == 2
    assert {p.name for p in tmp_path.iterdir()} == {path.name, f"{path.name}.part"}


def test_of_writers_at_once_the_first_to_finish_stays(tmp_path):
    path = tmp_path / "file"
    with atomic(path) as slow:
        slow.write(b"slow")
        write_file(path, b"fast")
    assert path.read_bytes() == b"fast"
    write_file(path, b"later")
    assert path.read_bytes() == b"later"
    assert list(tmp_path.iterdir()) == [path]


def test_a_lost_file_is_no_success(tmp_path):
    with pytest.raises(FileNotFoundError), atomic(tmp_path / "file"):
        next(tmp_path.iterdir()).unlink()
