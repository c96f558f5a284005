"""Text from elsewhere (names of files, labels, what a server says), fit to be shown."""

import codecs


def printable(text: str) -> str:
    """One line that does nothing to a terminal, whatever the text has in it.

    Control characters, line breaks, marks of direction and bytes that are no text become escapes,
    as in ``\\x1b`` and ``\\u202e``; all else stays.
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def counted(number: int, noun: str) -> str:
    """A number and what it counts: ``1 round``, ``1,200 rounds``, ``2 classes``, ``0 queries``."""
    return f"{number:,} {plural(noun, number)}"


def plural(noun: str, number: float) -> str:
    """The noun, in the plural unless there is one of it."""
    if number == 1:
        return noun
    if noun.endswith("y"):
        return f"{noun[:-1]}ies"
    return f"{noun}es" if noun.endswith("s") else f"{noun}s"


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
