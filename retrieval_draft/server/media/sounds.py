"""Sounds of requests."""

from __future__ import annotations

import wave
from io import BytesIO

import numpy as np
from numpy.typing import NDArray

from retrieval_draft.server.errors import ApiError
from retrieval_draft.server.media.files import PARAM, MediaFiles
from retrieval_draft.server.media.settings import MediaSettings

__all__ = ["SoundReader", "resample"]

Samples = NDArray[np.float32]


class SoundReader:
    """Reads the sounds that requests name: WAV files of whole numbers.

    Args:
        settings: Allowed sources, and limits.
        rate: Samples a second of what is returned.
    """

    def __init__(self, settings: MediaSettings, rate: int) -> None:
        self._settings, self._rate = settings, rate
        self._files = MediaFiles(settings, "sound")

    def read(self, url: str) -> Samples:
        """The sound at a URL: one channel, shape (samples,), between -1 and 1.

        Raises:
            ApiError: It is not allowed, not there, too long, or no sound.
        """
        content = self._files.content(url)
        try:
            with wave.open(BytesIO(content)) as file:
                channels, width, rate, frames, *_ = file.getparams()
                data = file.readframes(frames)
        except Exception as error:  # torn files make it raise anything
            raise ApiError(
                400, f"A sound is torn, or no WAV file of whole numbers: {type(error).__name__}.", PARAM
            ) from error
        size = channels * width
        if not data or rate < 1 or len(data) != frames * size:
            raise ApiError(400, "A sound is torn, or empty.", PARAM)
        most = self._settings.max_sound_seconds
        if frames > most * rate:
            raise ApiError(400, f"A sound is longer than {most:g} seconds.", PARAM)
        return resample(_samples(data, width).reshape(-1, channels).mean(1), rate, self._rate)


def _samples(data: bytes, width: int) -> Samples:
    parts = np.frombuffer(data, np.uint8).reshape(-1, width)
    wide = np.zeros((len(parts), 4), np.uint8)
    wide[:, 4 - width :] = parts
    if width == 1:
        wide[:, 3] ^= 128  # samples of a byte have no sign
    found: Samples = np.ldexp(wide.view("<i4")[:, 0].astype(np.float32), -31)
    return found


def resample(samples: Samples, given: int, wanted: int) -> Samples:
    """Samples at another rate, without the frequencies that it cannot have.

    Args:
        samples: float32, shape (length,).
        given: Their rate.
        wanted: The rate of the result.

    Returns:
        float32, as long in time to half a sample.
    """
    if given == wanted:
        return samples
    size = max(round(len(samples) * wanted / given), 1)
    scale = np.float32(size / len(samples))
    found: Samples = np.fft.irfft(np.fft.rfft(samples)[: size // 2 + 1], size).astype(np.float32) * scale
    return found
