"""Where what is made once for a user is kept."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_home"]


def cache_home() -> Path:
    """``RETRIEVAL_DRAFT_HOME``, else ``retrieval_draft`` in the user's cache folder."""
    named = os.environ.get("RETRIEVAL_DRAFT_HOME")
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "retrieval_draft"
