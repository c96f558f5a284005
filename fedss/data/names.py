"""The one rule for names of classes and clients, and which names look alike."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from functools import lru_cache

# Unicode's Default_Ignorable_Code_Point (DerivedCoreProperties.txt) without what shapes its
# neighbours: joiners (below), variation selectors and tags, of which flags are made. And controls,
# and the pattern of Braille without a dot.
_INVISIBLE = re.compile(
    "[\0-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b\u200e"
    "\u200f\u202a-\u202e\u2060-\u206f\u2800\u3164\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3"
    "\U0001d173-\U0001d17a\U000e0000-\U000e001f\U000e0080-\U000e00ff\U000e01f0-\U000e0fff]"
)
_JOINERS = "\u200c\u200d"
_SELECTORS = re.compile("[\u180b-\u180d\u180f\u200c\u200d\ufe00-\ufe0f\U000e0020-\U000e01ef]")

# Of Unicode's confusables.txt (UTS 39): letters of two alphabets drawn as those of a third.
_DRAWN_AS = str.maketrans(
    "АВЕЅІЈКМНОРСТХУаеѕіјорсхуԁһԛԝΑΒΕΖΗΙΚΜΝΟΡΤΥΧονІⅼ",
    "ABESIJKMHOPCTXYaesijopcxydhqwABEZHIKMNOPTYXovIl",
)
_DASHES = re.compile("[\u2010-\u2015\u2212]")
_QUOTES = str.maketrans("\u2018\u2019\u201c\u201d\u2032\u2033`", "''\"\"'\"'")


@lru_cache(2**16)
def composed(name: str) -> str:
    """The name of a client or a class: in Unicode's form NFC, as far as one can see it.

    The one rule for names, wherever they come from. Two that are the same after this are one client
    or one class: spaces of any kind and number count as one, none at either end, and invisible
    characters are left out; joiners stay where they shape letters or an emoji (UAX 31, section
    2.3). macOS writes names of files decomposed (NFD), most others composed (Unicode Standard
    Annex 15): without this, one name at two sites would be two.
    """
    if name.isascii() and name.isprintable():
        return " ".join(name.split())
    kept = _INVISIBLE.sub("", name)
    kept = "".join(
        character
        for place, character in enumerate(kept)
        if character not in _JOINERS
        or _shapes(kept[place - 1 : place], kept[place + 1 : place + 2])
    )
    return " ".join(unicodedata.normalize("NFC", kept).split())


def _shapes(before: str, after: str) -> bool:
    """Whether a joiner between these two characters changes how they look."""
    if not before or not after or after.isspace():
        return False
    return (
        unicodedata.bidirectional(before) == "AL"
        or unicodedata.combining(before) == 9
        or unicodedata.category(before) in ("So", "Sk")
        or before == "\ufe0f"
    )


@lru_cache(2**16)
def _drawn(name: str) -> str:
    plain = unicodedata.normalize("NFKC", _SELECTORS.sub("", name)).translate(_DRAWN_AS)
    return _DASHES.sub("-", plain).translate(_QUOTES).casefold()


def look_alikes(names: Iterable[str], kind: str) -> tuple[str, ...]:
    """A remark on names that are different and that people would take for one; none: ().

    Such are names in other letter case, in letters of two alphabets, in full and half width.
    ``kind`` is what they name, in the plural.
    """
    groups = defaultdict(set)
    for name in names:
        groups[_drawn(name)].add(name)
    alike = [sorted(group) for group in groups.values() if len(group) > 1]
    if not alike:
        return ()
    # Seen, they are the same: what differs is written by its number.
    first = "; ".join(" and ".join(map(ascii, group)) for group in alike[:3])
    more = f"; and {len(alike) - 3} more" if len(alike) > 3 else ""
    return (f"{kind} whose names look alike are kept apart: {first}{more}",)
