"""Ways to compute y = x Wᵀ + b on the CPU, all of one signature."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from ctypes import c_int64
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import config as numba_config
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import linear

from retrieval_draft._forks import lock_for_moments
from retrieval_draft.engine.threads import on_threads

__all__ = [
    "COLUMNS", "KERNELS", "OURS", "PAIRS", "ROWS", "CompiledLinear", "Linear", "Outputs", "amx", "block_of",
    "is_amx_available", "is_tiled_available", "stock", "tiled", "tokenwise", "transposed",
]  # fmt: skip

Linear = Callable[[Tensor], Tensor]
"""A layer from (..., length) to (..., rows), of the weight's dtype."""

_TILED_TYPES = (torch.float32, torch.bfloat16)
ROWS, COLUMNS, PAIRS = range(3)
"""Forms of a kernel's input: (tokens, length), `LANES` tokens side by side, or two elements of each so."""

THREAD_BYTES = 1 << 16
"""Weights that are worth waking another thread for."""

_LINE = 64

_KEPT_BYTES = 4 << 20
"""Size from which memory is kept, and from which numpy asks for huge pages."""


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
    from retrieval_draft.engine.cpu._kernels.linear import linear as kernel

    return CompiledLinear(weight, bias, kernel)


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
    from retrieval_draft.engine.cpu._kernels.linear_tokenwise import linear_tokenwise

    return CompiledLinear(weight, bias, linear_tokenwise, COLUMNS)


def amx(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """Our kernel on Intel's matrix unit, for weights of which `is_amx_available`; otherwise as `tiled`.

    Args:
        weight: (rows, length), bfloat16, each row contiguous.
        bias: (rows,), contiguous, bfloat16.

    Returns:
        The layer, for inputs of bfloat16; at most 64 tokens are multiplied at a time.

    Raises:
        ValueError: It is not available, for this weight or on this machine.
    """
    if not is_amx_available(weight):
        kind = str(weight.dtype).removeprefix("torch.")
        raise ValueError(
            f"AMX multiplies bfloat16 of 16 i rows and 32 j columns where a machine has it, not {kind} of "
            f"{weight.shape[0]} rows and {weight.shape[1]} columns here; see is_amx_available."
        )
    from retrieval_draft.engine.cpu._kernels.linear_amx import linear_amx

    return CompiledLinear(weight, bias, linear_amx, PAIRS)


class CompiledLinear:
    """A layer of one of our kernels: a call, or a job that is one stage of several.

    Args:
        weight: (rows, length), float32 or bfloat16, each row contiguous.
        bias: (rows,), contiguous, of the weight's dtype.
        function: The kernel, of the address of a job.
        packing: `ROWS`, `COLUMNS` or `PAIRS`.

    Attributes:
        function: Address of the C function of a job.
        nbytes: Bytes of the weight.
        rows: Elements of an output.
        length: Elements of an input.
        packing: The form of a job's input.
        is_ordered: Whether a job's input has the elements at even indices of each step first.
    """

    def __init__(
        self, weight: Any, bias: Tensor | None, function: Callable[[int], None], packing: int = ROWS
    ) -> None:
        from retrieval_draft._kernels.jit import c_address
        from retrieval_draft.engine.cpu._kernels.amx_tile import TILE_ROWS
        from retrieval_draft.engine.cpu._kernels.linear import (
            BLOCK,
            MAX_TOKENS,
            SIGNATURE,
            TILE,
            widen_rows,
        )
        from retrieval_draft.engine.cpu._kernels.linear_amx import AMX_BLOCK, pack_pairs
        from retrieval_draft.engine.cpu._kernels.linear_tokenwise import pack
        from retrieval_draft.engine.cpu._kernels.vector_tile import LANES

        self.bias, self._weight = bias, weight
        self.rows, self.length = map(int, weight.shape)
        self.nbytes = int(weight.nbytes)
        self.dtype: torch.dtype = weight.dtype
        self.packing, self.is_ordered = packing, self.dtype == torch.bfloat16
        self.function = c_address(function, SIGNATURE)
        most, tile = ((BLOCK, TILE), (BLOCK, BLOCK), (AMX_BLOCK, TILE_ROWS))[packing]
        self._block = block_of(self.nbytes, self.rows, most, tile)
        self._run = on_threads(self.function)
        self._most, self._lanes = MAX_TOKENS, LANES
        self._widen, self._pack = widen_rows, pack_pairs if packing == PAIRS else pack
        self._outputs = Outputs()

    def job(self, x: int, y: int, tokens: int) -> list[int]:
        """The fields of a job.

        Args:
            x: Address of the input, float32, in the order of this kernel.
            y: Address of the output, (tokens, rows), of the weight's dtype.
            tokens: 1 to `MAX_TOKENS`.
        """
        bias = 0 if self.bias is None else self.bias.data_ptr()
        step = -(-tokens // self._lanes) if self.packing else self.length
        return [
            0, self._weight.data_ptr(), x, bias, y, tokens, self.rows, self.length, self._block,
            self._weight.stride(0), int(self.is_ordered), step,
        ]  # fmt: skip

    def __call__(self, x: Tensor) -> Tensor:
        """The layer, for inputs of the weight's dtype; at most `MAX_TOKENS` are multiplied at a time."""
        shape, rows, length = x.shape, self.rows, self.length
        given = x.contiguous()
        y = self._outputs.tensor((*shape[:-1], rows), self.dtype)
        tokens = y.numel() // rows
        if not tokens:
            return y
        given = self._float32(given, tokens)
        if self.packing:
            columns = min(-(-tokens // self._lanes) * self._lanes, self._most)
            packed = torch.empty(length * columns, dtype=torch.float32, device="cpu")
        size = y.element_size()
        for begin in range(0, tokens, self._most):
            some = min(self._most, tokens - begin)
            part = given.data_ptr() + 4 * begin * length
            if self.packing:
                width = -(-some // self._lanes) * self._lanes
                self._pack(part, length, packed.data_ptr(), some, length, width)
                part = packed.data_ptr()
            fields = self.job(part, y.data_ptr() + size * begin * rows, some)
            threads = min(torch.get_num_threads(), useful_threads(self.nbytes))
            self._run(_job_type(len(fields))(*fields), threads)
        return y

    def _float32(self, x: Tensor, tokens: int) -> Tensor:
        """Contiguous inputs as the kernel reads them, before packing."""
        if not self.is_ordered:
            return x
        given = torch.empty(tokens * self.length, dtype=torch.float32, device="cpu")
        self._widen(x.data_ptr(), given.data_ptr(), tokens, self.length)
        return given


def block_of(weight_bytes: int, rows: int, most: int, tile: int) -> int:
    """Rows that a thread claims at once: as many as leave each useful thread a block, in whole tiles."""
    threads = min(torch.get_num_threads(), useful_threads(weight_bytes))
    return max(min(most, -(-rows // (threads * tile)) * tile), 1)


def useful_threads(weight_bytes: int) -> int:
    """Threads that are worth waking for so many bytes of weights."""
    return 1 + weight_bytes // THREAD_BYTES


@cache
def _job_type(fields: int) -> Any:
    kind: Any = c_int64 * fields
    return kind


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


def _aligned(size: int) -> NDArray[np.uint8]:
    """So many bytes of unwritten memory from the begin of a cache line on."""
    room: NDArray[np.uint8] = np.empty(size + _LINE, np.uint8)
    begin = -room.ctypes.data % _LINE
    return room[begin : begin + size]


class Outputs:
    """Memory for a layer's outputs, the same again once no tensor uses it any more.

    Page faults of fresh memory for the logits of 32 nodes take a fifth of the time of a head's product.
    """

    def __init__(self) -> None:
        self._lock = lock_for_moments()
        self._room: NDArray[np.uint8] | None = None
        self._used: Callable[[], object] = lambda: None  # a weak reference to what the last tensor reads

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of unwritten memory."""
        size = math.prod(shape) * dtype.itemsize
        if size < _KEPT_BYTES:
            return torch.empty(shape, dtype=dtype, device="cpu")
        with self._lock:
            if self._used() is not None:
                room = _aligned(size)
            else:
                if self._room is None or len(self._room) < size:
                    self._room = _aligned(size)
                room = self._room[:size]
                self._used = weakref.ref(room)
        # The tensor's storage, which its views share, holds this array.
        return torch.from_numpy(room).view(dtype).view(shape)


KERNELS: dict[str, Callable[[Tensor, Tensor | None], Linear]] = {
    "amx": amx,
    "tiled": tiled,
    "tokenwise": tokenwise,
    "transposed": transposed,
    "stock": stock,
}
"""Kernels by name. Of those about equally fast the first is used."""


OURS = ("tiled", "tokenwise")
"""Kernels that need `is_tiled_available`."""


def is_amx_available(weight: Tensor) -> bool:
    """True if `amx` can read a weight for which `is_tiled_available`."""
    from retrieval_draft.engine.cpu._kernels.amx_tile import TILE_COLUMNS, TILE_ROWS, has_amx

    return (
        weight.dtype == torch.bfloat16
        and weight.shape[0] % TILE_ROWS == 0
        and weight.shape[1] % TILE_COLUMNS == 0
        and has_amx()
    )


def is_tiled_available(weight: Tensor) -> bool:
    """True if `tiled` can read a weight, a tensor of any shape and dtype, and this Python may compile."""
    return (
        not getattr(numba_config, "DISABLE_JIT", 0)
        and weight.dtype in _TILED_TYPES
        and weight.dim() == 2
        and weight.stride(1) == 1
    )
