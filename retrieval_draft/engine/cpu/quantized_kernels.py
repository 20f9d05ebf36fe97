"""Ways to compute y = x Wᵀ + b on the CPU for quantised weights, all of one signature."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import linear

from retrieval_draft.engine.cpu.linear_kernels import CompiledLinear, Linear, block_of
from retrieval_draft.engine.cpu.quantized_weights import QuantizedWeight

__all__ = ["QUANTIZED_KERNELS", "QuantizedLinear", "own", "quantized"]


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
    return QuantizedLinear(weight, bias)


class QuantizedLinear(CompiledLinear):
    """As `CompiledLinear`, for integers, with inputs in their own order.

    Args:
        weight: (rows, length).
        bias: (rows,), contiguous, of the weight's dtype.
    """

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None) -> None:
        from retrieval_draft.engine.cpu._kernels.linear import BLOCK
        from retrieval_draft.engine.cpu._kernels.linear_quantized import linear_quantized

        super().__init__(weight, bias, linear_quantized)
        self._is_half, self.is_ordered = self.is_ordered, False
        self._data, self._terms = weight.data, weight.terms
        self._planes, self._group = weight.planes, weight.group
        self._block = block_of(self.nbytes, self.rows // self._planes, BLOCK, _TILE)

    def job(self, x: int, y: int, tokens: int) -> list[int]:
        """The fields of a job, as for `CompiledLinear`."""
        bias = 0 if self.bias is None else self.bias.data_ptr()
        return [
            0, self._data.data_ptr(), x, bias, y, tokens, self.rows, self.length, self._block,
            self._data.stride(0), int(self._is_half), self._planes, self._terms.data_ptr(), self._group, 0, 0,
        ]  # fmt: skip

    def _float32(self, x: Tensor, tokens: int) -> Tensor:
        return x.float()


def own(weight: QuantizedWeight, bias: Tensor | None = None) -> Linear:
    """The product as the library that made the weight computes it."""
    parameter = weight.own
    return lambda x: linear(x, parameter, bias)


QUANTIZED_KERNELS: dict[str, Callable[[QuantizedWeight, Tensor | None], Linear]] = {
    "quantized": quantized,
    "own": own,
}
"""Kernels by name. Of those about equally fast the first is used."""

_TILE = 8
"""Rows of bytes that a block of the kernel is a multiple of."""
