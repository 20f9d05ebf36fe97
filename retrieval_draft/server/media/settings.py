"""Limits on images and sounds in requests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from retrieval_draft._settings import Range, check_ranges
from retrieval_draft.errors import InvalidInputError

__all__ = ["MediaSettings"]


@dataclass(frozen=True, slots=True)
class MediaSettings:
    """Sources that images and sounds may have besides the request itself, and their limits.

    Attributes:
        folder: Requests may name images and sounds below this folder: file:///FOLDER/a.png.
        fetches: Requests may name files of public addresses: https://... Private ones are never fetched.
        max_images: In one request, sounds included.
        max_bytes: Of one of them, as it is stored or sent.
        max_pixels: Of one image; more would take much memory, however few bytes they are packed into.
        seconds: For one file from the network, redirects included.
        max_sound_seconds: Length of one sound.
    """

    folder: Path | None = None
    fetches: bool = False
    max_images: Annotated[int, Range(0, 1024)] = 16
    max_bytes: Annotated[int, Range(1, 1 << 32)] = 16 << 20
    max_pixels: Annotated[int, Range(1, 1 << 30)] = 1 << 24
    seconds: Annotated[float, Range(0.01, 600.0)] = 10.0
    max_sound_seconds: Annotated[float, Range(0.01, 3600.0)] = 300.0

    def __post_init__(self) -> None:
        if self.folder is not None and not self.folder.is_dir():
            raise InvalidInputError(f"The folder of images {str(self.folder)!r} does not exist.")
        check_ranges(self)
