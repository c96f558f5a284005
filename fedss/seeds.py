"""Random generators, one for each draw, so that no draw depends on any other."""

import hashlib
import hmac

import numpy as np


def generator(
    seed: int, purpose: str, round: int = 0, client: int = 0, secret: bytes | None = None
) -> np.random.Generator:
    """The generator for one draw, keyed by (seed, purpose, round, client), and a secret if any.

    The key is hashed (SHA-256; with a secret HMAC-SHA256), so neighbouring keys give unrelated
    streams. Nothing is read from or written to global state: the order of calls, threads and
    processes does not matter. Without a secret, whoever knows the seed can repeat the draw.

    Args:
        seed: the run's seed, any integer.
        purpose: what is drawn, e.g. ``"cohort"``; separates draws that share the other keys.
        round: 0-based round number.
        client: client number.
        secret: 256 random bits, see :func:`fedss.secret.draw_key`.
    """
    digest = _digest(seed, purpose, round, client, secret=secret)
    return np.random.default_rng(int.from_bytes(digest))


def numbered_normals(seed: int, purpose: str, number_S: np.ndarray, size: int) -> np.ndarray:
    """Standard normals float32 [S, size]; row i depends on (seed, purpose, ``number_S[i]``) alone.

    Philox (Salmon et al. 2011) is a function of a key and a counter: the key stands for seed and
    purpose, the upper part of the counter for the number. So the numbers of any row are to be had
    without those of the rows before it. About 4 microseconds a row.

    Args:
        seed: the run's seed, any integer.
        purpose: what is drawn.
        number_S: integers from 0 to 2^63 - 1.
        size: how many for each.
    """
    bits = np.random.Philox(key=int.from_bytes(_digest(seed, purpose)[:16]))
    rng, state = np.random.Generator(bits), bits.state
    counter, normal_SD = state["state"]["counter"], np.empty((len(number_S), size), np.float32)
    for row_D, number in zip(normal_SD, number_S.tolist(), strict=True):
        counter[1] = number
        bits.state = state
        rng.standard_normal(dtype=np.float32, out=row_D)
    return normal_SD


def _digest(*key: object, secret: bytes | None = None) -> bytes:
    text = "/".join(map(str, key)).encode()
    return hashlib.sha256(text).digest() if secret is None else hmac.digest(secret, text, "sha256")


def secret_normals(
    seed: int, purpose: str, round: int, count: int, secret: bytes | None
) -> np.ndarray:
    """Standard normals float64 [count] that nobody can tell from others without the secret.

    Uniform numbers are the output of SHAKE-256 for a key made as that of :func:`generator`, normals
    are made of them by Box and Muller: up to 8.5 deviations. (What NumPy's generators give can be
    continued by whoever has seen enough of it.)
    """
    pairs = (count + 1) // 2
    key = _digest(seed, purpose, round, secret=secret)
    bits = np.frombuffer(hashlib.shake_256(key).digest(16 * pairs), "<u8").reshape(2, pairs)
    # In (0, 1]: the logarithm is finite.
    radius, angle = ((bits >> np.uint64(11)) + 1.0) * 2.0**-53
    radius = np.sqrt(-2 * np.log(radius))
    return np.concatenate([radius * np.cos(2 * np.pi * angle), radius * np.sin(2 * np.pi * angle)])[
        :count
    ]
