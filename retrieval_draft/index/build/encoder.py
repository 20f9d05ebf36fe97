"""Texts to token ids for an index, with the tokenizer's own threads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retrieval_draft.errors import InvalidInputError
from retrieval_draft.index.source import TokenArray
from retrieval_draft.models.fingerprint import tokenizer_fingerprint, vocabulary_size

__all__ = ["Encoder"]

_PIECE = 1 << 21
"""Characters."""


class Encoder:
    """A tokenizer for index builds: encodes batches of texts to runs of ids, without special tokens.

    Attributes:
        name: Name of the tokenizer, as given.
        fingerprint: Of its vocabulary.
        vocabulary: Number of its ids, added tokens included.
    """

    def __init__(self, tokenizer: Any, name: str) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
        self._fast = backend if hasattr(backend, "encode_batch_fast") else None
        self._tokenizer = tokenizer
        self.name = name
        self.fingerprint = tokenizer_fingerprint(tokenizer)
        self.vocabulary = vocabulary_size(tokenizer)
        if self._fast is not None:
            self._fast.no_truncation()
            self._fast.no_padding()

    @classmethod
    def from_file(cls, path: Path) -> Encoder:
        """Reads a tokenizer.json.

        Raises:
            InvalidInputError: It is no such file.
        """
        import tokenizers

        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises no narrower type
            raise InvalidInputError(
                f"{path} is not a tokenizer: {error}.",
                "Name a tokenizer.json, a model's folder, or a hub name.",
            ) from error
        return cls(tokenizer, str(path))

    @classmethod
    def from_json(cls, text: str, name: str) -> Encoder:
        """The inverse of `to_json`."""
        import tokenizers

        return cls(tokenizers.Tokenizer.from_str(text), name)

    def to_json(self) -> str:
        """The tokenizer as text, to send to another machine.

        Raises:
            InvalidInputError: It has no such form.
        """
        if self._fast is None:
            raise InvalidInputError(
                f"The tokenizer {self.name} is a slow one, which cannot be sent to other machines.",
                "Build without --executor, or use a tokenizer with a tokenizer.json.",
            )
        return str(self._fast.to_str())

    def encode(self, texts: Sequence[str]) -> list[TokenArray]:
        """int32 ids of each text. Long ones are cut after a line, as tokenizers need many times a text."""
        if max(map(len, texts), default=0) > _PIECE:
            return [np.concatenate([self._ids([piece])[0] for piece in _pieces(text)]) for text in texts]
        return self._ids(texts)

    def _ids(self, texts: Sequence[str]) -> list[TokenArray]:
        if self._fast is not None:
            encodings = self._fast.encode_batch_fast(list(texts), add_special_tokens=False)
            return [np.array(encoding.ids, np.int32) for encoding in encodings]
        found = self._tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return [np.array(ids, np.int32) for ids in found]

    def decode(self, tokens: TokenArray) -> str:
        """The text of some ids, int32, shape (n,)."""
        return str(self._tokenizer.decode([int(token) for token in tokens]))


def _pieces(text: str) -> Iterator[str]:
    """A text in pieces of about two million characters, one at least."""
    begin = 0
    while len(text) - begin > _PIECE:
        end = text.rfind("\n", begin, begin + _PIECE) + 1 or begin + _PIECE
        yield text[begin:end]
        begin = end
    yield text[begin:]
