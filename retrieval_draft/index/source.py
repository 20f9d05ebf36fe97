"""Protocols of draft sources, which open requests and propose small trees for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from retrieval_draft._kernels.lazy import LazyKernels
from retrieval_draft.errors import InvalidInputError

__all__ = [
    "CONTEXT",
    "BaseSession",
    "BaseSource",
    "DraftSource",
    "NodeLogits",
    "Proposal",
    "SourceSession",
    "TokenArray",
    "check_ids",
    "checked_ids",
    "empty_proposal",
]

_kernels = LazyKernels("retrieval_draft.index._kernels.node_logits")

TokenArray = NDArray[np.int32]
"""Token ids, int32, one axis. -1 means none; 0 is a token like any other."""

CONTEXT = 4
"""Number of context tokens of each node in `NodeLogits`."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """One source's guesses for one step: a small tree below the last accepted token.

    Node i is a child of node ``parents[i]``, or of the root when that is -1. Parents come before
    their children, and siblings hold different tokens.

    Attributes:
        tokens: int32, shape (n,).
        parents: int32, shape (n,). -1 for children of the root.
        probs: float32, shape (n,). The source's estimate of P(accepted | parent accepted), in (0, 1].
        match_lengths: int32, shape (n,). Number of context tokens that the guess is based on.
        source: The name of the source.
        level: Its locality: "request", "history", "shared", "corpus" or "model".

    Example:
        context 7 8 9 4 7 8, the text has seen "7 8 9 4" once:
        tokens [9, 4], parents [-1, 0], match_lengths [2, 3]
    """

    tokens: TokenArray
    parents: NDArray[np.int32]
    probs: NDArray[np.float32]
    match_lengths: NDArray[np.int32]
    source: str
    level: str

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, slots=True)
class NodeLogits:
    """The target model's predictions at some positions, accepted or not.

    A position with an invalid probability (not a number, negative, more than 1) is left out, so that it
    cannot spoil learned state.

    Attributes:
        contexts: int32, shape (m, 4). The last tokens up to and including the position itself,
            oldest first; -1 where the text is shorter.
        top_tokens: int32, shape (m, k). The most probable next tokens, best first.
        top_probs: float32, shape (m, k). Their probabilities under the target's softmax.
    """

    contexts: NDArray[np.int32]
    top_tokens: NDArray[np.int32]
    top_probs: NDArray[np.float32]

    def __post_init__(self) -> None:
        valid = np.empty(len(self.top_probs), np.bool_)
        if not _kernels.are_probs(np.ascontiguousarray(self.top_probs, np.float32), valid):
            for name in ("contexts", "top_tokens", "top_probs"):
                object.__setattr__(self, name, getattr(self, name)[valid])


def check_ids(ids: NDArray[Any], what: str, vocabulary: int) -> None:
    """Checks integers as token ids.

    Raises:
        InvalidInputError: One is none of the `vocabulary` ids.
    """
    if len(ids) and (ids.min() < 0 or ids.max() >= vocabulary):
        bad = ids[(ids < 0) | (ids >= vocabulary)][0]
        raise InvalidInputError(
            f"{what} contains the token id {bad}; ids must lie in 0..{vocabulary - 1}.",
            "Use the tokenizer that belongs to the model.",
        )


def checked_ids(tokens: ArrayLike, what: str, vocabulary: int) -> TokenArray:
    """A copy of token ids that a caller gives: int32, shape (length,).

    Args:
        tokens: The ids.
        what: Their name in errors.
        vocabulary: Number of token ids.

    Raises:
        InvalidInputError: They are no row of integers, or one is no id.
    """
    ids = np.asarray(tokens)
    if ids.ndim != 1 or (len(ids) and ids.dtype.kind not in "iu"):
        raise InvalidInputError(
            f"{what} has shape {ids.shape} and dtype {ids.dtype}; it must be one row of token ids."
        )
    check_ids(ids, what, vocabulary)
    return np.array(ids, np.int32)


@cache
def empty_proposal(source: str, level: str) -> Proposal:
    """A proposal without nodes, of a source that has no guess."""
    none = np.empty(0, np.int32)
    return Proposal(none, none, np.empty(0, np.float32), none, source, level)


class SourceSession(Protocol):
    """A source's view of one request. Not thread-safe; one decoding loop owns it."""

    def propose(self, budget: int) -> Proposal:
        """Returns at most `budget` nodes that may follow the text so far. Has no visible side effects."""
        ...

    def observe(self, tokens: TokenArray) -> None:
        """Appends accepted tokens, int32, shape (m,), to the request's text."""
        ...

    def learn(self, logits: NodeLogits) -> None:
        """Learns from the target's predictions at verified nodes. Sources of plain text ignore them.

        It comes a step late where a device runs the passes, unless the session has ``learns_early = True``:
        then before the next proposal, and should be quick.
        """
        ...

    def close(self) -> None:
        """Ends the request. The session is not used afterwards."""
        ...


class BaseSession:
    """Defaults of a `SourceSession`: it does not learn, and holds nothing to free."""

    def learn(self, logits: NodeLogits) -> None:
        """Does nothing: only text is kept here."""

    def close(self) -> None:
        """Does nothing: what the request held is freed with its session."""


class DraftSource(Protocol):
    """A lookup structure for continuations. It lives with the drafter, its sessions with a request."""

    name: str
    level: str

    def open(self, prompt: TokenArray, references: Sequence[TokenArray] = ()) -> SourceSession:
        """Starts a request whose text is `prompt`.

        Args:
            prompt: int32, shape (length,).
            references: int32, shape (length,) each. Texts that the reply may quote; none continues into the
                prompt.
        """
        ...

    def flush(self) -> None:
        """Waits until the replies of finished requests can be looked up."""
        ...

    def close(self) -> None:
        """Closes the source: pending data is written, background threads stop."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes held by the source itself, sessions excluded."""
        ...


class BaseSource:
    """Defaults of a `DraftSource`: it is of the request alone, without threads, files and memory."""

    level = "request"

    def flush(self) -> None:
        """Does nothing: no text waits to be looked up."""

    def close(self) -> None:
        """Does nothing: there is no thread or file to close."""

    @property
    def nbytes(self) -> int:
        """0: sessions hold everything."""
        return 0
