"""What may be meant by the name of an image file that is not there."""

import os
import re
import unicodedata
from urllib.parse import unquote

from fedss.data.names import composed

_ADDRESS = re.compile(r"(?:^|/)[a-z][a-z0-9+.-]+:/", re.IGNORECASE)
_HOME = re.compile(r"(?:^|/)~[\w-]*/")


def why_missing(file: str) -> str:
    """A hint for the end of a message, or nothing; ``file`` is the path that was looked for."""
    if _ADDRESS.search(file):
        return "; this is a URL: images are read from files, so download them first"
    if _HOME.search(file):
        return "; '~' stands for no folder here: write the whole path"
    nfc, nfd = unicodedata.normalize("NFC", file), unicodedata.normalize("NFD", file)
    slashed, unquoted = file.replace("\\", "/"), unquote(file)
    for other, hint in (
        (nfc, "under the same name in another Unicode form, NFC"),
        (nfd, "under the same name in another Unicode form, NFD"),
        (slashed, "with '/' in place of '\\': write '/'"),
        (unquoted, f"as {unquoted}: write it without %"),
    ):
        if other != file and os.path.isfile(other):
            return f"; this one is there {hint}"
    if alike := _alike(slashed):
        return f"; there is {alike}: upper and lower case differ, and so do unseen characters"
    if "\\" in file:
        return "; write '/' in place of '\\', and paths as they are on this machine"
    parts = file.strip("/").split("/")
    for start in range(1, len(parts)):
        if os.path.isfile("/".join(parts[start:])):
            return f"; {'/'.join(parts[start:])} is there from the folder that you are in"
    return ""


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
            plain = composed(part).casefold()
            same = [entry for entry in entries if composed(entry).casefold() == plain]
            if not same:
                return None
            inside = os.path.join(place, same[0])
        place = inside
    return place if os.path.isfile(place) else None
