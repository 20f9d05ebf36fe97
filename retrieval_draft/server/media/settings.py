"""Limits on images and sounds in requests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from retrieval_draft.errors import InvalidInputError

__all__ = ["MediaSettings"]


@dataclass(frozen=True, slots=True)
class MediaSettings:
    """Sources that images and sounds may have besides the request itself, and their limits.

    Attributes:
        folder: Files below it may be named by ``file:`` URLs; None for none.
        fetches: Whether http and https URLs are fetched; never from private addresses.
        max_images: In one request, sounds included.
        max_bytes: Of one of them, as it is stored or sent.
        max_pixels: Of one image; more would take much memory, however few bytes they are packed into.
        seconds: For one file from the network, redirects included.
        max_sound_seconds: Length of one sound.
    """

    folder: Path | None = None
    fetches: bool = False
    max_images: int = 16
    max_bytes: int = 16 << 20
    max_pixels: int = 1 << 24
    seconds: float = 10.0
    max_sound_seconds: float = 300.0

    def __post_init__(self) -> None:
        if self.folder is not None and not self.folder.is_dir():
            raise InvalidInputError(f"The folder of images {str(self.folder)!r} does not exist.")
        limits = (
            ("max_images", self.max_images, 0, 1024),
            ("max_bytes", self.max_bytes, 1, 1 << 32),
            ("max_pixels", self.max_pixels, 1, 1 << 30),
            ("seconds", self.seconds, 0.01, 600.0),
            ("max_sound_seconds", self.max_sound_seconds, 0.01, 3600.0),
        )
        for name, value, low, high in limits:
            if not low <= value <= high:
                raise InvalidInputError(f"{name} is {value}; it must lie in {low}..{high}.")
