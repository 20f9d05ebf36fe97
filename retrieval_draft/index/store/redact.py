"""URLs of stores without secrets, for logs and files."""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

__all__ = ["without_credentials"]

_SECRET = re.compile(r"(?!ssl_).*(user|pass|secret|token|key|auth|sig)", re.IGNORECASE)


def without_credentials(url: str) -> str:
    """A URL without user, password, and parameters whose name suggests a secret; anything else as it is.

    Example:
        "rediss://me:word@host:6379/0?password=word&db=1"  ->  "rediss://host:6379/0?db=1"
    """
    parts = urlsplit(url)
    if not parts.scheme or "://" not in url:
        return url
    host = parts.netloc.rpartition("@")[2]
    pairs = parse_qsl(parts.query, keep_blank_values=True)
    kept = [(name, value) for name, value in pairs if not _SECRET.match(name)]
    query = parts.query if len(kept) == len(pairs) else urlencode(kept)
    changed = urlunsplit((parts.scheme, host, parts.path, query, parts.fragment))
    # urlunsplit drops an empty host before an absolute path, as in unix:///socket.
    return url if (host, query) == (parts.netloc, parts.query) else changed
