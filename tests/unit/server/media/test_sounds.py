from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retrieval_draft.server.errors import ApiError
from retrieval_draft.server.media.settings import MediaSettings
from retrieval_draft.server.media.sounds import SoundReader, resample
from tests.support.sounds import RATE, noise, wav_bytes


def read(content: bytes, **settings: Any) -> Any:
    url = f"data:audio/wav;base64,{base64.b64encode(content).decode()}"
    return SoundReader(MediaSettings(**settings), RATE).read(url)


def test_samples_of_every_width_are_between_minus_one_and_one() -> None:
    values = [-1.0, -0.5, 0.0, 0.5]
    for width in (2, 3, 4):
        whole = [int(value * (1 << 8 * width - 1)).to_bytes(width, "little", signed=True) for value in values]
        found = read(wav_bytes(b"".join(whole), width=width))
        assert found.tolist() == values
        assert found.dtype == np.float32
    assert read(wav_bytes(bytes([0, 64, 128, 192]), width=1)).tolist() == values


def test_channels_are_averaged() -> None:
    both = np.array([[1 << 14, 0], [0, -(1 << 14)]], "<i2")
    assert read(wav_bytes(both, channels=2)).tolist() == [0.25, -0.25]


@pytest.mark.parametrize("rate", [8_000, 24_000, 44_100])
def test_another_rate_has_the_same_tone(rate: int) -> None:
    tone = [np.sin(2 * np.pi * 440 * np.arange(each // 2) / each).astype(np.float32) for each in (rate, RATE)]
    assert np.abs(resample(tone[0], rate, RATE) - tone[1]).max() < 1e-3
    high = np.sin(2 * np.pi * 7_000 * np.arange(24_000) / 24_000).astype(np.float32)
    assert np.abs(resample(high, 24_000, 8_000)).max() < 1e-3, "no such tone at 8000 samples a second"


def test_what_is_no_sound_is_refused() -> None:
    good = wav_bytes(noise(1))
    for content in (b"", b"ID3 mp3", good[:30], good[:-3], wav_bytes(b""), good[:20] + b"\x03" + good[21:]):
        with pytest.raises(ApiError, match="A sound is torn") as raised:
            read(content)
        assert (raised.value.status, raised.value.param) == (400, "messages")


def test_limits_and_sources(tmp_path: Path) -> None:
    good = wav_bytes(noise(1))
    with pytest.raises(ApiError, match=r"longer than 0\.2 seconds"):
        read(good, max_sound_seconds=0.2)
    with pytest.raises(ApiError, match="A sound has more than 99 bytes"):
        read(good, max_bytes=99)
    with pytest.raises(ApiError, match="fetches no sounds"):
        SoundReader(MediaSettings(), RATE).read("https://example.com/a.wav")
    (tmp_path / "a.wav").write_bytes(good)
    found = SoundReader(MediaSettings(folder=tmp_path), RATE).read(f"file://{tmp_path}/a.wav")
    assert found.tolist() == read(good).tolist()
