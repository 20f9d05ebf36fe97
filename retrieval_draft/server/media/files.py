"""Content of files that requests name: from data URLs, files below one folder, or the network."""

from __future__ import annotations

import base64
import binascii
import os
import stat
from pathlib import Path
from urllib.parse import unquote, urlsplit

from retrieval_draft.server.errors import ApiError
from retrieval_draft.server.media.fetch import Fetcher
from retrieval_draft.server.media.settings import MediaSettings

__all__ = ["PARAM", "MediaFiles"]

PARAM = "messages"
"""The field that names files."""


class MediaFiles:
    """Reads files that requests name.

    Args:
        settings: Allowed sources, and limits.
        noun: "image" or "sound", for messages.
    """

    def __init__(self, settings: MediaSettings, noun: str) -> None:
        self._settings, self._noun = settings, noun
        self._folder = None if settings.folder is None else settings.folder.resolve()
        self._fetcher = Fetcher(settings.max_bytes, settings.seconds)

    def content(self, url: str) -> bytes:
        """The content of the file at a URL.

        Raises:
            ApiError: It is not allowed, not there, or too long.
        """
        scheme = url[:8].split(":", 1)[0].lower()
        if scheme == "data":
            return self._inline(url)
        if scheme == "file":
            return self._file(url)
        if scheme in ("http", "https"):
            if not self._settings.fetches:
                hint = "send them as data URLs, or --fetch-images."
                raise ApiError(400, f"This server fetches no {self._noun}s; {hint}", PARAM)
            return self._fetcher.get(url)
        raise self._refusal(f"has a URL that begins with {url[:16]!r}; data: is what is read.")

    def _inline(self, url: str) -> bytes:
        head, comma, content = url.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise self._refusal("has a data URL that is not of the form data:TYPE;base64,...")
        if len(content) > self._settings.max_bytes * 4 // 3 + 4:
            raise self._too_long()
        try:
            return base64.b64decode(content, validate=True)
        except (binascii.Error, ValueError) as error:
            raise self._refusal(f"has a data URL that is no base64: {error}.") from error

    def _file(self, url: str) -> bytes:
        refused = self._refusal("is not below the folder that this server reads.")
        if self._folder is None:
            raise ApiError(400, f"This server reads no files; send {self._noun}s as data URLs.", PARAM)
        try:
            parts = urlsplit(url)
            if parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
                raise refused
            # After all links and dots: the file that is opened.
            path = Path(unquote(parts.path, errors="strict")).resolve(strict=True)
            if not path.is_relative_to(self._folder):
                raise refused
            flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            with os.fdopen(os.open(path, flags), "rb") as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise refused
                content = file.read(self._settings.max_bytes + 1)
        except (OSError, ValueError, RuntimeError) as error:  # the same for files that are not there
            raise refused from error
        if len(content) > self._settings.max_bytes:
            raise self._too_long()
        return content

    def _too_long(self) -> ApiError:
        return self._refusal(f"has more than {self._settings.max_bytes} bytes.")

    def _refusal(self, what: str) -> ApiError:
        article = "An" if self._noun == "image" else "A"
        return ApiError(400, f"{article} {self._noun} {what}", PARAM)
