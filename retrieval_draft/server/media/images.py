"""Images of requests."""

from __future__ import annotations

import warnings
from io import BytesIO
from typing import Any

from retrieval_draft.server.errors import ApiError
from retrieval_draft.server.media.files import PARAM, MediaFiles
from retrieval_draft.server.media.settings import MediaSettings

__all__ = ["ImageReader"]

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


class ImageReader:
    """Reads the images that requests name.

    Args:
        settings: Allowed sources, and limits.
    """

    def __init__(self, settings: MediaSettings) -> None:
        self._settings = settings
        self._files = MediaFiles(settings, "image")

    def read(self, url: str) -> Any:
        """The image at a URL, upright, in RGB: as of ``transformers.image_utils.load_image``.

        Raises:
            ApiError: It is not allowed, not there, or no image.
        """
        return self._decode(self._files.content(url))

    def _decode(self, content: bytes) -> Any:
        image_module, operations = _pillow()
        try:
            image = image_module.open(BytesIO(content), formats=_FORMATS)
            pixels = image.width * image.height
            if pixels > self._settings.max_pixels:
                raise ApiError(
                    400, f"An image has {pixels} pixels; {self._settings.max_pixels} are allowed.", PARAM
                )
            return operations.exif_transpose(image).convert("RGB")
        except ApiError:
            raise
        except Exception as error:  # of a decoder, which torn files make raise anything
            raise ApiError(
                400, f"An image is torn, or none of {', '.join(_FORMATS)}: {type(error).__name__}.", PARAM
            ) from error


def _pillow() -> tuple[Any, Any]:
    try:
        from PIL import Image, ImageOps
    except ModuleNotFoundError as error:
        raise ApiError(
            400, "Images need Pillow, which this server lacks: retrieval_draft[images].", PARAM
        ) from error
    # The limit here is lower. Not for a while only: on several threads that would end in a lasting change.
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    return Image, ImageOps
