"""Top log probabilities of an engine's model, in the form that sources learn from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from retrieval_draft.config import TOP_K_LIMIT
from retrieval_draft.errors import InvalidInputError
from retrieval_draft.index.source import CONTEXT, NodeLogits, TokenArray

if TYPE_CHECKING:
    from retrieval_draft.draft_service.sessions import OpenSession
    from retrieval_draft.draft_service.wire import TopLogprobs

__all__ = ["node_logits"]


def node_logits(
    top_logprobs: TopLogprobs | None, emitted: TokenArray, session: OpenSession, vocabulary: int
) -> NodeLogits | None:
    """A step's `top_logprobs`, with the context of each row.

    Args:
        top_logprobs: As received; None without any.
        emitted: int32, shape (m,). The step's tokens.
        session: Its state before these tokens.
        vocabulary: Number of token ids.

    Raises:
        InvalidInputError: It is no table, or its rows match no positions.
    """
    if top_logprobs is None or not top_logprobs.tokens:
        return None
    tokens, probs = _table(top_logprobs)
    if int(tokens.max(initial=0)) >= vocabulary:
        raise InvalidInputError(
            f"top_logprobs contains the token id {tokens.max()}; ids must lie in 0..{vocabulary - 1}."
        )
    if top_logprobs.nodes is None:
        if len(tokens) != len(emitted):
            raise InvalidInputError(
                f"top_logprobs has {len(tokens)} rows for {len(emitted)} tokens.",
                "Pass one for each, or name nodes.",
            )
        return NodeLogits(_contexts(session.tail, emitted), tokens, probs)
    tree = session.tree
    if tree is None or len(top_logprobs.nodes) != len(tokens) or max(top_logprobs.nodes) >= len(tree):
        size = 0 if tree is None else len(tree)
        raise InvalidInputError(
            f"top_logprobs names {len(top_logprobs.nodes)} nodes in {len(tokens)} rows; "
            f"the last tree has {size} nodes.",
            "Pass one row for each node, the root being 0.",
        )
    return NodeLogits(tree.contexts(session.tail[:-1])[top_logprobs.nodes], tokens, probs)


def _table(top_logprobs: TopLogprobs) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    widths = {len(row) for row in top_logprobs.tokens} | {len(row) for row in top_logprobs.probs}
    if (
        len(top_logprobs.tokens) != len(top_logprobs.probs)
        or len(widths) != 1
        or not 1 <= max(widths) <= TOP_K_LIMIT
    ):
        raise InvalidInputError(
            "top_logprobs is no table.",
            f"Pass as many probs as tokens, in rows of one length, 1..{TOP_K_LIMIT}.",
        )
    probs = np.array(top_logprobs.probs, np.float32)
    if not np.isfinite(probs).all():
        raise InvalidInputError("top_logprobs has a probability that is no number.")
    return np.array(top_logprobs.tokens, np.int32), probs


def _contexts(tail: TokenArray, emitted: TokenArray) -> NDArray[np.int32]:
    """Context before each token of `emitted`: int32, shape (m, CONTEXT), -1 where the text is shorter.

    Example:
        tail [5, 6], emitted [7, 8]  ->  [[-1, -1, 5, 6], [-1, 5, 6, 7]]
    """
    text = np.concatenate((np.full(CONTEXT, -1, np.int32), tail, emitted))
    first = len(tail) + np.arange(len(emitted))
    contexts: NDArray[np.int32] = text[first[:, None] + np.arange(CONTEXT)]
    return contexts
