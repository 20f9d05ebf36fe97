"""A tiny model with random weights that hears, its processor, and sounds for it."""

from __future__ import annotations

import base64
import io
import wave
from typing import Any

import numpy as np
import torch
import transformers

from tests.support.image_models import IMAGE, MARKS
from tests.support.image_processors import TEMPLATE, image_tokenizer
from tests.support.models import SHAPE

RATE = 16_000


def sound_model(seed: int = 0) -> Any:
    """A Qwen2-Audio in float32, for inference."""
    torch.manual_seed(seed)
    audio = {
        "num_mel_bins": 8, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 24,
        "d_model": 16, "max_source_positions": 50,
    }  # fmt: skip
    text = {**SHAPE, "model_type": "qwen2", "num_hidden_layers": 2, "tie_word_embeddings": False}
    config: Any = transformers.Qwen2AudioConfig(
        audio_config={**audio, "model_type": "qwen2_audio_encoder"}, text_config=text, audio_token_index=IMAGE
    )
    config._attn_implementation = "sdpa"
    model: Any = transformers.Qwen2AudioForConditionalGeneration(config).eval()
    for part in model.modules():
        if isinstance(part, (torch.nn.Linear, torch.nn.Embedding, torch.nn.Conv1d)):
            torch.nn.init.normal_(part.weight, std=0.3)
    torch.nn.init.normal_(
        model.get_input_embeddings().weight, std=0.02
    )  # else the newest token outweighs all
    with torch.no_grad():
        model.get_output_embeddings().weight[[IMAGE, *MARKS]] = 0.0  # so that replies are text
    given = model.generation_config
    given.bos_token_id = given.eos_token_id = given.pad_token_id = None
    return model


def sound_processor() -> Any:
    """Its processor, for sounds of a second."""
    tokenizer = image_tokenizer()
    tokenizer.audio_token, tokenizer.audio_bos_token, tokenizer.audio_eos_token = (
        "<image>",
        "<begin>",
        "<end>",
    )
    features = transformers.WhisperFeatureExtractor(feature_size=8, sampling_rate=RATE, chunk_length=1)
    template = TEMPLATE.replace("'image'", "'audio'")
    return transformers.Qwen2AudioProcessor(features, tokenizer, chat_template=template)


def noise(seed: int, seconds: float = 0.3) -> Any:
    """Random samples, whole numbers of 16 bits."""
    drawn = np.random.default_rng(seed).integers(-20_000, 20_000, int(RATE * seconds))
    return drawn.astype("<i2")


def tone(hertz: float, seconds: float = 0.3) -> Any:
    """Samples of a tone, whole numbers of 16 bits."""
    return (20_000 * np.sin(2 * np.pi * hertz * np.arange(int(RATE * seconds)) / RATE)).astype("<i2")


def wav_bytes(samples: Any, *, rate: int = RATE, width: int = 2, channels: int = 1) -> bytes:
    """Samples as a WAV file."""
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(samples if isinstance(samples, bytes) else samples.tobytes())
    return out.getvalue()


def sound_part(content: bytes, form: str = "wav") -> dict[str, Any]:
    """A part of a message, as OpenAI has it."""
    data = base64.b64encode(content).decode()
    return {"type": "input_audio", "input_audio": {"data": data, "format": form}}
