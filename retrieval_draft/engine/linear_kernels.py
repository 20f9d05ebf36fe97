"""Ways to compute y = x Wᵀ + b on the CPU, all of one signature."""

from __future__ import annotations

import threading
from collections.abc import Callable
from ctypes import c_int64
from functools import cache
from typing import Any

import torch
from numba import config as numba_config
from torch import Tensor
from torch.nn.functional import linear

from retrieval_draft.engine.threads import on_threads

__all__ = ["KERNELS", "Linear", "is_tiled_available", "stock", "tiled", "transposed"]

Linear = Callable[[Tensor], Tensor]
"""From (..., length) to (..., rows), of the weight's dtype."""

_TILED_TYPES = (torch.float32, torch.bfloat16)
_THREAD_BYTES = 1 << 16
"""Weights that are worth waking another thread for."""


def tiled(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """Our kernel: weights are read once, bfloat16 as bfloat16, and sums are float32.

    A token's result does not depend, to the last bit, on the tokens beside it or on the number of threads.

    Args:
        weight: (rows, length), float32 or bfloat16, each row contiguous.
        bias: (rows,), contiguous, of the weight's dtype.

    Returns:
        The layer, for inputs of the weight's dtype; at most 64 tokens are multiplied at a time.

    Example:
        weight = [[1, 0], [1, 1]], bias = [0, 5]: [[1, 2]] gives [[1, 8]]
    """
    from retrieval_draft.engine._kernels import linear as kernels

    rows, length = weight.shape
    half = weight.dtype == torch.bfloat16
    threads = min(torch.get_num_threads(), 1 + weight.nbytes // _THREAD_BYTES)
    block = min(kernels.BLOCK, -(-rows // (threads * kernels.TILE)) * kernels.TILE)
    most, widen_rows = kernels.MOST_TOKENS, kernels.widen_rows
    run = on_threads(_machine_code(), threads)
    make_job: Any = c_int64 * kernels.JOB
    dtype, size = weight.dtype, weight.element_size()

    def call(x: Tensor) -> Tensor:
        shape = x.shape
        x = x.contiguous()
        y = torch.empty((*shape[:-1], rows), dtype=dtype)
        tokens = y.numel() // rows
        if not tokens:
            return y
        given = x
        if half:
            given = torch.empty(tokens * length)
            widen_rows(x.data_ptr(), given.data_ptr(), tokens, length)
        x_at, y_at, w_at = given.data_ptr(), y.data_ptr(), weight.data_ptr()
        bias_at = 0 if bias is None else bias.data_ptr()
        for begin in range(0, tokens, most):
            job = make_job(
                0, w_at, x_at + 4 * begin * length, bias_at, y_at + size * begin * rows, min(most, tokens -
                begin), rows, length, block, weight.stride(0), half, length,
            )  # fmt: skip
            run(job)
        return y

    return call


def transposed(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """The same product with the operands' roles exchanged, which some BLAS libraries do much faster."""

    def call(x: Tensor) -> Tensor:
        y = torch.mm(weight, x.reshape(-1, weight.shape[1]).t()).t().contiguous()
        y = y if bias is None else y.add_(bias)
        return y.view(*x.shape[:-1], weight.shape[0])

    return call


def stock(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """What torch does."""
    return lambda x: linear(x, weight, bias)


KERNELS: dict[str, Callable[[Tensor, Tensor | None], Linear]] = {
    "tiled": tiled,
    "transposed": transposed,
    "stock": stock,
}
"""By name. The first wins ties."""


def is_tiled_available(weight: Tensor) -> bool:
    """Whether `tiled` can read a weight, and this Python may compile."""
    return (
        not getattr(numba_config, "DISABLE_JIT", 0)
        and weight.dtype in _TILED_TYPES
        and weight.dim() == 2
        and weight.stride(1) == 1
    )


_compiling = threading.Lock()


def _machine_code() -> int:
    """The address of the compiled kernel, which lives as long as the process."""
    with _compiling:
        return int(_compiled().address)


@cache
def _compiled() -> Any:
    from retrieval_draft.engine._kernels.linear import SIGNATURE, linear
    from retrieval_draft.index._kernels.jit import c_function

    return c_function(linear, SIGNATURE)
