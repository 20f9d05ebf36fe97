"""Where what is made once for a user is kept."""

from __future__ import annotations

import os
import tempfile
from functools import cache
from pathlib import Path

__all__ = ["cache_home"]


def cache_home() -> Path:
    """``RETRIEVAL_DRAFT_HOME``, else ``retrieval_draft`` in the user's cache folder.

    A user without a home, as containers with any user id have, gets a temporary folder for the process.
    """
    named = os.environ.get("RETRIEVAL_DRAFT_HOME")
    try:
        if named:
            return Path(named).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "retrieval_draft"
    except RuntimeError:
        return _temporary()


@cache
def _temporary() -> Path:
    return Path(tempfile.mkdtemp(prefix="retrieval_draft-"))
