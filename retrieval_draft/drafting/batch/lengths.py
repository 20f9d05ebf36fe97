"""How long the chains of a batch should be."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from retrieval_draft.errors import InvalidInputError

__all__ = ["choose_lengths"]


def choose_lengths(
    path_probs: NDArray[np.float32], lengths: NDArray[np.int32], costs: ArrayLike
) -> NDArray[np.int32]:
    """Cuts the chains of a batch so that the step that verifies them yields the most tokens for its time.

    A draft token brings its path probability in tokens, whichever row it is of, and costs what one more
    token costs in that step: all rows compete. Path probabilities fall along a chain, so the best n tokens of
    all rows are a beginning of each chain.

    Args:
        path_probs: float32, shape (rows, longest).
        lengths: int32, shape (rows,). As proposed.
        costs: Shape (n,), at least one: time of a step that verifies 0, 1, 2, ... draft tokens in all rows
            together, in any unit. Beyond its end it rises as at its end.

    Returns:
        int32, shape (rows,): none longer than proposed; (rows + sum of the path probabilities kept) / cost
        is the largest there is, and of equal ones the shortest.

    Raises:
        InvalidInputError: Shapes do not fit, or a cost is not a number above 0.

    Example:
        path probabilities [.9, .8] and [.3], costs [1, 1.1, 1.2, 1.3]: 2.9 / 1.1 = 2.64 with one token,
        3.7 / 1.2 = 3.08 with two, 4 / 1.3 = 3.08 with three, a little less: lengths [2, 0]
    """
    probs, sizes = np.asarray(path_probs, np.float32), np.asarray(lengths, np.int32)
    table = np.asarray(costs, np.float64)
    if probs.ndim != 2 or sizes.shape != probs.shape[:1] or sizes.max(initial=0) > probs.shape[1]:
        raise InvalidInputError(
            f"path_probs has shape {probs.shape} and lengths {sizes.shape}; they must be (rows, longest) and "
            "(rows,), and no length above longest."
        )
    if table.ndim != 1 or not len(table) or not (np.isfinite(table) & (table > 0)).all():
        raise InvalidInputError("costs must be one row of numbers above 0, the first for no draft tokens.")
    rows, width = probs.shape
    kept = np.flatnonzero((np.arange(width) < sizes[:, None]).ravel())
    if not len(kept):
        return np.zeros(rows, np.int32)
    # Equal ones in the order of their places, so that a row's share is a beginning of its chain.
    order = kept[np.argsort(-np.minimum.accumulate(probs, 1).ravel()[kept], kind="stable")]
    tokens = rows + np.concatenate(([0.0], np.cumsum(probs.ravel()[order], dtype=np.float64)))
    slope = table[-1] - table[-2] if len(table) > 1 else 0.0
    beyond = table[-1] + slope * np.arange(1, max(len(tokens) - len(table), 0) + 1)
    times = np.concatenate((table, np.maximum(beyond, table[-1])))[: len(tokens)]
    best = int(np.argmax(tokens / times))
    return np.bincount(order[:best] // width, minlength=rows).astype(np.int32)
