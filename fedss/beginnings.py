"""What a file is that should be something else, told by how it begins."""

import codecs

LENGTH = 512
"""Bytes that are enough to tell."""

_BEGINNINGS = (
    (
        b"version https://git-lfs",
        "is a pointer of Git LFS, not the file it stands for: git lfs pull",
    ),
    (b"<!doctype", "is a web page: download the file itself"),
    (b"<html", "is a web page: download the file itself"),
    (b"<?xml", "is XML, perhaps an error of the server that it was downloaded from"),
    (b"\x1f\x8b", "is compressed with gzip: unpack it first"),
    (b"bzh", "is compressed with bzip2: unpack it first"),
    (b"\xfd7zxz", "is compressed with xz: unpack it first"),
    (b"\x89hdf", "is HDF5, as Keras writes it"),
)


def what_begins(start: bytes) -> str:
    """What a file is, and what to do, to follow its name; empty where nothing tells.

    Args:
        start: its first ``LENGTH`` bytes, or all.
    """
    text = start.removeprefix(codecs.BOM_UTF8).lstrip().lower()
    return next((what for beginning, what in _BEGINNINGS if text.startswith(beginning)), "")
