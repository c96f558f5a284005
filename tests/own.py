"""Code of a user's own in a folder that is the current one: what tests of it begin with."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

NETS = """
import pathlib

import torch
from torch import nn

with pathlib.Path({log!r}).open("a") as file:
    file.write("imported\\n")


def net(channels, image_size):
    assert image_size == 12
    torch.randn(3)
    return nn.Sequential(nn.Conv2d(channels, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten())


class Net(nn.Module):
    def __init__(self, channels=1, width=4):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(channels, width, 4, stride=4), nn.Flatten())

    def forward(self, pixels):
        return self.body(pixels)
"""


@contextmanager
def code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module ``nets`` in ``folder``, which becomes the current one; it is forgotten afterwards.

    Gives the file in which each import of it leaves a line.
    """
    log = folder / "imports.log"
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (folder / "nets.py").write_text(NETS.format(log=str(log)))
    try:
        yield log
    finally:
        forget(folder)


def forget(folder: Path) -> None:
    """Forget the modules that were imported from a folder."""
    for name, module in [*sys.modules.items()]:
        if str(getattr(module, "__file__", None)).startswith(str(folder)):
            del sys.modules[name]
