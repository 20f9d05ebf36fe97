"""Predictions at the accepted tokens of a request, for the servers that get its text."""

from __future__ import annotations

import numpy as np
import xxhash
from numpy.typing import NDArray

from retrieval_draft._kernels.lazy import LazyKernels
from retrieval_draft.index.source import CONTEXT, NodeLogits, TokenArray

__all__ = ["MOST", "Observations"]

MOST = 4096
"""Positions of a request that are kept: about 100 bytes each."""

_RECENT = 1024
"""Tokens among which contexts are looked for; a step emits fewer."""

_kernels = LazyKernels("retrieval_draft.index._kernels.rows")


class Observations:
    """Contexts that lie in a request's text, and the target's predictions after them.

    A rejected draft's context may come from another text, which may not be shared. So only contexts that
    the text itself has are kept, and of each it is known how many of its tokens are the reply's.

    Args:
        prompt: int32, shape (n,).

    Example:
        prompt 1 2, emitted 3 4: after the context 1 2 3 4 two tokens are the reply's; where only replies are
        shared, the rows of "4" and "3 4" are
    """

    def __init__(self, prompt: TokenArray) -> None:
        self._prompt = _digest(prompt)
        self._prompt_length = len(prompt)
        self._reply = xxhash.xxh3_64()
        self._text = np.full(CONTEXT + min(len(prompt), CONTEXT), -1, np.int32)
        if len(prompt):
            self._text[CONTEXT:] = prompt[-CONTEXT:]
        self._open = len(self._text) - 1  # the first index in `_text` without predictions
        self._length = len(prompt)
        self._contexts: list[TokenArray] = []
        self._own: list[NDArray[np.int64]] = []
        self._predictions: list[tuple[TokenArray, NDArray[np.float32]]] = []
        self._count = 0

    def observe(self, tokens: TokenArray) -> None:
        """Appends accepted tokens, int32, shape (m,)."""
        tokens = np.asarray(tokens, np.int32)
        self._reply.update(tokens.tobytes())
        self._length += len(tokens)
        cut = len(self._text) - _RECENT if len(self._text) > 2 * _RECENT else 0
        self._text = np.concatenate((self._text[cut:], tokens))
        self._open = max(self._open - cut, CONTEXT)

    def learn(self, logits: NodeLogits) -> None:
        """Keeps the predictions at accepted positions that have alternatives: the text tells the others."""
        if logits.top_tokens.ndim != 2 or logits.top_tokens.shape[1] < 2 or self._count >= MOST:
            return
        first = max(self._open, CONTEXT)
        found = np.empty(max(len(self._text) - first, 0), np.int32)
        if not len(found):
            return
        contexts = np.ascontiguousarray(logits.contexts, np.int32)
        _kernels.find_contexts(contexts, self._text, first, found)
        indices = np.flatnonzero(found >= 0)
        if not len(indices):
            return
        rows = found[indices]
        self._open = first + int(indices[-1]) + 1
        # Of a context that ends at index p, so many tokens are the reply's.
        replied = indices + first + self._length - len(self._text) - self._prompt_length + 1
        self._contexts.append(contexts[rows])
        self._own.append(np.clip(replied, 0, CONTEXT))
        self._predictions.append((logits.top_tokens[rows], logits.top_probs[rows]))
        self._count += len(rows)

    def belong_to(self, prompt: TokenArray, reply: TokenArray) -> bool:
        """True if this is the request of exactly that text: int32, shape (n,) and (m,)."""
        if self._length != len(prompt) + len(reply) or self._prompt_length != len(prompt):
            return False
        return self._reply.intdigest() == _digest(reply) and self._prompt == _digest(prompt)

    def shareable(self, with_prompt: bool) -> list[NodeLogits]:
        """The predictions after contexts of the reply, or of the prompt too; others are cut to their reply.

        Args:
            with_prompt: Whether contexts may hold tokens of the prompt.
        """
        found = []
        for contexts, own, (tokens, probs) in zip(self._contexts, self._own, self._predictions, strict=True):
            kept = contexts
            if not with_prompt:
                kept = np.where(np.arange(CONTEXT) >= CONTEXT - own[:, None], contexts, -1).astype(np.int32)
            found.append(NodeLogits(kept, tokens, probs))
        return found


def _digest(tokens: TokenArray) -> int:
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(tokens, np.int32).tobytes())
