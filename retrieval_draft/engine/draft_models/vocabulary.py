"""Two tokenizers' vocabularies, token by token."""

from __future__ import annotations

from typing import Any

import numpy as np

from retrieval_draft.errors import TokenizerMismatchError
from retrieval_draft.index.source import TokenArray

__all__ = ["VocabularyMap", "token_bytes"]

_SPACE = "\u2581"
"""Character that SentencePiece vocabularies write for a space."""

_PRINTED = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
"""Bytes that byte-level vocabularies write as the character of their number; others are 256 and up."""

_BYTES = {chr(byte): byte for byte in _PRINTED} | {
    chr(256 + number): byte for number, byte in enumerate(sorted({*range(256)} - {*_PRINTED}))
}


def token_bytes(tokenizer: Any) -> list[bytes | None]:
    """UTF-8 bytes of each token's text, whichever way the vocabulary writes them.

    Byte-level vocabularies have a character for each byte, SentencePiece's have the text, with U+2581 for the
    space and ``<0xE4>`` for a byte. A token may be a part of a character.

    Args:
        tokenizer: Any tokenizer of transformers.

    Returns:
        One entry for each id; None for special tokens and ids without a token.

    Example:
        two characters of a byte-level vocabulary that stand for E4 BD: bytes([0xE4, 0xBD])
    """
    vocabulary = tokenizer.get_vocab()
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = set(getattr(tokenizer, "all_special_tokens", []))
    special.update(token.content for token in added.values() if token.special)
    plain = {token.content for token in added.values()} - special
    found: list[bytes | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
    written = [(token, number) for token, number in vocabulary.items() if token not in special]
    letters = {letter for token, _ in written if token not in plain for letter in token}
    byte_level = "\u0120" in letters and letters <= _BYTES.keys()
    for token, number in written:
        if byte_level and token not in plain:
            found[number] = bytes(_BYTES[letter] for letter in token)
        elif _is_byte(token):
            found[number] = bytes([int(token[3:5], 16)])
        else:
            found[number] = token.replace(_SPACE, " ").encode("utf-8", "surrogatepass")
    return found


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _numbers(tokenizer: Any, texts: list[bytes | None]) -> dict[bytes, int]:
    """The id of each text: of several the one that is written out, then the lowest."""
    bytes_alone = {number for token, number in tokenizer.get_vocab().items() if _is_byte(token)}
    found: dict[bytes, int] = {}
    for number in sorted(range(len(texts)), key=lambda number: (number in bytes_alone, number)):
        text = texts[number]
        if text:
            found.setdefault(text, number)
    return found


class VocabularyMap:
    """Map from the tokens of one vocabulary to those of another with the same text.

    The set is the intersection of token-level intersection (TLI; Timor et al., arXiv:2502.05202, section 3).
    Texts are compared byte by byte, so letters beyond ASCII are shared between byte-level and SentencePiece
    vocabularies.

    Args:
        target_tokenizer: Of the model whose output is wanted.
        draft_tokenizer: Of the model that drafts.

    Raises:
        TokenizerMismatchError: They share no token.

    Attributes:
        to_target: int32, shape (draft tokens,). -1 where the target has no such token.
        shared: Tokens that both have.

    Example:
        target {"a": 0, "_b": 1}, draft {"Gb": 5, "c": 6}, both marks being spaces: to_target[5] = 1, shared 1
    """

    def __init__(self, target_tokenizer: Any, draft_tokenizer: Any) -> None:
        known = _numbers(target_tokenizer, token_bytes(target_tokenizer))
        texts = token_bytes(draft_tokenizer)
        self.to_target: TokenArray = np.full(len(texts), -1, np.int32)
        for text, number in _numbers(draft_tokenizer, texts).items():
            self.to_target[number] = known.get(text, -1)
        self.shared = int(np.count_nonzero(self.to_target >= 0))
        if not self.shared:
            raise TokenizerMismatchError(
                f"The draft model's {len(texts)} tokens and the target's {len(known)} share none.",
                'Use the mode "text", or another draft model.',
            )
