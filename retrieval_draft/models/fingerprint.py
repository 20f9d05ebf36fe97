"""Fingerprints of tokenizers: digests of the text of each id."""

from __future__ import annotations

from typing import Any

import xxhash

__all__ = ["tokenizer_fingerprint", "vocabulary_size"]


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A digest of the vocabulary, added tokens included: 32 hex digits.

    Two tokenizers with the same fingerprint give each id the same meaning, however they were loaded, so token
    runs of one can be read by the other.

    Args:
        tokenizer: One of transformers or of the tokenizers library; anything with ``get_vocab()``.
    """
    digest = xxhash.xxh3_128()
    for token, number in sorted(tokenizer.get_vocab().items(), key=lambda entry: (entry[1], entry[0])):
        digest.update(f"{number}\t{token}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def vocabulary_size(tokenizer: Any) -> int:
    """Largest id plus one, added tokens included; ids may have gaps."""
    return max(tokenizer.get_vocab().values(), default=0) + 1
