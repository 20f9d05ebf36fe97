"""Weights that quanto and torchao hold as integers, read where they lie."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from numba import config as numba_config
from torch import Tensor, nn

__all__ = ["QuantizedWeight", "quantized_weight"]

_TYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A linear layer's weight as our kernels read it. Integers are those of the layer, never copies.

    Attributes:
        own: The layer's parameter, a tensor subclass.
        data: int8 (rows, length), or uint8 (rows / 2, length) with two weights in a byte: that of row r in
            the lower half and that of row rows / 2 + r in the upper one.
        terms: float32, contiguous; (rows,), scales of whole rows, or (rows, groups, 2): the scale of a group,
            and what is added to its scaled weights.
    """

    own: Tensor
    data: Tensor
    terms: Tensor

    @property
    def shape(self) -> torch.Size:
        """Rows and length."""
        return self.own.shape

    @property
    def dtype(self) -> torch.dtype:
        """Type of inputs and outputs."""
        return self.own.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the integers."""
        return self.data.nbytes

    @property
    def planes(self) -> int:
        """Weights in a byte."""
        return 1 if self.data.dtype == torch.int8 else 2

    @property
    def group(self) -> int:
        """Weights of a row that share a scale; 0 for all of them, symmetric ones."""
        return 0 if self.terms.dim() == 1 else int(self.shape[1]) // int(self.terms.shape[1])

    @property
    def kind(self) -> str:
        """Names the representation in the file of kernel choices."""
        return f"int{8 // self.planes}" + (f"/{self.group}" if self.group else "")


def quantized_weight(layer: nn.Module) -> QuantizedWeight | None:
    """The quantised weight of a linear layer; None for one that is another's, or that we cannot read.

    Known are quanto's qint8 and qint4, torchao's int8, and its fewer bits in a byte for each weight.
    Layers that quantise their inputs, too, are left alone: their results depend on all of an input.

    Args:
        layer: Any module.
    """
    weight = layer._parameters.get("weight")
    read = _READERS.get((type(weight).__module__.partition(".")[0], type(weight).__name__))
    if read is None or weight is None or getattr(numba_config, "DISABLE_JIT", False):
        return None
    plain = type(layer) is nn.Linear
    quanto = type(layer).__name__ == "QLinear" and type(layer).__module__.startswith("optimum.quanto.")
    if not plain and not (quanto and layer.__dict__.get("activation_qtype", "") is None):
        return None
    if weight.device.type != "cpu" or weight.dtype not in _TYPES or weight.dim() != 2 or not weight.numel():
        return None
    try:
        with torch.no_grad():
            found = read(weight)
    except (AttributeError, TypeError, ValueError):
        # Another version of the library, which represents its weights in another way.
        return None
    return found if found is not None and _is_readable(found) else None


def _is_readable(weight: QuantizedWeight) -> bool:
    """True if the tensors have the shapes and dtypes of a `QuantizedWeight`."""
    from retrieval_draft.engine.cpu._kernels.vector_tile import STEP

    rows, length = weight.shape
    data, terms = weight.data, weight.terms
    return (
        type(data) is Tensor
        and data.device.type == "cpu"
        and data.dtype in (torch.int8, torch.uint8)
        and data.shape == (rows // weight.planes, length)
        and rows % weight.planes == 0
        and data.stride(1) == 1
        and data.stride(0) >= length
        and terms.dtype == torch.float32
        and terms.is_contiguous()
        and terms.shape[0] == rows
        and (
            (weight.planes == 1)
            if terms.dim() == 1
            else terms.dim() == 3
            and terms.shape[2] == 2
            and terms.shape[1] > 0
            and length % terms.shape[1] == 0
            and length // terms.shape[1] % STEP == 0
        )
    )


def _quanto_bytes(weight: Any) -> QuantizedWeight | None:
    meta = _meta(weight)
    if (meta["qtype"], meta["axis"], meta["activation_qtype"]) != ("qint8", "0", "none"):
        return None
    return QuantizedWeight(weight, weight._data, _row_scales(weight._scale, weight.shape[0]))


def _quanto_bits(weight: Any) -> QuantizedWeight | None:
    meta = _meta(weight)
    packed = weight._data
    if (meta["qtype"], meta["axis"]) != ("qint4", "0") or type(packed).__name__ != "PackedTensor":
        return None
    rows, length = weight.shape
    if packed.numel() != rows * length or rows % 2:
        return None
    scale, shift = weight._scale.reshape(rows, -1), weight._shift.reshape(rows, -1)
    data = packed._data.view(rows // 2, length)
    offset = -shift.float() if shift.is_floating_point() else -shift.float() * scale.float()
    return QuantizedWeight(weight, data, _terms(scale, offset))


def _torchao_int8(weight: Any) -> QuantizedWeight | None:
    if weight.act_quant_kwargs is not None or weight.act_pre_scale is not None or weight.block_size[0] < 1:
        return None
    rows, length = weight.shape
    if weight.block_size[1] == length:
        if weight.zero_point is not None and bool(weight.zero_point.any()):
            return None
        # torchao rounds scales of rows to the type of the input.
        scale = weight.scale.to(weight.dtype)
        return QuantizedWeight(weight, weight.qdata, _row_scales(scale, rows))
    return _torchao_groups(weight)


def _torchao_integers(weight: Any) -> QuantizedWeight | None:
    return None if weight.activation_quantization is not None else _torchao_groups(weight)


def _torchao_groups(weight: Any) -> QuantizedWeight | None:
    rows, length = weight.shape
    if weight.block_size[0] != 1:
        return None
    shape = rows, length // weight.block_size[1]
    scale = weight.scale.reshape(shape)
    if weight.zero_point is None:
        offset = torch.zeros(shape, dtype=torch.float32, device="cpu")
    else:
        offset = -weight.zero_point.reshape(shape).float() * scale.float()
    return QuantizedWeight(weight, weight.qdata, _terms(scale, offset))


_READERS: Mapping[tuple[str, str], Callable[[Any], QuantizedWeight | None]] = {
    ("optimum", "WeightQBytesTensor"): _quanto_bytes,
    ("optimum", "WeightQBitsTensor"): _quanto_bits,
    ("torchao", "Int8Tensor"): _torchao_int8,
    ("torchao", "IntxUnpackedToInt8Tensor"): _torchao_integers,
}
"""By package and class of a weight."""


def _meta(weight: Any) -> Mapping[str, str]:
    """Properties of a quanto tensor, as texts, by torch's protocol of tensor subclasses."""
    meta: Mapping[str, str] = weight.__tensor_flatten__()[1]
    return meta


def _row_scales(scale: Tensor, rows: int) -> Tensor:
    """float32 (rows,) from a scale for each row or one for all; no copy where none is needed."""
    flat = scale.detach().reshape(-1).float()
    return (flat.expand(rows) if flat.numel() == 1 else flat).contiguous()


def _terms(scale: Tensor, offset: Tensor) -> Tensor:
    return torch.stack((scale.detach().float(), offset), dim=2)
