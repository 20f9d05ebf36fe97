"""Small tokenizers that cut the same text differently."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

LETTERS = "abcdefgh"


def byte_level(pairs: tuple[str, ...]) -> Any:
    """Byte-level tokens of letters and the space, with merges: ``"ab"`` joins a and b."""
    vocabulary = {"<eos>": 0}
    for token in ("Ġ", *LETTERS, *pairs):
        vocabulary[token] = len(vocabulary)
    merges = [(pair[:-1], pair[-1]) for pair in pairs]
    made = Tokenizer(models.BPE(vocabulary, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>")


def metaspace(words: tuple[str, ...]) -> Any:
    """Letters, the SentencePiece space, and whole words with it in front."""
    vocabulary = {"<eos>": 0, "▁": 1}
    for token in (*LETTERS, *(f"▁{word}" for word in words)):
        vocabulary[token] = len(vocabulary)
    merges = [(f"▁{word}"[:-1], word[-1]) for word in words]
    made = Tokenizer(models.BPE(vocabulary, merges))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    made.decoder = decoders.Metaspace(prepend_scheme="never")
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>")
