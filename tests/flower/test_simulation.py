"""A real ``flwr run``: Flower's simulation, with its own processes, gives the local bits."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

import fedss
from fedss.cli import main

BIN = Path(sys.executable).parent
SETTINGS = {
    "data": "glyphs",
    "glyphs_classes": 40,
    "glyphs_clients": 8,
    "clients_per_round": 4,
    "sample_size": 12,
    "backbone": "conv4-8",
    "rounds": 3,
    "eval_every": 3,
    # `auto` would be other numbers in a federation, which does not know its images beforehand.
    "server_momentum": 0.9,
    "class_row_lr": 2.0,
}


@contextmanager
def superlink(folder: Path) -> Iterator[dict[str, str]]:
    """A SuperLink that simulates nodes; gives the environment of ``flwr`` commands."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{port}"\n'
        "insecure = true\n"
    )
    environment = os.environ | {
        "FLWR_HOME": str(folder),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        # What the processes import is what this test does.
        "PYTHONPATH": str(Path(fedss.__file__).parents[1]),
    }
    words = ["--insecure", "--simulation", "--disable-runtime-dependency-installation"]
    with (folder / "superlink.log").open("wb") as log:
        process = subprocess.Popen(
            [BIN / "flower-superlink", *words, "--port", str(port)],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        # flwr does not wait for it.
        for _ in range(600):
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.1)
        yield environment
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


@pytest.mark.slow
def test_a_simulation_gives_the_local_bits(tmp_path):
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
    out, flower = tmp_path / "apart", tmp_path / "flower"
    flower.mkdir()
    own = ["--out", str(out), "--sites", "2", "--evaluate-at", "server"]
    assert main(["app", str(tmp_path / "app"), *own, *options]) == 0
    with superlink(flower) as environment:
        run = subprocess.run(
            [BIN / "flwr", "run", tmp_path / "app", "--stream"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert "fedss: done" in run.stdout, run.stdout + run.stderr
    local = fedss.train(fedss.Config(**SETTINGS), tmp_path / "local", on_round=lambda record: None)
    weights = [f / "model" / "model.safetensors" for f in (out, local.folder)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert fedss.load(out).spec == local.embedder.spec
