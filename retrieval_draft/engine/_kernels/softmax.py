"""The denominator of a softmax, on one core: threads would cost more than they save on a busy machine."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from retrieval_draft._kernels.jit import sum_kernel

__all__ = [
    "exp_sum",
    "exp_sum_above",
    "exp_sums",
]

LOG2_E = np.float32(1.4426950408889634)
# 2^r is 1 + r (P1 + r (P2 + ...)) to 9e-8 where |r| <= 1/2, and 1 exactly at 0. Least squares, reweighted.
P1, P2 = np.float32(0.6931470036506653), np.float32(0.24022242426872253)
P3, P4 = np.float32(0.05550733953714371), np.float32(0.009671512991189957)
P5 = np.float32(0.0013264715671539307)


@sum_kernel
def exp_sum(row: NDArray[np.float32], temperature: np.float32, largest: np.float32) -> float:
    """Sum of exp(score / temperature - largest), to 3e-7, and 1e-6 for terms below 1e-10.

    Scores are divided first and then compared with the largest, which is how a softmax in float32 rounds. The
    power of two is written into the exponent's bits, so that all of it runs in vector registers.

    Args:
        row: float32, shape (vocabulary,).
        temperature: Divides the scores.
        largest: The largest score, divided. Finite.
    """
    run = 1024
    total = 0.0
    for begin in range(0, row.shape[0], run):
        part = np.float32(0.0)
        for column in range(begin, min(begin + run, row.shape[0])):
            z = max((row[column] / temperature - largest) * LOG2_E, np.float32(-126.0))
            whole = np.int32(z - np.float32(0.5))
            r = z - np.float32(whole)
            y = P5 * r + P4
            y = y * r + P3
            y = y * r + P2
            y = y * r + P1
            y = y * r + np.float32(1.0)
            power = np.int32(np.int32(whole + np.int32(127)) << np.int32(23))
            part += y * power.view(np.float32)
        total += float(part)
    return total


@sum_kernel
def exp_sum_above(row: NDArray[np.float32], best: np.float32) -> float:
    """Sum of exp(logit - best), to 1e-4 and far better where the terms matter.

    exp(x) is a polynomial of x / 32 to the 32nd power: no table and no branch, so that it runs in
    vector registers.

    Args:
        row: float32, shape (vocabulary,).
        best: The largest of them.
    """
    run = 1024
    total = 0.0
    for begin in range(0, row.shape[0], run):
        part = np.float32(0.0)
        for column in range(begin, min(begin + run, row.shape[0])):
            x = max((row[column] - best) * np.float32(1 / 32), np.float32(-1.0))
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
    return total


@sum_kernel
def exp_sums(logits: NDArray[np.float32], best: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    """Writes `exp_sum_above` of each row.

    Args:
        logits: float32, shape (n, vocabulary).
        best: float32, shape (n,). The largest of each row.
        out: float32, shape (n,). Written.
    """
    for row in range(logits.shape[0]):
        out[row] = exp_sum_above(logits[row], best[row])
