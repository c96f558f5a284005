"""Numbers and what they count."""

import pytest

from fedss.text import counted, tally


@pytest.mark.parametrize(
    ("number", "noun", "expected"),
    [
        (0, "query", "0 queries"),
        (1, "query", "1 query"),
        (1, "training class", "1 training class"),
        (2, "training class", "2 training classes"),
        (1, "round", "1 round"),
        (1200, "round", "1,200 rounds"),
    ],
)
def test_one_of_a_kind_is_no_plural(number, noun, expected):
    assert counted(number, noun) == expected
    assert tally(number, noun) == expected.replace(",", "\u202f")
