"""What may be meant by the name of an image file that is not there."""

import os
import re
import unicodedata
from urllib.parse import unquote

from fedss.data.names import composed

_ADDRESS = re.compile(r"(?:^|/)[a-z][a-z0-9+.-]+:/", re.IGNORECASE)
_HOME = re.compile(r"(?:^|/)~[\w-]*/")


def why_missing(file: str) -> str:
    """A hint for a message, which begins with "; ", or nothing.

    Args:
        file: The path where it was looked for: what a list has, behind the list's folder.
    """
    if _ADDRESS.search(file):
        return "; this is an address: images are read from files, so fetch them first"
    if _HOME.search(file):
        return "; '~' stands for no folder here: write the whole path"
    for form in ("NFC", "NFD"):
        if _is_other(unicodedata.normalize(form, file), file):
            return f"; this one is there under the same name in another Unicode form, {form}"
    slashed = file.replace("\\", "/")
    if _is_other(slashed, file):
        return "; this one is there with '/' in place of '\\': write '/'"
    if _is_other(unquote(file), file):
        return f"; this one is there as {unquote(file)}: write it without %"
    if alike := _alike(slashed):
        return f"; there is {alike}: upper and lower case differ, and so do unseen characters"
    if "\\" in file:
        return "; write '/' in place of '\\', and paths as they are on this machine"
    parts = file.strip("/").split("/")
    for start in range(1, len(parts)):
        if os.path.isfile("/".join(parts[start:])):
            return f"; {'/'.join(parts[start:])} is there from the folder that you are in"
    return ""


def _is_other(other: str, file: str) -> bool:
    return other != file and os.path.isfile(other)


def _alike(file: str) -> str | None:
    """The file whose path differs in letter case and in what nobody sees, at most."""
    place = "/"
    for part in os.path.normpath(file).split("/")[1:]:
        inside = os.path.join(place, part)
        if not os.path.exists(inside):
            try:
                entries = sorted(os.listdir(place))
            except OSError:
                return None
            same = [entry for entry in entries if _plain(entry) == _plain(part)]
            if not same:
                return None
            inside = os.path.join(place, same[0])
        place = inside
    return place if os.path.isfile(place) else None


def _plain(name: str) -> str:
    return composed(name).casefold()
