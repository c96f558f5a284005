import hashlib
import hmac

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedss.seeds import generator

KEYS = st.tuples(
    st.integers(0, 2**40),
    st.sampled_from(["cohort", "classes"]),
    st.integers(0, 9),
    st.integers(0, 9),
)


@given(KEYS, KEYS)
def test_equal_keys_give_equal_streams_and_others_do_not(one, other):
    a, b = (generator(*key).integers(0, 2**63, 4).tolist() for key in (one, other))
    assert (a == b) == (one == other)


def test_global_state_is_neither_read_nor_written():
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    first = generator(1, "x").random()
    assert np.array_equal(before[0], np.random.get_state()[1])  # noqa: NPY002
    assert torch.equal(before[1], torch.get_rng_state())
    np.random.seed(5)  # noqa: NPY002
    assert generator(1, "x").random() == first


def test_a_secret_keys_the_stream_and_without_one_it_is_what_it_was():
    """Against the formulas, written out."""
    text = b"7/classes/3/12"
    for secret, digest in (
        (None, hashlib.sha256(text).digest()),
        (b"k" * 32, hmac.new(b"k" * 32, text, hashlib.sha256).digest()),
    ):
        expected = np.random.default_rng(int.from_bytes(digest)).random(4)
        assert np.array_equal(generator(7, "classes", 3, 12, secret).random(4), expected)
