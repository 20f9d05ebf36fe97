"""A reply under a grammar: the tokens that may come next, and those that must."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval_draft.errors import InvalidInputError
from retrieval_draft.index.source import TokenArray

__all__ = ["GrammarText"]

_PATIENCE = 2.0
_PATIENCE_FOR_TOKEN = 0.02
"""Seconds that following a reply may take before it counts as failed: at all, and for each of its tokens."""


class GrammarText:
    """The state of a grammar after a reply's tokens so far. Not thread-safe.

    Usual tokens of text that the grammar forces are the only ones allowed: they are `certain`. The last of
    them are left open where they could merge with text that follows; `likely` then names a guess.

    Args:
        matcher: Of llguidance, at the beginning of the reply.
        tokenizer: Of llguidance.
        again: Makes another such matcher, which shares no limit with others.

    Example:
        Keys name and age, reply ``{"``: ``name``, ``":`` are certain, and `` "`` is likely, unless the model
        knows a token such as `` "J``.
    """

    def __init__(self, matcher: Any, tokenizer: Any, again: Callable[[], Any]) -> None:
        self._matcher, self._tokenizer, self._again = matcher, tokenizer, again
        self._reply: list[int] = []
        self._is_over = False
        self._seconds = 0.0
        self.eos = frozenset(tokenizer.eos_tokens)

    def follow(self, reply: TokenArray) -> None:
        """Moves on to a reply, int32, shape (length,), of which the tokens followed so far are the beginning.

        Raises:
            InvalidInputError: A token was chosen against the grammar, or the grammar takes too long.
        """
        new = reply[len(self._reply) :].tolist()
        if not new:
            return
        begin = perf_counter()
        for token in new:
            # Other rows of a batch continue after the end of this one: padding is no part of the reply.
            self._is_over = self._is_over or token in self.eos
            taken = self._is_over or self._matcher.try_consume_tokens([token]) == 1
            if not taken and not self._matcher.is_error():
                raise InvalidInputError(
                    f"The token {token} breaks the grammar: another logits processor chose it.",
                    "Leave out what forces or bans tokens beside a grammar.",
                )
            self._reply.append(token)
            if not taken:
                self._start_again()
        self._spend(begin)

    def mask(self) -> NDArray[np.uint8] | None:
        """Tokens that may come next, a bit each, the lowest first; None for any: the reply is over.

        Raises:
            InvalidInputError: The grammar is too complex here.
        """
        if self._is_over:
            return None
        begin = perf_counter()
        bits = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            self._start_again()
            bits = self._matcher.compute_bitmask()
            self._check()
        self._spend(begin)
        return np.frombuffer(bits, np.uint8)

    def certain(self) -> list[int]:
        """Tokens that must come next, as far as they are known."""
        if self._is_over or self._matcher.is_error() or self._matcher.is_stopped():
            return []
        return list(self._matcher.compute_ff_tokens())

    def likely(self) -> list[int]:
        """Usual tokens of text that must come next, although other tokens of the same text are allowed."""
        if self._is_over or self._matcher.is_error() or self._matcher.is_stopped():
            return []
        text = self._matcher.compute_ff_bytes()
        return list(self._tokenizer.tokenize_bytes(text)) if text else []

    def enter(self, token: int) -> bool:
        """Moves on by a token, for a look ahead; False where it may not come next, or ends the reply.

        Undone by `go_back`.
        """
        return token not in self.eos and self._matcher.try_consume_tokens([token]) == 1

    def go_back(self, tokens: int) -> None:
        """Undoes the last calls of `enter`."""
        if tokens and not self._matcher.rollback(tokens):
            self._start_again()

    @property
    def can_look_ahead(self) -> bool:
        """False once the reply is over."""
        return not self._is_over and not self._matcher.is_error()

    def _start_again(self) -> None:
        """Replaces a matcher that met a limit, which it may share with other replies of this grammar."""
        self._matcher = self._again()
        self._matcher.try_consume_tokens(self._reply)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = " ".join(self._matcher.get_error().split())[:300]
            raise InvalidInputError(f"The grammar is too complex to follow: {reason}.")

    def _spend(self, begin: float) -> None:
        """Fails a reply whose grammar holds up all others."""
        self._seconds += perf_counter() - begin
        if self._seconds > _PATIENCE + _PATIENCE_FOR_TOKEN * len(self._reply):
            raise InvalidInputError(
                f"Following the grammar took {self._seconds:.1f} s for {len(self._reply)} tokens.",
                "Make it less ambiguous.",
            )
