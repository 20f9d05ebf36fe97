"""A tiny model with a tokenizer of its own, saved to a folder, for what needs both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers

from tests.support.models import make

TEXT = "the cat sat on the mat and the dog sat on the log and the cat sat on the dog"


def byte_tokenizer() -> Any:
    """Every byte is a token, and so are two specials: any text can be written."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate([*letters, "<s>", "</s>"])}
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


def letter_tokenizer(size: int) -> Any:
    """A tokenizer of `size` printable letters, one token each."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:size]
    inner = tokenizers.Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner)


def save_tiny(folder: Path) -> Path:
    """Saves a tiny Llama and its tokenizer."""
    tokenizer = byte_tokenizer()
    model = make("llama", vocab_size=len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
