"""Trained heads on the target's hidden states (Medusa, EAGLE and their kin) as draft sources."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from retrieval_draft.engine.draft_models.expansion import ModelTree
from retrieval_draft.index.source import NodeLogits, Proposal, TokenArray, empty_proposal

__all__ = ["DraftHead", "HeadDraft", "HeadSession"]


class DraftHead(Protocol):
    """Interface of a trained head."""

    def propose(self, hidden: Tensor, token: int, budget: int) -> ModelTree:
        """Guesses the tokens after `token`.

        Args:
            hidden: (d,), the input of the target's output head at the position that chose `token`.
            token: The last accepted token, the root.
            budget: The most nodes to return.

        Returns:
            Parents before children; ``probs`` are the head's own.
        """
        ...


class HeadSession:
    """One request: the last hidden state that was verified."""

    wants_hidden = True

    def __init__(self, head: DraftHead, prompt: TokenArray) -> None:
        self._head = head
        self._root = int(prompt[-1]) if len(prompt) else 0
        self._hidden: Tensor | None = None

    def learn_hidden(self, hidden: Tensor) -> None:
        """Takes the hidden state, (d,), at the last accepted node: the one that chose the new root."""
        self._hidden = hidden

    @torch.no_grad()
    def propose(self, budget: int) -> Proposal:
        """The head's guesses; none before the first hidden state."""
        if self._hidden is None or budget <= 0:
            return empty_proposal("model", "model")
        tree = self._head.propose(self._hidden, self._root, budget)
        zeros = np.zeros(len(tree.tokens), np.int32)
        return Proposal(tree.tokens, tree.parents, np.clip(tree.probs, 1e-6, 1.0), zeros, "model", "model")

    def observe(self, tokens: TokenArray) -> None:
        """Drops the hidden state, which does not belong to the text with `tokens`, int32, shape (m,)."""
        if len(tokens):
            self._root, self._hidden = int(tokens[-1]), None

    def learn(self, logits: NodeLogits) -> None:
        """Does nothing: a head is trained elsewhere."""

    def close(self) -> None:
        """Does nothing: there is nothing to free."""


class HeadDraft:
    """A trained head as a draft source.

    Args:
        head: Anything with `DraftHead.propose`.

    Example:
        RetrievalDrafter.for_model(model, draft_model=HeadDraft(my_medusa))
    """

    name = "model"
    level = "model"

    def __init__(self, head: DraftHead) -> None:
        self.head = head

    def open(self, prompt: TokenArray, references: Sequence[TokenArray] = ()) -> HeadSession:
        """Starts a request with `prompt`, int32, shape (length,); reference texts are not read."""
        return HeadSession(self.head, prompt)

    def flush(self) -> None:
        """Does nothing: no text waits to be looked up."""

    def close(self) -> None:
        """Does nothing: there is no thread or file to close."""

    @property
    def nbytes(self) -> int:
        """0: the head is its owner's."""
        return 0
