"""Texts of a request that are stored: new parts of the prompt, and every reply."""

from __future__ import annotations

import numpy as np

from retrieval_draft.index.segments.segment import match_state
from retrieval_draft.index.segments.segment_session import Segments
from retrieval_draft.index.source import TokenArray

__all__ = ["new_texts"]

_UNTOLD = 3
"""Shorter matches than a sort key (4 tokens at most) count as none."""


def new_texts(segments: Segments, prompt: TokenArray, reply: TokenArray) -> list[TokenArray]:
    """Texts that a request adds: new parts of the prompt, and the reply, each with the context before it.

    Args:
        segments: The known texts.
        prompt: int32, shape (n,); may be empty.
        reply: int32, shape (m,); may be empty.

    Example:
        with prompt 1 2 3 4 known, prompt 1 2 3 4 5 and reply 6: the text 1 2 3 4 5 6; at most 31 known tokens
        precede the new ones
    """
    from retrieval_draft.index._kernels import segment_match as kernels

    pieces: list[TokenArray] = []
    if len(prompt):
        rows = (
            np.stack([segment.row for segment in segments])
            if segments
            else np.empty((0, kernels.SEGMENT_FIELDS), np.int64)
        )
        lengths = np.empty(len(prompt), np.int32)
        kernels.match_lengths(rows, *match_state(len(segments)), prompt, lengths)
        # A position is known if the 32 tokens that end there, or all of fewer, are; a new one is kept with
        # its context.
        enough = np.minimum(np.arange(len(prompt)) + 1, kernels.LONGEST)
        enough[:_UNTOLD] = 0
        fresh = np.concatenate((lengths < enough, [bool(len(reply))]))
        wanted = np.zeros(len(fresh) + kernels.LONGEST, bool)
        for position in np.flatnonzero(np.diff(fresh, prepend=False)):
            if fresh[position]:
                wanted[max(position - kernels.LONGEST + 1, 0) : position] = True
        wanted = (wanted[: len(fresh)] | fresh)[: len(prompt)]
        edges = np.flatnonzero(np.diff(wanted, prepend=False, append=False))
        pieces = [prompt[begin:end] for begin, end in zip(edges[::2], edges[1::2], strict=True)]
    if len(reply):
        if len(prompt):
            pieces[-1:] = [np.concatenate((*pieces[-1:], reply))]
        else:
            pieces.append(reply)
    return pieces
