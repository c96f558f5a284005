"""What clients keep from the server: how it is made and read, and what is derived from it.

A secret has at least 256 random bits, so nobody finds it by trying, with whatever was derived from
it. Each purpose has a label of its own (HMAC-SHA256, a pseudorandom function): who knows what was
derived for one knows nothing of the others.
"""

import hmac
import os
import re
import secrets
import stat
from itertools import pairwise
from pathlib import Path

from fedss.errors import ConfigError

_DIGITS = 64  # hexadecimal: 256 bits
_MAKE = "make one with: fedss secret FILE"


def make_secret(path: Path) -> None:
    """Write a new secret, 64 hexadecimal digits, into a new file that its owner alone may read.

    Raises:
        ConfigError: there is such a file, or it cannot be written.
    """
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(_DIGITS // 2) + "\n")
    except FileExistsError as error:
        raise ConfigError(
            f"{path} is there already, and runs that began with it need it; choose another name"
        ) from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot write it: {error.strerror}") from error


def read_secret(path: Path, setting: str) -> bytes:
    """The secret in a file, for the setting that names it.

    Raises:
        ConfigError: it cannot be read, others may read it, or it is not random.
    """
    named = f"{setting} {path}"
    try:
        with path.open("rb") as file:
            mode, digits = stat.S_IMODE(os.fstat(file.fileno()).st_mode), file.read(1 << 16).strip()
    except OSError as error:
        raise ConfigError(f"{named}: cannot read it: {error.strerror}; {_MAKE}") from error
    if mode & 0o007:
        raise ConfigError(
            f"{named}: expected a file that others cannot read or write, got mode {mode:o}; "
            "chmod 600, and make a new one if others may have seen it"
        )
    hexadecimal = re.fullmatch(rb"([0-9a-fA-F]{2})*", digits)
    if len(digits) < _DIGITS or not hexadecimal:
        what = "hexadecimal digits" if hexadecimal else "bytes of something else"
        raise ConfigError(
            f"{named}: expected at least {_DIGITS} hexadecimal digits at random, which no "
            f"passphrase is, got {len(digits)} {what}; {_MAKE}"
        )
    if _is_regular(bytes.fromhex(digits.decode())):
        raise ConfigError(f"{named}: expected digits at random, got a pattern; {_MAKE}")
    return digits


def _is_regular(content: bytes) -> bool:
    """Whether bytes repeat, or step evenly.

    Of 32 random bytes 30 are different, on average; 16 or fewer once in 10^13 secrets.
    """
    steps = {(after - before) % 256 for before, after in pairwise(content)}
    return min(len(set(content)), len(steps)) <= 16


def derive(secret: bytes, label: str, text: str = "") -> bytes:
    """HMAC-SHA256 of a purpose and what it is about, 256 bits; ``label`` has no NUL."""
    # Names of folders may hold bytes that are no UTF-8.
    message = f"{label}\0{text}".encode("utf-8", "surrogateescape")
    return hmac.digest(secret, message, "sha256")


def draw_key(secret: bytes) -> bytes:
    """What the draws of clients are keyed by, see :func:`fedss.seeds.generator`."""
    return derive(secret, "draws")


def proof(secret: bytes) -> str:
    """By which two see that they have the same secret: 128 bits in hex, which may be shown."""
    return derive(secret, "proof").hex()[:32]
