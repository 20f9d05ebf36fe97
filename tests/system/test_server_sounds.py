"""Sounds in chat messages: the reply is that of `generate` with the same processor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from retrieval_draft import DraftConfig, RetrievalDrafter
from tests.support.image_processors import data_url, image_bytes
from tests.support.servers import MODEL, Running, serving
from tests.support.sounds import RATE, noise, sound_model, sound_part, sound_processor, tone, wav_bytes

NEW = 16


def drafter_of(processor: Any) -> RetrievalDrafter:
    config = DraftConfig(nodes=8, adjacency_rows=1024)
    return RetrievalDrafter.for_model(sound_model(), processor.tokenizer, config=config)


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    processor = sound_processor()
    with serving(drafter_of(processor), processor.tokenizer, processor=processor) as made:
        yield made


def ask(running: Running, *parts: dict[str, Any], **fields: Any) -> httpx.Response:
    body = {
        "model": MODEL, "messages": [{"role": "user", "content": list(parts)}], "max_tokens": NEW,
        "ignore_eos": True, "return_token_ids": True, "temperature": 0, **fields,
    }  # fmt: skip
    return httpx.post(f"{running.url}/v1/chat/completions", json=body, timeout=60)


def text(content: str) -> dict[str, str]:
    return {"type": "text", "text": content}


def offline(sounds: list[Any], **options: Any) -> tuple[list[int], list[int]]:
    """Tokens of a reply to "ab", the sounds, and "cd": of `drafter.generate`, and of `model.generate`."""
    processor = sound_processor()
    prompt = "ab" + "<image>" * len(sounds) + "cd "
    floats = [sound.astype(np.float32) / (1 << 15) for sound in sounds]
    inputs = processor(
        text=[prompt], audio=floats, sampling_rate=RATE, return_tensors="pt", add_special_tokens=False
    )
    drafter = drafter_of(processor)
    options = {"do_sample": False, "max_new_tokens": NEW, **options}
    drafted = drafter.generate(**inputs, **options)
    plain = drafter.target.model.generate(**inputs, do_sample=False, max_new_tokens=NEW)
    width = inputs["input_ids"].shape[1]
    return drafted[0, width:].tolist(), plain[0, width:].tolist()


def test_replies_are_those_of_generate(running: Running) -> None:
    first, second = noise(1), noise(2, 0.5)
    sent = (text("ab"), sound_part(wav_bytes(first)), sound_part(wav_bytes(second)), text("cd"))
    wanted, plain = offline([first, second])
    assert wanted == plain
    for _ in range(2):  # at last with drafts from the history
        response = ask(running, *sent)
        assert response.status_code == 200, response.text
        assert response.json()["choices"][0]["token_ids"] == wanted
    assert offline([first, tone(300, 0.5)])[0] != wanted, "the sounds matter"
    sampled = offline([first, second], do_sample=True, temperature=0.9, seed=5)[0]
    answer = ask(running, *sent, temperature=0.9, seed=5).json()
    assert answer["choices"][0]["token_ids"] == sampled


def test_a_url_may_name_it(running: Running) -> None:
    content = wav_bytes(noise(1))
    url = {"type": "audio_url", "audio_url": {"url": data_url(content, "audio/wav")}}
    answers = [ask(running, text("ab"), part).json()["choices"] for part in (sound_part(content), url)]
    assert answers[0] == answers[1]


def test_what_it_cannot_hear_is_refused(running: Running) -> None:
    good = wav_bytes(noise(1))
    refused = {
        "format is 'mp3'; send wav": sound_part(good, "mp3"),
        "A sound is torn": sound_part(good[:-9]),
        "has no input_audio": {"type": "input_audio"},
        "image_url: this model reads no images": {
            "type": "image_url", "image_url": {"url": data_url(image_bytes(1))},
        },
        "processor refuses": text("<image>"),
    }  # fmt: skip
    for why, part in refused.items():
        response = ask(running, sound_part(good), part)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "messages"), why
        assert why in response.json()["error"]["message"]
    assert running.wait_idle()
    assert ask(running, sound_part(good)).status_code == 200
