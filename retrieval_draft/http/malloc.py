"""Memory that the C library's malloc keeps in a server process."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from typing import Any

__all__ = ["TRIM_SECONDS", "keep_malloc_small"]

TRIM_SECONDS = 30.0
"""From trim to trim. One takes some 20 ms, in which threads that allocate wait."""

_M_ARENA_MAX = -8
"""Of mallopt, as in glibc's malloc.h."""


def keep_malloc_small(seconds: float = TRIM_SECONDS) -> bool:
    """Keeps the memory of a process near what is in use, whatever it allocates and frees.

    glibc's malloc makes a pool ("arena") for each thread, up to eight a core, and a block returns to the pool
    that it came from. A server's texts are prepared, decoded and learned by different threads, and live from
    milliseconds to days, so free pieces between them collect in every pool, more with every request. Hence
    there is one pool, unless `MALLOC_ARENA_MAX` or `GLIBC_TUNABLES` names a number, and a thread that returns
    the free pages to the system at times. To be called once, before threads begin: pools that are there stay.

    Args:
        seconds: From trim to trim.

    Returns:
        False where the C library is another one; nothing is done then.
    """
    try:
        library = ctypes.CDLL(None)
        _ = library.gnu_get_libc_version
    except (OSError, TypeError, AttributeError):  # Windows has no library without a name
        return False
    if "MALLOC_ARENA_MAX" not in os.environ and "malloc.arena_max" not in os.environ.get(
        "GLIBC_TUNABLES", ""
    ):
        library.mallopt(_M_ARENA_MAX, 1)
    threading.Thread(target=_trim, args=(library, seconds), name="retrieval_draft trim", daemon=True).start()
    return True


def _trim(library: Any, seconds: float) -> None:
    while True:
        time.sleep(seconds)
        library.malloc_trim(0)
