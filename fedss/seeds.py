"""Random generators, one for each draw, so that no draw depends on any other."""

import hashlib

import numpy as np


def generator(seed: int, purpose: str, round: int = 0, client: int = 0) -> np.random.Generator:
    """The generator for one draw, keyed by (seed, purpose, round, client).

    The key is hashed (SHA-256), so neighbouring keys give unrelated streams. Nothing is read from
    or written to global state: the order of calls, threads and processes does not matter.

    Args:
        seed: the run's seed, any integer.
        purpose: what is drawn, e.g. ``"cohort"``; separates draws that share the other keys.
        round: 0-based round number.
        client: client number.
    """
    key = f"{seed}/{purpose}/{round}/{client}".encode()
    return np.random.default_rng(int.from_bytes(hashlib.sha256(key).digest()))
