"""Where what is made once for a user is kept."""

from __future__ import annotations

import os
import tempfile
from functools import cache
from pathlib import Path

__all__ = ["cache_home", "expanded"]


def expanded(path: str | os.PathLike[str]) -> Path:
    """A path with its ~ replaced by the home it stands for; as it is where there is no such home."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def cache_home() -> Path:
    """``RETRIEVAL_DRAFT_HOME``, else ``retrieval_draft`` in the user's cache folder.

    A user without a home, as containers with any user id have, gets a temporary folder for the process.
    """
    named = os.environ.get("RETRIEVAL_DRAFT_HOME")
    home = expanded(named or os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    if home.parts[:1] and home.parts[0].startswith("~"):
        return _temporary()
    return home if named else home / "retrieval_draft"


@cache
def _temporary() -> Path:
    return Path(tempfile.mkdtemp(prefix="retrieval_draft-"))
