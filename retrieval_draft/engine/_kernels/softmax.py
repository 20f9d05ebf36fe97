"""The denominator of a softmax, on one core: threads would cost more than they save on a busy machine."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from retrieval_draft.index._kernels.jit import sum_kernel

__all__ = ["exp_sums", "exp_sums_numpy"]


@sum_kernel
def exp_sums(logits: NDArray[np.float32], best: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    """Sum over each row of exp(logit - best), to 1e-4 and far better where the terms matter.

    exp(x) is a polynomial of x / 32 to the 32nd power: no table and no branch, so that it runs in
    vector registers.

    Args:
        logits: float32, shape (n, vocabulary).
        best: float32, shape (n,). The largest of each row.
        out: float32, shape (n,). Written.
    """
    run = 1024
    for row in range(logits.shape[0]):
        total = 0.0
        top = best[row]
        line = logits[row]
        for begin in range(0, line.shape[0], run):
            part = np.float32(0.0)
            for column in range(begin, min(begin + run, line.shape[0])):
                x = max((line[column] - top) * np.float32(1 / 32), np.float32(-1.0))
                y = np.float32(1 / 120) * x + np.float32(1 / 24)
                y = y * x + np.float32(1 / 6)
                y = y * x + np.float32(0.5)
                y = y * x + np.float32(1.0)
                y = y * x + np.float32(1.0)
                y = y * y
                y = y * y
                y = y * y
                y = y * y
                part += y * y
            total += part
        out[row] = total


def exp_sums_numpy(logits: NDArray[np.float32], best: NDArray[np.float32]) -> NDArray[np.float32]:
    """The same in numpy, exactly, for tests."""
    sums: NDArray[np.float32] = np.exp(logits - best[:, None]).sum(-1, dtype=np.float64).astype(np.float32)
    return sums
