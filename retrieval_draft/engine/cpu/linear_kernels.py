"""Ways to compute y = x Wᵀ + b on the CPU, all of one signature."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from ctypes import c_int64
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import config as numba_config
from torch import Tensor
from torch.nn.functional import linear

from retrieval_draft.engine.threads import on_threads

__all__ = [
    "KERNELS", "OURS", "THREAD_BYTES", "Linear", "fresh", "is_tiled_available", "stock", "tiled", "tokenwise",
    "transposed",
]  # fmt: skip

Linear = Callable[[Tensor], Tensor]
"""A layer from (..., length) to (..., rows), of the weight's dtype."""

_TILED_TYPES = (torch.float32, torch.bfloat16)
THREAD_BYTES = 1 << 16
"""Weights that are worth waking another thread for."""

_HUGE_BYTES = 4 << 20
"""Size from which numpy asks for huge pages."""


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
    return _compiled_layer("tiled", weight, bias)


def tokenwise(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """Our kernel for many tokens, which lie beside each other in vector registers; otherwise as `tiled`.

    Args:
        weight: (rows, length), float32 or bfloat16, each row contiguous.
        bias: (rows,), contiguous, of the weight's dtype.

    Returns:
        The layer, for inputs of the weight's dtype; at most 64 tokens are multiplied at a time.

    Example:
        weight = [[1, 0], [1, 1]], bias = [0, 5]: [[1, 2], [3, 4]] gives [[1, 8], [3, 12]]
    """
    return _compiled_layer("tokenwise", weight, bias)


def _compiled_layer(name: str, weight: Tensor, bias: Tensor | None) -> Linear:
    """Layer of `tiled` and `tokenwise`, which differ in the order of x and of the sums."""
    from retrieval_draft.engine.cpu._kernels import linear as kernels
    from retrieval_draft.engine.cpu._kernels.linear_tokenwise import pack
    from retrieval_draft.engine.cpu._kernels.vector_tile import LANES

    rows, length = weight.shape
    packs, half = name == "tokenwise", weight.dtype == torch.bfloat16
    useful = 1 + weight.nbytes // THREAD_BYTES
    block = kernels.BLOCK
    if not packs:
        threads = min(torch.get_num_threads(), useful)
        block = min(block, -(-rows // (threads * kernels.TILE)) * kernels.TILE)
    most, widen_rows = kernels.MAX_TOKENS, kernels.widen_rows
    run = on_threads(_machine_code(name))
    make_job: Any = c_int64 * kernels.JOB
    dtype, size = weight.dtype, weight.element_size()

    def call(x: Tensor) -> Tensor:
        shape = x.shape
        x = x.contiguous()
        y = fresh((*shape[:-1], rows), dtype)
        tokens = y.numel() // rows
        if not tokens:
            return y
        given = x
        if half:
            given = torch.empty(tokens * length, dtype=torch.float32, device="cpu")
            widen_rows(x.data_ptr(), given.data_ptr(), tokens, length)
        x_at, y_at, w_at = given.data_ptr(), y.data_ptr(), weight.data_ptr()
        bias_at = 0 if bias is None else bias.data_ptr()
        if packs:
            words = length * min(-(-tokens // LANES) * LANES, most)
            packed = torch.empty(words, dtype=torch.float32, device="cpu")
        for begin in range(0, tokens, most):
            some = min(most, tokens - begin)
            part, step = x_at + 4 * begin * length, length
            if packs:
                step = -(-some // LANES)
                pack(part, packed.data_ptr(), some, length, step * LANES)
                part = packed.data_ptr()
            job = make_job(
                0, w_at, part, bias_at, y_at + size * begin * rows, some, rows, length, block,
                weight.stride(0), half, step,
            )  # fmt: skip
            run(job, min(torch.get_num_threads(), useful))
        return y

    return call


def transposed(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """The same product with the operands' roles exchanged, which some BLAS libraries do much faster.

    Args:
        weight: (rows, length), any floating dtype.
        bias: (rows,), of the weight's dtype, or None.
    """

    def call(x: Tensor) -> Tensor:
        y = torch.mm(weight, x.reshape(-1, weight.shape[1]).t()).t().contiguous()
        y = y if bias is None else y.add_(bias)
        return y.view(*x.shape[:-1], weight.shape[0])

    return call


def stock(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """The product as torch computes it; weight (rows, length) and bias (rows,) of any floating dtype."""
    return lambda x: linear(x, weight, bias)


def fresh(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory for a result. numpy asks for huge pages: page faults of the logits cost much.

    Measured for 64 x 262,144 float32: first writes take a third of the time in memory of torch's own.
    """
    if math.prod(shape) * dtype.itemsize < _HUGE_BYTES:
        return torch.empty(shape, dtype=dtype, device="cpu")
    plain = np.float32 if dtype == torch.float32 else np.int16
    return torch.from_numpy(np.empty(shape, plain)).view(dtype)


KERNELS: dict[str, Callable[[Tensor, Tensor | None], Linear]] = {
    "tiled": tiled,
    "tokenwise": tokenwise,
    "transposed": transposed,
    "stock": stock,
}
"""Kernels by name. Of those about equally fast the first is used."""


OURS = ("tiled", "tokenwise")
"""Kernels that need `is_tiled_available`."""


def is_tiled_available(weight: Tensor) -> bool:
    """True if `tiled` can read a weight, a tensor of any shape and dtype, and this Python may compile."""
    return (
        not getattr(numba_config, "DISABLE_JIT", 0)
        and weight.dtype in _TILED_TYPES
        and weight.dim() == 2
        and weight.stride(1) == 1
    )


_compiling = threading.Lock()


def _machine_code(name: str) -> int:
    """The address of a compiled kernel, which lives as long as the process."""
    with _compiling:
        return int(_compiled(name).address)


@cache
def _compiled(name: str) -> Any:
    from retrieval_draft._kernels.jit import c_function
    from retrieval_draft.engine.cpu._kernels.linear import SIGNATURE, linear
    from retrieval_draft.engine.cpu._kernels.linear_tokenwise import linear_tokenwise

    return c_function({"tiled": linear, "tokenwise": linear_tokenwise}[name], SIGNATURE)
