"""Two tokenizers' vocabularies, token by token."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from retrieval_draft.errors import TokenizerMismatchError
from retrieval_draft.index.source import TokenArray

__all__ = ["VocabularyMap"]

_SPACES = ("\u0120", "\u2581")
"""Characters that byte-level and SentencePiece vocabularies write for a space before a word."""


def _plain(token: str) -> str:
    """A token's text as both kinds of vocabulary would agree on it."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return token.upper()
    for mark in _SPACES:
        token = token.replace(mark, " ")
    return token.replace("\u010a", "\n")


class VocabularyMap:
    """Map from the tokens of one vocabulary to those of another with the same text.

    The set is the intersection of token-level intersection (TLI; Timor et al., arXiv:2502.05202, section 3).

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
        special = {*_special(target_tokenizer), *_special(draft_tokenizer)}
        known: dict[str, int] = {}
        for token, number in sorted(target_tokenizer.get_vocab().items(), key=lambda item: item[1]):
            if token not in special:
                known.setdefault(_plain(token), number)
        vocabulary = draft_tokenizer.get_vocab()
        self.to_target: TokenArray = np.full(max(vocabulary.values(), default=-1) + 1, -1, np.int32)
        for token, number in vocabulary.items():
            if token not in special:
                self.to_target[number] = known.get(_plain(token), -1)
        self.shared = int(np.count_nonzero(self.to_target >= 0))
        if not self.shared:
            raise TokenizerMismatchError(
                f"The draft model's {len(vocabulary)} tokens and the target's {len(known)} share none.",
                'Use the mode "text", or another draft model.',
            )

    def allowed(self, rows: int) -> Tensor:
        """Mask of the draft model's tokens that the target has: bool, shape (rows,)."""
        mask = torch.zeros(rows, dtype=torch.bool, device="cpu")
        size = min(rows, len(self.to_target))
        mask[:size] = torch.from_numpy(self.to_target[:size] >= 0)
        return mask


def _special(tokenizer: Any) -> list[str]:
    return list(getattr(tokenizer, "all_special_tokens", []))
