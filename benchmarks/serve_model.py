"""A tiny model with a tokenizer of its own, for load on a server rather than on a processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["save_tiny_model"]

_END = "<eos>"
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def save_tiny_model(folder: Path) -> None:
    """Writes a random Llama of three layers, and a tokenizer of letters, pairs of them and the space."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    pairs = [first + second for first in _LETTERS for second in "aeiou" if first != second]
    vocabulary = {token: index for index, token in enumerate([_END, "Ġ", *_LETTERS, *pairs])}
    inner = Tokenizer(models.BPE(vocabulary, [(pair[0], pair[1]) for pair in pairs]))
    made: Any = inner
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=_END)
    torch.manual_seed(0)
    config: Any = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=4096,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=0,
    )
    model: Any = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
