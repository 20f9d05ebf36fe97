"""Processors for the tiny models that read images, and images for them."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import Gemma3Processor, LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from tests.support.image_models import IMAGE, MARKS
from tests.support.models import VOCABULARY
from tests.support.tokenizers_for_tests import LETTERS

TEMPLATE = (
    "{% for m in messages %}{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}{% endif %}{% endfor %} {% endfor %}"
)
"""Reads parts only, as those of most image models do."""


def image_tokenizer() -> Any:
    """Byte-level letters, and the ids of the tiny models that stand for images."""
    vocabulary = {"<eos>": 0}
    for token in ("Ġ", *LETTERS):
        vocabulary[token] = len(vocabulary)
    special = {MARKS[0]: "<begin>", MARKS[1]: "<end>", IMAGE: "<image>"}
    while len(vocabulary) < VOCABULARY:
        token = len(vocabulary)
        vocabulary[special.get(token, f"[{token}]")] = token
    made = Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(special.values()))
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        eos_token="<eos>",
        extra_special_tokens={"image_token": "<image>", "boi_token": "<begin>", "eoi_token": "<end>"},
    )


def image_processor(name: str) -> Any:
    """The processor of "llava" or "gemma3"."""
    tokenizer = image_tokenizer()
    if name == "gemma3":
        template = TEMPLATE.replace("<image>", "<begin>")
        images = Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
        return Gemma3Processor(images, tokenizer, chat_template=template, image_seq_length=4)
    size = {"height": 16, "width": 16}
    return LlavaProcessor(
        LlavaImageProcessorPil(size=size, crop_size=size), tokenizer, patch_size=8, chat_template=TEMPLATE
    )


def image_bytes(seed: int, width: int = 20, height: int = 24, form: str = "PNG", **options: Any) -> bytes:
    """A random image as a file."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, form, **options)
    return out.getvalue()


def data_url(content: bytes, kind: str = "image/png") -> str:
    """A file as a data URL."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
