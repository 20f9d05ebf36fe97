"""A tiny model for all that a server does: any text, calls of tools, JSON, and images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["save_mixed_model"]

_SPECIALS = ("<eos>", "<image>", "<|turn|>", "<tool_call>", "</tool_call>")
_TEMPLATE = (
    "{% for tool in tools or [] %}<tool_call>{{ tool | tojson }}</tool_call>{% endfor %}"
    "{% for m in messages %}<|turn|>{{ m['role'] }} "
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] or [] %}"
    "{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% for call in m['tool_calls'] or [] %}<tool_call>{{ call['function'] | tojson }}</tool_call>"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}<|turn|>assistant {% endif %}"
)


def save_mixed_model(folder: Path) -> None:
    """Writes a random Llava of two layers, its processor, and a tokenizer with a token for each byte."""
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    tokenizer = _tokenizer()
    shape = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "initializer_range": 0.3,
    }  # fmt: skip
    torch.manual_seed(0)
    config: Any = LlavaConfig(
        text_config={
            **shape, "model_type": "llama", "vocab_size": len(tokenizer), "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 4096,
            "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": 0,
        },
        vision_config={
            **shape, "model_type": "clip_vision_model", "num_attention_heads": 2, "image_size": 16,
            "patch_size": 8,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
    )  # fmt: skip
    model: Any = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = 0
    model.save_pretrained(folder)
    size = {"height": 16, "width": 16}
    pixels: Any = LlavaImageProcessorPil(size=size, crop_size=size)
    LlavaProcessor(pixels, tokenizer, patch_size=8, chat_template=_TEMPLATE).save_pretrained(folder)


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([_SPECIALS[0], *letters])}
    inner: Any = Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=_SPECIALS[0], extra_special_tokens={"image_token": _SPECIALS[1]}
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(_SPECIALS[1:])})
    tokenizer.chat_template = _TEMPLATE
    return tokenizer
