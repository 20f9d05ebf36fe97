"""Root-mean-square norms on the CPU in one operation: in a model they are six, a hundred times a pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from weakref import ref

import numpy as np
import torch
from numba import config as numba_config
from numpy.typing import NDArray
from torch import Tensor, nn

from retrieval_draft.engine.substitution import is_free, is_ordinary_call

__all__ = ["CpuNorm", "Norm"]

_TYPES = (torch.float32, torch.bfloat16)
_CLOSE = {torch.float32: 2e-6, torch.bfloat16: 2.0**-7}
"""Relative difference to the module's own result that is rounding: a few units in the last place."""


@dataclass(frozen=True, slots=True)
class Norm:
    """An RMS norm as our kernels compute it. It holds parameters and not the module, which can be freed.

    Attributes:
        parameters: Those of the module.
        weight: The weight when it was read.
        scale: float32, shape (length,); each element times that of a normed row.
        address: That of the scale, good as long as the scale is held.
        eps: Added to the mean of squares.
        offset: The scale less the weight.
        twice: Whether rows are rounded to the weight's dtype before they are scaled.
    """

    parameters: dict[str, nn.Parameter | None]
    weight: nn.Parameter
    scale: NDArray[np.float32]
    address: int
    eps: float
    offset: float
    twice: bool

    def refresh(self) -> None:
        """Reads the weight again, which may have been changed in place."""
        with torch.no_grad():
            torch.add(self.weight.float(), self.offset, out=torch.from_numpy(self.scale))


class CpuNorm:
    """Faster ``forward`` functions for a model's RMS norms.

    A module counts as one when its class is named so and its own result on random rows is reproduced: models
    differ in whether they scale by w (Llama) or by 1 + w (Gemma), and in when they round.

    Args:
        model: Any model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._rules: dict[tuple[type, torch.dtype], tuple[float, bool] | None] = {}

    def forwards(self) -> Iterator[tuple[nn.Module, Callable[[Tensor], Tensor]]]:
        """Each RMS norm with its faster ``forward``."""
        for module in self._model.modules():
            norm = self.norm(module)
            if norm is not None:
                yield module, _forward(module, norm)

    def norm(self, module: nn.Module) -> Norm | None:
        """A module's norm; None for another module."""
        if getattr(numba_config, "DISABLE_JIT", 0):
            return None
        if not type(module).__name__.endswith("RMSNorm") or not is_free(module):
            return None
        weight, eps = module._parameters.get("weight"), _eps(module)
        if (
            type(weight) is not nn.Parameter
            or eps is None
            or len(module._parameters) != 1
            or weight.device.type != "cpu"
            or weight.dtype not in _TYPES
            or weight.dim() != 1
        ):
            return None
        kind = (type(module), weight.dtype)
        if kind not in self._rules:
            self._rules[kind] = _rule(module, weight, eps)
        rule = self._rules[kind]
        return None if rule is None else _norm(module, weight, eps, *rule)


def _norm(module: nn.Module, weight: nn.Parameter, eps: float, offset: float, twice: bool) -> Norm:
    scale = np.empty(len(weight), np.float32)
    norm = Norm(module._parameters, weight, scale, int(scale.ctypes.data), eps, offset, twice)
    norm.refresh()
    return norm


def _eps(module: nn.Module) -> float | None:
    for name in ("variance_epsilon", "eps"):
        value = getattr(module, name, None)
        if isinstance(value, float):
            return value
    return None


def _rule(module: nn.Module, weight: nn.Parameter, eps: float) -> tuple[float, bool] | None:
    """Offset of the weight, and whether rows are rounded before scaling; None for another rule."""
    random = np.random.default_rng(0).standard_normal((8, len(weight)), np.float32)
    x = torch.from_numpy(random).mul_(3).to(weight.dtype)
    own: Any = type(module).forward
    with torch.no_grad():
        expected = own(module, x).float()
        for offset in (0.0, 1.0):
            for twice in (False, True)[: 1 if weight.dtype == torch.float32 else 2]:
                got = _forward(module, _norm(module, weight, eps, offset, twice))(x).float()
                close = _CLOSE[weight.dtype] * expected.abs() + 1e-7
                # In bfloat16 the wrong time of rounding shows in many elements, rounding itself in few.
                few = (got != expected).float().mean() < 0.02 or weight.dtype == torch.float32
                if bool(((got - expected).abs() <= close).all()) and few:
                    return offset, twice
    return None


def _forward(module: nn.Module, norm: Norm) -> Callable[[Tensor], Tensor]:
    from retrieval_draft.engine.cpu._kernels.norm import rms_norm

    own, parameters, weight = type(module).forward, norm.parameters, norm.weight
    dtype, length, eps, twice = weight.dtype, len(weight), norm.eps, norm.twice
    holder = ref(module)

    def forward(input: Tensor) -> Tensor:
        if not (
            is_ordinary_call(input)
            and parameters["weight"] is weight
            and input.dtype is dtype
            and input.device.type == "cpu"
            and input.shape[-1] == length
        ):
            return own(holder(), input)  # type: ignore[no-any-return]
        x = input.contiguous()
        y = torch.empty_like(x)
        rows = x.numel() // length
        # bfloat16 rows are computed as float32, in scratch memory.
        wide = np.empty(length, np.float32).ctypes if dtype is torch.bfloat16 else None
        at = 0 if wide is None else wide.data
        rms_norm(x.data_ptr(), y.data_ptr(), norm.address, rows, length, eps, twice, at)
        return y

    return forward
