"""The text of one request while it grows."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from retrieval_draft.index.source import TokenArray

__all__ = ["Transcript"]


class Transcript:
    """Prompt and reply in one growing buffer, without copies of earlier tokens.

    Args:
        prompt: int32, shape (length,), padding stripped.
        padded: int64, shape (1, length + padding). The prompt as the caller gave it, for logits
            processors and stopping criteria; None if there are none, and then `ids` is not kept.
        capacity: Tokens to make room for.
    """

    def __init__(self, prompt: TokenArray, padded: Tensor | None, capacity: int) -> None:
        self.prompt_length = len(prompt)
        self._length = len(prompt)
        self._tokens = np.empty(max(capacity, len(prompt)) + 1, np.int32)
        self._tokens[: len(prompt)] = prompt
        self._ids: Tensor | None = None
        self._known = len(prompt)  # tokens that `ids` has
        if padded is not None:
            self._padding = padded.shape[1] - len(prompt)
            self._ids = padded.new_empty((1, len(self._tokens) + self._padding))
            self._ids[:, : padded.shape[1]] = padded

    def __len__(self) -> int:
        return self._length

    @property
    def tokens(self) -> TokenArray:
        """int32, shape (length,). A view of the present text."""
        return self._tokens[: self._length]

    @property
    def reply(self) -> NDArray[np.int32]:
        """int32. Tokens after the prompt."""
        return self._tokens[self.prompt_length : self._length]

    @property
    def ids(self) -> Tensor | None:
        """int64, shape (1, length + padding), a view; None if no processor or criterion needs it."""
        if self._ids is None:
            return None
        if self._known < self._length:
            new = torch.from_numpy(self._tokens[self._known : self._length].astype(np.int64))
            self._ids[0, self._known + self._padding : self._length + self._padding].copy_(new)
            self._known = self._length
        return self._ids[:, : self._length + self._padding]

    def append(self, token: int) -> None:
        """Adds one token to the reply."""
        if self._length == len(self._tokens):
            self._grow()
        self._tokens[self._length] = token
        self._length += 1

    def _grow(self) -> None:
        self._tokens = np.concatenate([self._tokens, np.empty_like(self._tokens)])
        if self._ids is not None:
            self._ids = torch.cat([self._ids, torch.empty_like(self._ids)], 1)
