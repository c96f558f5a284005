"""What the C library does with memory that is freed."""

import ctypes
import os

# glibc's mallopt: parameter, value, and the environment variable that sets the same.
# Older versions refuse a threshold above 32 MB. Without any the other two would do harm: they end
# glibc's own adaptation of it.
_SETTINGS = (
    (-3, (2**30, 2**25), "MALLOC_MMAP_THRESHOLD_"),
    (-1, (2**31 - 1,), "MALLOC_TRIM_THRESHOLD_"),
    (-2, (2**26,), "MALLOC_TOP_PAD_"),
)


def keep_freed_memory() -> bool:
    """Have glibc keep what is freed for the next allocation; for this process, from now on.

    A training step allocates and frees the same large blocks each time. glibc would give them back
    to the system and take new ones, which the system fills with zeros. Instead the process holds on
    to the most it ever needed, up to 2 GB; no result changes by a bit.

    False where glibc did not take the settings, or the C library is another (macOS, Windows, musl).
    What the user has set by glibc's own environment variables stays.
    """
    try:
        libc = ctypes.CDLL(None)
        mallopt = libc.mallopt if hasattr(libc, "gnu_get_libc_version") else None
    except (OSError, TypeError):  # TypeError: Windows has no library without a name
        mallopt = None
    if mallopt is None:
        return False
    return all(
        name in os.environ or any(mallopt(parameter, value) for value in values)
        for parameter, values, name in _SETTINGS
    )
