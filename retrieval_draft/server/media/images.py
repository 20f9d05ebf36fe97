"""Images of requests: from data URLs, files below one folder, or the network."""

from __future__ import annotations

import base64
import binascii
import os
import stat
import warnings
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from retrieval_draft.server.errors import ApiError
from retrieval_draft.server.media.fetch import Fetcher
from retrieval_draft.server.media.settings import MediaSettings

__all__ = ["ImageReader"]

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_PARAM = "messages"


class ImageReader:
    """Reads the images that requests name.

    Args:
        settings: Allowed sources, and limits.
    """

    def __init__(self, settings: MediaSettings) -> None:
        self._settings = settings
        self._folder = None if settings.folder is None else settings.folder.resolve()
        self.fetcher = Fetcher(settings.max_bytes, settings.seconds)

    def read(self, url: str) -> Any:
        """The image at a URL, upright, in RGB: as of ``transformers.image_utils.load_image``.

        Raises:
            ApiError: It is not allowed, not there, or no image.
        """
        return self._decode(self._bytes(url))

    def _bytes(self, url: str) -> bytes:
        scheme = url[:8].split(":", 1)[0].lower()
        if scheme == "data":
            return self._inline(url)
        if scheme == "file":
            return self._file(url)
        if scheme in ("http", "https"):
            if not self._settings.fetches:
                raise ApiError(
                    400, "This server fetches no images; send them as data URLs, or --fetch-images.", _PARAM
                )
            return self.fetcher.get(url)
        raise ApiError(400, f"An image's URL begins with {url[:16]!r}; data: is what is read.", _PARAM)

    def _inline(self, url: str) -> bytes:
        head, comma, content = url.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise ApiError(400, "An image's data URL is not of the form data:image/png;base64,...", _PARAM)
        if len(content) > self._settings.max_bytes * 4 // 3 + 4:
            raise self._too_long()
        try:
            return base64.b64decode(content, validate=True)
        except (binascii.Error, ValueError) as error:
            raise ApiError(400, f"An image's data URL is no base64: {error}.", _PARAM) from error

    def _file(self, url: str) -> bytes:
        refused = ApiError(400, "An image's file is not below the folder that this server reads.", _PARAM)
        if self._folder is None:
            raise ApiError(400, "This server reads no files; send images as data URLs.", _PARAM)
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

    def _decode(self, content: bytes) -> Any:
        image_module, operations = _pillow()
        try:
            image = image_module.open(BytesIO(content), formats=_FORMATS)
            pixels = image.width * image.height
            if pixels > self._settings.max_pixels:
                raise ApiError(
                    400, f"An image has {pixels} pixels; {self._settings.max_pixels} are allowed.", _PARAM
                )
            return operations.exif_transpose(image).convert("RGB")
        except ApiError:
            raise
        except Exception as error:  # of a decoder, which torn files make raise anything
            raise ApiError(
                400, f"An image is torn, or none of {', '.join(_FORMATS)}: {type(error).__name__}.", _PARAM
            ) from error

    def _too_long(self) -> ApiError:
        return ApiError(400, f"An image has more than {self._settings.max_bytes} bytes.", _PARAM)


def _pillow() -> tuple[Any, Any]:
    try:
        from PIL import Image, ImageOps
    except ModuleNotFoundError as error:
        raise ApiError(
            400, "Images need Pillow, which this server lacks: retrieval_draft[images].", _PARAM
        ) from error
    # The limit here is lower. Not for a while only: on several threads that would end in a lasting change.
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    return Image, ImageOps
