"""A federation of processes on loopback: TLS, node keys, three sites, and nothing left of it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fedss
from examples.federation import (
    follow,
    kill,
    place,
    register,
    site,
    status,
    submit,
    superexec,
    superlink,
)
from fedss import Config
from fedss.cli import main
from tests.sites import SITES, site_of, write_photos

SETTINGS = {
    "image_size": 8,
    "channels": 1,
    "backbone": "conv4-8",
    "embedding_size": 6,
    "sample_size": 6,
    "rounds": 2,
    "clients_per_round": 4,
    "batch_size": 2,
    "eval_every": 2,
    "checkpoint_every": 1,
    # `auto` would be other numbers in a federation, which does not know its images beforehand.
    "server_momentum": 0.9,
    "class_row_lr": 2.0,
}


@pytest.fixture(autouse=True)
def the_same_fedss_in_all_processes(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(fedss.__file__).parents[1]))


def living(groups: list[int]) -> list[str]:
    """What still runs in these process groups; what is dead and not yet buried is not counted."""
    listed = subprocess.run(
        ["ps", "-A", "-o", "pgid=,stat=,args="], stdout=subprocess.PIPE, text=True, check=True
    )
    lines = [line.split(maxsplit=2) for line in listed.stdout.splitlines()]
    return [line[2] for line in lines if int(line[0]) in groups and line[1][0] != "Z"]


def wait_for(condition, seconds: float) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.2)


def numbers(run: Path) -> dict[str, bytes]:
    """Every number of the server's state at each checkpoint."""
    folder = run / "checkpoint"
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.safetensors")}


@pytest.mark.slow
def test_three_sites_with_tls_and_node_keys_give_the_local_bits(tmp_path):
    write_photos(tmp_path)
    here = {"data_path": str(tmp_path / "all.csv"), "secret_file": str(tmp_path / "secret")}
    pooled = Config(**SETTINGS, data="csv", **here)
    fedss.train(pooled, tmp_path / "local", on_round=lambda record: None)
    app = ["app", str(tmp_path / "app"), "--out", str(tmp_path / "apart"), "--sites", "3"]
    app += [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
    assert main(app) == 0
    with place(tmp_path / "federation", sites=4) as federation:
        superlink(federation)
        superexec(federation)
        for number, name in enumerate(SITES):
            register(federation, number)
            site(federation, number, site_of(tmp_path, f"{name}.csv"))
        stranger = site(federation, 3, site_of(tmp_path, "north.csv"))  # a key of nobody's
        log = federation.folder / "logs" / "site-3.log"
        run = submit(federation, tmp_path / "app")
        wait_for(lambda: "Failed to activate SuperNode" in log.read_text(), 60)
        kill(stranger)
        assert "SuperNode ID" not in log.read_text()
        lines = list(follow(federation, run))
        assert status(federation, run) == "finished:completed", lines
        groups = [process.pid for process in federation.processes]
        assert living(groups)
    assert not living(groups)
    assert os.stat(federation.folder / "keys" / "site-1").st_mode & 0o077 == 0
    assert numbers(tmp_path / "apart") == numbers(tmp_path / "local")
    assert len(numbers(tmp_path / "apart")) > 0


LEFT_ALONE = """
import sys, time
from examples.federation import place, superexec, superlink
with place(sys.argv[1], sites=0) as here:
    superlink(here)
    superexec(here)
    print(*[process.pid for process in here.processes], flush=True)
    time.sleep(600)
"""


def test_nothing_outlives_a_program_that_is_killed(tmp_path):
    program = subprocess.Popen(
        [sys.executable, "-c", LEFT_ALONE, tmp_path], stdout=subprocess.PIPE, text=True
    )
    with program:
        groups = [int(word) for word in program.stdout.readline().split()]
        assert len(living(groups)) == 2
        program.send_signal(signal.SIGKILL)
    wait_for(lambda: not living(groups), 10)
