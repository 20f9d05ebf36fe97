"""Pools of the C library's malloc in a server process."""

from __future__ import annotations

import ctypes
import os

__all__ = ["limit_malloc_pools"]

_M_ARENA_MAX = -8
"""Of mallopt in glibc's malloc.h."""


def limit_malloc_pools(count: int = 1) -> bool:
    """Limits the pools ("arenas") that glibc's malloc makes for the threads of this process.

    By default each thread has one, up to eight a core. What one thread allocates and another frees returns
    to the first one's pool, so that a server, whose prompts are prepared, decoded and learned by different
    threads, holds free pieces in all of them, and more with every hour. To be called before threads begin:
    pools that are there remain. `MALLOC_ARENA_MAX` and `GLIBC_TUNABLES` precede it.

    Args:
        count: Pools at most.

    Returns:
        True if it is set; False where the environment sets it, or the C library is another one.
    """
    if "MALLOC_ARENA_MAX" in os.environ or "glibc.malloc.arena_max" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    try:
        library = ctypes.CDLL(None)
        _ = library.gnu_get_libc_version
        mallopt = library.mallopt
    except (OSError, TypeError, AttributeError):  # Windows has no library without a name
        return False
    return bool(mallopt(_M_ARENA_MAX, count))
