"""Ways to compute y = x Wᵀ + b on the CPU for quantised weights, all of one signature."""

from __future__ import annotations

import threading
from collections.abc import Callable
from ctypes import c_int64
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from retrieval_draft.engine.cpu.linear_kernels import THREAD_BYTES, Linear, fresh
from retrieval_draft.engine.cpu.quantized_weights import QuantizedWeight
from retrieval_draft.engine.threads import on_threads

__all__ = ["QUANTIZED_KERNELS", "own", "quantized"]


def quantized(weight: QuantizedWeight, bias: Tensor | None = None) -> Linear:
    """Our kernel: integers are read once and become float32 in registers; sums are float32.

    A token's result does not depend, to the last bit, on the tokens beside it or on the number of threads.

    Args:
        weight: (rows, length).
        bias: (rows,), contiguous, of the weight's dtype.

    Returns:
        The layer, for inputs of the weight's dtype; at most 64 tokens are multiplied at a time.

    Example:
        integers [[1, 0], [1, 1]], scales [2, 3], bias [0, 5]: [[1, 2]] gives [[2, 14]]
    """
    from retrieval_draft.engine.cpu._kernels.linear import BLOCK, MAX_TOKENS
    from retrieval_draft.engine.cpu._kernels.linear_quantized import QUANTIZED_JOB

    rows, length = weight.shape
    data, terms, planes, group = weight.data, weight.terms, weight.planes, weight.group
    half, dtype = weight.dtype == torch.bfloat16, weight.dtype
    size = 2 if half else 4
    useful = 1 + weight.nbytes // THREAD_BYTES
    threads = min(torch.get_num_threads(), useful)
    lines, tile = rows // planes, 8
    block = max(min(BLOCK, -(-lines // (threads * tile)) * tile), 1)
    run = on_threads(_machine_code())
    make_job: Any = c_int64 * QUANTIZED_JOB

    def call(x: Tensor) -> Tensor:
        shape = x.shape
        x = x.float().contiguous()
        y = fresh((*shape[:-1], rows), dtype)
        tokens = y.numel() // rows
        bias_at = 0 if bias is None else bias.data_ptr()
        for begin in range(0, tokens, MAX_TOKENS):
            job = make_job(
                0, data.data_ptr(), x.data_ptr() + 4 * begin * length, bias_at,
                y.data_ptr() + size * begin * rows, min(MAX_TOKENS, tokens - begin), rows, length, block,
                data.stride(0), half, planes, terms.data_ptr(), group,
            )  # fmt: skip
            run(job, min(torch.get_num_threads(), useful))
        return y

    return call


def own(weight: QuantizedWeight, bias: Tensor | None = None) -> Linear:
    """The product as the library that made the weight computes it."""
    parameter = weight.own
    return lambda x: linear(x, parameter, bias)


QUANTIZED_KERNELS: dict[str, Callable[[QuantizedWeight, Tensor | None], Linear]] = {
    "quantized": quantized,
    "own": own,
}
"""Kernels by name. Of those about equally fast the first is used."""

_compiling = threading.Lock()


def _machine_code() -> int:
    """The address of the compiled kernel, which lives as long as the process."""
    with _compiling:
        return int(_compiled().address)


@cache
def _compiled() -> Any:
    from retrieval_draft._kernels.jit import c_function
    from retrieval_draft.engine.cpu._kernels.linear import SIGNATURE
    from retrieval_draft.engine.cpu._kernels.linear_quantized import linear_quantized

    return c_function(linear_quantized, SIGNATURE)
