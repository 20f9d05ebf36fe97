"""Streamer of text that marks accepted drafts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["DraftStreamer"]

_BROKEN = "\ufffd"


class DraftStreamer:
    """A streamer for `generate` that is notified when a forward pass begins.

    All tokens between two passes come from one step: the last was chosen by the model, those before it were
    accepted drafts. `step` must be called before every pass.

    Args:
        tokenizer: Turns tokens to text.
        write: Receives a piece of text, and whether it was drafted; None writes nothing.

    Attributes:
        tokens: The reply so far.
        drafted: For each token whether it was an accepted draft.
        text: The reply as text.
    """

    def __init__(self, tokenizer: Any, write: Callable[[str, bool], None] | None = None) -> None:
        self.tokens: list[int] = []
        self.drafted: list[bool] = []
        self.text = ""
        self._tokenizer = tokenizer
        self._write = write
        self._seen_prompt = False
        self._waiting: list[int] = []
        # Text is decoded from `_from` on, where a character began; up to `_shown` it was written.
        self._from = 0
        self._shown = 0

    def put(self, value: torch.Tensor) -> None:
        """Receives the prompt first, then new tokens."""
        if not self._seen_prompt:
            self._seen_prompt = True
            return
        self._waiting.extend(value.flatten().tolist())

    def step(self) -> None:
        """Completes the last step's tokens at the start of a forward pass."""
        last = len(self._waiting) - 1
        for number, token in enumerate(self._waiting):
            self._add(token, number < last)
        self._waiting.clear()

    def end(self) -> None:
        """Writes the rest of the text."""
        self.step()
        rest = self._decode(self._from, len(self.tokens))[len(self._decode(self._from, self._shown)) :]
        self._emit(rest, False)

    def _add(self, token: int, drafted: bool) -> None:
        self.tokens.append(token)
        self.drafted.append(drafted)
        # Two texts with the same beginning are compared, because a token's own text may lack its space.
        before, now = self._decode(self._from, self._shown), self._decode(self._from, len(self.tokens))
        if len(now) <= len(before) or now.endswith(_BROKEN):
            return
        self._emit(now[len(before) :], drafted)
        self._from, self._shown = self._shown, len(self.tokens)

    def _decode(self, begin: int, end: int) -> str:
        return str(self._tokenizer.decode(self.tokens[begin:end], skip_special_tokens=True))

    def _emit(self, piece: str, drafted: bool) -> None:
        self.text += piece
        if piece and self._write is not None:
            self._write(piece, drafted)
