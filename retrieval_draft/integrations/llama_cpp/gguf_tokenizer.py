"""The vocabulary of a GGUF file, with the interface of Hugging Face tokenizers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from retrieval_draft.errors import ModelFileError
from retrieval_draft.integrations.llama_cpp._engine import llama_cpp

__all__ = ["GgufTokenizer"]

_SENTENCEPIECE = 1
"""llama.cpp's number for vocabularies made by SentencePiece."""


class GgufTokenizer:
    """A tokenizer as this package needs it, read from a GGUF file by llama.cpp itself, without weights.

    GGUF files hold the tokens of the model's Hugging Face tokenizer, except that converters write the spaces
    of user-defined SentencePiece tokens as spaces, and fill the vocabulary up to the embedding's rows with
    tokens such as ``[PAD32001]``. With both undone the vocabulary, and so its fingerprint, is that of the
    Hugging Face tokenizer: an index built with one serves the other.

    Args:
        path: A GGUF file.

    Attributes:
        rows: Ids of the model, the filled up ones included.
        is_recurrent: Whether the model keeps recurrent state, as Mamba and hybrids do.

    Raises:
        ModelFileError: The file is missing, or llama.cpp cannot read it.
        InvalidInputError: llama-cpp-python is not installed.

    Example:
        GgufTokenizer("model.gguf")(["a cat"])["input_ids"]  ->  [[236746, 5866]]
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        engine = llama_cpp()
        try:
            self._llama = engine.Llama(os.fspath(path), vocab_only=True, verbose=False)
        except (ValueError, RuntimeError, OSError) as error:
            raise ModelFileError(
                f"llama.cpp cannot read {os.fspath(path)!r}: {error}.", "Name a complete GGUF file."
            ) from error
        self.rows = int(self._llama.n_vocab())
        asked = [
            getattr(engine, name, None) for name in ("llama_model_is_recurrent", "llama_model_is_hybrid")
        ]
        self.is_recurrent = any(ask is not None and bool(ask(self._llama.model)) for ask in asked)
        self._tokens = _tokens(engine, self._llama, self.rows)

    def get_vocab(self) -> dict[str, int]:
        """The id of each token, as the tokenizer of transformers names them."""
        return dict(self._tokens)

    def __call__(self, texts: Sequence[str], add_special_tokens: bool = False) -> dict[str, list[list[int]]]:
        """Token ids of texts.

        Args:
            texts: Plain text; the names of special tokens in it are text as well.
            add_special_tokens: Whether the bos token comes first.
        """
        encoded = [
            self._llama.tokenize(text.encode(), add_bos=add_special_tokens, special=False) for text in texts
        ]
        return {"input_ids": encoded}


def _tokens(engine: Any, llama: Any, rows: int) -> dict[str, int]:
    vocab = engine.llama_model_get_vocab(llama.model)
    sentencepiece = engine.llama_vocab_type(vocab) == _SENTENCEPIECE
    tokens: dict[str, int] = {}
    for number in range(rows):
        token = engine.llama_vocab_get_text(vocab, number).decode("utf-8", "surrogateescape")
        kind = engine.llama_vocab_get_attr(vocab, number)
        if kind & engine.LLAMA_TOKEN_ATTR_UNUSED and token == f"[PAD{number}]":
            continue
        if sentencepiece and kind & engine.LLAMA_TOKEN_ATTR_USER_DEFINED:
            token = token.replace(" ", "▁")
        tokens[token] = number
    return tokens
