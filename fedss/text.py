"""Text from elsewhere (names of files, labels, what a server says), fit to be shown."""


def printable(text: str) -> str:
    """One line that does nothing to a terminal, whatever the text has in it.

    Control characters, line breaks, marks of direction and bytes that are no text become escapes,
    as in ``\\x1b`` and ``\\u202e``; all else stays.
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
