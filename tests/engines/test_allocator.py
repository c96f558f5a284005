"""Freed memory is kept where glibc can keep it, and only if it is asked to."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

import fedss
from fedss.engines.allocator import keep_freed_memory
from tests.reference import tiny_backbone, tiny_dataset

_FAULTS = """
import resource, torch
from fedss.engines.allocator import keep_freed_memory
print({call})
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.empty(2**25, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def faults(call: str, **environment: str) -> tuple[str, int]:
    """What the call returns, and the page faults of allocating the same 32 MB twenty times."""
    done = subprocess.run(
        [sys.executable, "-c", _FAULTS.format(call=call)],
        capture_output=True,
        text=True,
        check=True,
        env={"MALLOC_ARENA_MAX": "1", **environment},
    )
    returned, count = done.stdout.split()
    return returned, int(count)


@pytest.fixture(scope="module")
def given_back() -> int:
    """The page faults where nothing is asked for."""
    return faults("None")[1]


@pytest.mark.skipif(not keep_freed_memory(), reason="the C library is not glibc")
def test_freed_memory_is_not_faulted_in_again(given_back):
    returned, count = faults("keep_freed_memory()")
    assert returned == "True"
    assert count * 10 < given_back


@pytest.mark.skipif(not keep_freed_memory(), reason="the C library is not glibc")
def test_what_the_user_has_set_stays(given_back):
    """A block of 32 MB above the user's threshold goes back to the system each time."""
    returned, count = faults("keep_freed_memory()", MALLOC_MMAP_THRESHOLD_="1000000")
    assert returned == "True"
    assert count * 2 > given_back


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    assert not keep_freed_memory()


@pytest.mark.parametrize("keep", [True, False])
def test_training_keeps_memory_unless_told_otherwise(keep, tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr("fedss.training.experiment.keep_freed_memory", lambda: called.append(True))
    settings = {} if keep else {"keep_memory": False}
    config = fedss.Config(rounds=1, sample_size=4, clients_per_round=2, **settings)
    fedss.train(config, tmp_path, data=tiny_dataset(), backbone=tiny_backbone())
    assert bool(called) == keep


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        (2**40, [(-3, 2**30), (-1, 2**31 - 1), (-2, 2**26)]),
        (2**25, [(-3, 2**30), (-3, 2**25), (-1, 2**31 - 1), (-2, 2**26)]),
        (2**20, [(-3, 2**30), (-3, 2**25)]),
    ],
)
def test_an_older_glibc_gets_a_lower_threshold_or_nothing(most, expected, monkeypatch):
    """Trim threshold and padding alone would make it fault in every block above 128 kB."""
    asked = []

    def mallopt(parameter: int, value: int) -> int:
        asked.append((parameter, value))
        return parameter != -3 or value <= most

    library = SimpleNamespace(gnu_get_libc_version=None, mallopt=mallopt)
    monkeypatch.setattr("ctypes.CDLL", lambda name: library)
    for name in ("MMAP_THRESHOLD_", "TRIM_THRESHOLD_", "TOP_PAD_"):
        monkeypatch.delenv("MALLOC_" + name, raising=False)
    assert keep_freed_memory() == (most >= 2**25)
    assert asked == expected
