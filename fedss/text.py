"""Text for people: what comes from elsewhere (names of files, labels, what a server says), made fit
to be shown, and numbers as people read them."""

import codecs
import math
from collections.abc import Sequence

DASH = "–"
"""In place of a missing number."""


def printable(text: str) -> str:
    """One line that does nothing to a terminal, whatever the text has in it.

    Control characters, line breaks, marks of direction and bytes that are no text become escapes,
    as in ``\\x1b`` and ``\\u202e``; all else stays.
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def one_line(error: Exception) -> str:
    """An exception of somebody else's code in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def encodable(text: str, encoding: str | None) -> str:
    """The text in what an encoding has, the rest of it as escapes: none is taken for another."""
    return text.encode(encoding, "backslashreplace").decode(encoding) if encoding else text


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    shown = (_ALIKE.get(c) or c.encode("ascii", "backslashreplace").decode() for c in letters)
    return "".join(shown), error.end


PLAIN = "fedss.plain"
"""An error handler, as ``str.encode`` takes one: our own words in what an encoding has."""
_ALIKE = {"–": "-", "—": "-", "…": "...", "×": "x", "≤": "<=", "≥": ">=", "‖": "|", "·": "."}
codecs.register_error(PLAIN, _plain)


def counted(number: int, noun: str) -> str:
    """A number and what it counts: ``1 round``, ``1,200 rounds``, ``2 classes``, ``0 queries``."""
    return f"{number:,} {plural(noun, number)}"


def plural(noun: str, number: float) -> str:
    """The noun, in the plural unless the number is 1."""
    if number == 1:
        return noun
    if noun.endswith("y"):
        return f"{noun[:-1]}ies"
    return f"{noun}es" if noun.endswith("s") else f"{noun}s"


def human_bytes(count: float | None) -> str:
    """Three significant digits with a decimal unit: 1234567 -> ``1.23 MB``."""
    if count is None or not math.isfinite(count):
        return DASH
    unit = 0
    while count >= 999.5 and unit < 5:
        count, unit = count / 1000, unit + 1
    digits = 0 if unit == 0 or count >= 99.95 else 1 if count >= 9.995 else 2
    return f"{count:.{digits}f} {('B', 'kB', 'MB', 'GB', 'TB', 'PB')[unit]}"


def human_seconds(seconds: float | None) -> str:
    """``42 s``, ``3 min 20 s``, ``2 h 05 min``."""
    if seconds is None or not math.isfinite(seconds):
        return DASH
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def decimals(value: float | None, digits: int = 3) -> str:
    """``value`` with ``digits`` decimals, a dash for nothing."""
    return DASH if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def spaced(value: float | None) -> str:
    """A whole number with thin spaces between thousands."""
    grouped = DASH if value is None or not math.isfinite(value) else f"{value:,.0f}"
    return grouped.replace(",", "\u202f")


def tally(value: float, noun: str) -> str:
    """A number as :func:`spaced` shows it, and what it counts as :func:`counted` does."""
    return f"{spaced(value)} {plural(noun, value)}"


def listed(names: Sequence[str]) -> str:
    """``a, b and c``."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
