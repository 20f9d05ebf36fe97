"""The CPU kernels in numpy, in their order of summation where a test compares to the last bits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval_draft.engine.cpu._kernels.linear import RUN, run_length_of
from retrieval_draft.engine.cpu._kernels.linear_tokenwise import _TURNS as TURNS
from retrieval_draft.engine.cpu._kernels.stages import SILU
from retrieval_draft.engine.cpu._kernels.vector_tile import LANES, STEP


def rms_norm_numpy(x: NDArray[np.float32], scale: NDArray[np.float32], eps: float) -> NDArray[np.float32]:
    """The kernel's twin: float32, shape (rows, length), from `x` of that shape and `scale`, (length,)."""
    given: Any = x.astype(np.float64)
    factor = 1.0 / np.sqrt((given * given).mean(-1, keepdims=True) + eps)
    return (given * factor * scale).astype(np.float32)


def gate_numpy(g: NDArray[np.float32], u: NDArray[np.float32], activation: int) -> NDArray[np.float32]:
    """The twin of `gate` for float32 of any shape."""
    given: Any = g.astype(np.float64)
    z = given if activation == SILU else 2 * np.sqrt(2 / np.pi) * (given + 0.044715 * given**3)
    return (given / (1 + np.exp(-np.clip(z, -700, 700))) * u).astype(np.float32)


def attend_numpy(
    query: NDArray[np.float32],
    key: NDArray[np.float32],
    value: NDArray[np.float32],
    mask: NDArray[np.float32],
    scale: float,
) -> NDArray[np.float32]:
    """The twin of `attend` for float32.

    Args:
        query: (tokens, heads, dim).
        key: (heads of keys, keys, dim), as `value`.
        value: Each head of it serves as many of queries, one after the other.
        mask: (tokens, keys), added to the scores.
        scale: Factor of the scores.

    Returns:
        (tokens, heads, dim).
    """
    times = query.shape[1] // key.shape[0]
    keys, values = (each.astype(np.float64).repeat(times, 0) for each in (key, value))
    scores = np.einsum("thd,hkd->htk", query.astype(np.float64), keys) * scale + mask
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("htk,hkd->thd", weights, values).astype(np.float32)


def linear_numpy(
    x: NDArray[np.float32], w: NDArray[np.float32], bias: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """The kernel's twin, in its order of summation: `LANES` lanes along a row, each a chain of multiply-adds.

    numpy has no fused multiply-add: products are formed in float64, where they are exact, and each sum is
    rounded to float32, which differs from fusing only where two roundings meet.

    Args:
        x: float32, shape (tokens, length).
        w: float32, shape (rows, length).
        bias: float32, shape (rows,), or None.

    Returns:
        float32, shape (tokens, rows).
    """
    tokens, length = x.shape
    out = np.zeros((tokens, w.shape[0]), np.float32)
    run_length = run_length_of(length)
    for run in range(0, length, run_length):
        part = min(run_length, length - run)
        whole = part - part % STEP
        lanes = np.zeros((tokens, w.shape[0], LANES), np.float64)
        for column in range(run, run + whole, LANES):
            exact = (
                x[:, None, column : column + LANES].astype(np.float64) * w[None, :, column : column + LANES]
            )
            lanes = (lanes + exact).astype(np.float32).astype(np.float64)
        halves = lanes.astype(np.float32)
        while halves.shape[-1] > 1:
            middle = halves.shape[-1] // 2
            halves = halves[..., :middle] + halves[..., middle:]
        out += halves[..., 0]
        rest = np.zeros_like(out)
        for column in range(run + whole, run + part):
            rest += x[:, None, column] * w[None, :, column]
        if whole < part:
            out += rest
    return out if bias is None else out + bias


def linear_tokenwise_numpy(
    x: NDArray[np.float32], w: NDArray[np.float32], bias: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """The kernel's twin: in each run of a row a chain of multiply-adds, rounded as in `linear_numpy`.

    Args:
        x: float32, shape (tokens, length).
        w: float32, shape (rows, length).
        bias: float32, shape (rows,), or None.

    Returns:
        float32, shape (tokens, rows).
    """
    out = np.zeros((len(x), len(w)), np.float32)
    for run in range(0, x.shape[1], RUN):
        end = min(run + RUN, x.shape[1])
        whole = end - (end - run) % TURNS
        for begin, stop in ((run, whole), (whole, end)):
            total = np.zeros(out.shape, np.float64)
            for column in range(begin, stop):
                exact = x[:, None, column].astype(np.float64) * w[None, :, column]
                total = (total + exact).astype(np.float32).astype(np.float64)
            out += total.astype(np.float32)
    return out if bias is None else out + bias


def linear_quantized_numpy(
    x: NDArray[np.float32],
    w: NDArray[np.int8],
    scale: NDArray[np.float32],
    shift: NDArray[np.float32] | None = None,
    bias: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """The kernel's twin, in its order of summation.

    Args:
        x: float32, shape (tokens, length).
        w: Integers, shape (rows, length), one for each weight.
        scale: float32, shape (rows, groups); without `shift` (rows, 1), and the sums are scaled.
        shift: float32, shape (rows, groups), added to scaled weights, or None.
        bias: float32, shape (rows,), or None.

    Returns:
        float32, shape (tokens, rows).
    """
    if shift is None:
        out = linear_numpy(x, w.astype(np.float32)) * scale[:, 0]
        return out if bias is None else out + bias
    each = w.shape[1] // scale.shape[1]
    scale, shift = np.repeat(scale, each, axis=1), np.repeat(shift, each, axis=1)
    # Exact in float64, then rounded once, as a fused multiply-add is.
    wide = (w.astype(np.float64) * scale + shift).astype(np.float32)
    return linear_numpy(x, wide, bias)
