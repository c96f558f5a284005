"""The GPU's benchmark runs as far as it can without one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "gpu.txt"


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "benchmarks/gpu.py", *words]
    path = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=path, capture_output=True, text=True)


def test_a_tiny_version_of_every_part_runs_and_writes_nothing():
    before = RESULTS.read_bytes() if RESULTS.exists() else None
    done = run("--device", "cpu", "--short")
    assert done.returncode == 0, done.stderr
    for words in ("engine, stack 32", "plain loop", "one batch of", "EXTRAPOLATED, not run: 5,000"):
        assert words in done.stdout
    assert (RESULTS.read_bytes() if RESULTS.exists() else None) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_without_a_gpu_it_says_so_in_a_line():
    done = run()
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("gpu.py: device: cuda means GPU 0 of this machine")
