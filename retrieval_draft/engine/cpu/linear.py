"""Linear layers for few tokens on the CPU, the fastest kernel for each shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from retrieval_draft._progress import progress
from retrieval_draft.engine.cpu.linear_choice import SIZES, LinearChoices, Weight, shape_key
from retrieval_draft.engine.cpu.linear_kernels import Linear, is_tiled_available
from retrieval_draft.engine.cpu.quantized_weights import QuantizedWeight, quantized_weight
from retrieval_draft.engine.substitution import is_free, is_ordinary_call

__all__ = ["CpuLinear", "LayerKernels"]


@dataclass(frozen=True, slots=True)
class LayerKernels:
    """Kernels of a linear layer, and that which they were made for.

    Attributes:
        choices: The measurements.
        weight: The layer's weight.
        bias: The layer's bias.
        by_tokens: For each number of tokens the fastest, our own, and the seconds that the latter takes
            longer; the last one for more, too.
    """

    choices: LinearChoices
    weight: Weight
    bias: Tensor | None
    by_tokens: list[tuple[Linear, Linear, float]]

    @property
    def tensors(self) -> list[Tensor]:
        """All that the kernels read."""
        if isinstance(self.weight, QuantizedWeight):
            read = [self.weight.data, self.weight.terms]
        else:
            read = [self.weight]
        return read if self.bias is None else [*read, self.bias]


class CpuLinear:
    """Faster ``forward`` functions for a model's linear layers.

    Layers of quanto and torchao that hold their weights as integers are taken, too. Those on other devices,
    otherwise quantised or wrapped ones, and those whose ``forward`` other code replaced are left alone.

    Args:
        model: Any model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._choices: LinearChoices | None = None
        self._quantized: WeakKeyDictionary[nn.Module, QuantizedWeight] = WeakKeyDictionary()
        self._made: WeakKeyDictionary[nn.Module, LayerKernels] = WeakKeyDictionary()

    def prepare(self) -> None:
        """Times the kernels on those of this model's shapes not yet measured with this number of threads."""
        weights = [weight for _, weight in self._layers()]
        wanted = self._current().missing(weights) if weights else {}
        if wanted:
            with progress("Measuring linear layers", len(wanted) * len(SIZES)) as advance, torch.no_grad():
                self._current().measure(wanted, advance)

    def choices(self) -> dict[str, dict[int, str]]:
        """The chosen kernel by shape and number of tokens, as `prepare` measured them."""
        weights = [weight for _, weight in self._layers()]
        choices = self._current()
        return {shape_key(weight): choices.names(weight) for weight in weights if choices.has(weight)}

    def forwards(self) -> Iterator[tuple[nn.Module, Callable[[Tensor], Tensor]]]:
        """Each measured layer with its fastest ``forward``."""
        for layer, weight in self._layers():
            made = self._kernels(layer, weight)
            if made is not None:
                yield layer, _forward(layer._parameters, made)

    def forward(self, layer: nn.Module) -> Callable[[Tensor], Tensor] | None:
        """A measured layer's fastest ``forward``; None for another module."""
        made = self.kernels(layer)
        return None if made is None else _forward(layer._parameters, made)

    def kernels(self, layer: nn.Module) -> LayerKernels | None:
        """A measured layer's kernels; None for another module.

        Args:
            layer: Any module.
        """
        weight = self._readable(layer)
        return None if weight is None else self._kernels(layer, weight)

    def _kernels(self, layer: nn.Module, weight: Weight) -> LayerKernels | None:
        choices, bias, known = self._current(), layer._parameters.get("bias"), self._made.get(layer)
        if (
            known is None
            or known.choices is not choices
            or known.weight is not weight
            or known.bias is not bias
        ):
            if not choices.has(weight):
                return None
            known = self._made[layer] = LayerKernels(choices, weight, bias, choices.layers(weight, bias))
        return known

    def _current(self) -> LinearChoices:
        threads = torch.get_num_threads()
        if self._choices is None or self._choices.threads != threads:
            self._choices = LinearChoices(threads)
        return self._choices

    def _layers(self) -> list[tuple[nn.Module, Weight]]:
        found = ((module, self._readable(module)) for module in self._model.modules())
        return [(module, weight) for module, weight in found if weight is not None]

    def _readable(self, module: nn.Module) -> Weight | None:
        """The weight of a linear layer of torch, quanto or torchao; None if our kernels cannot read it."""
        if not isinstance(module, nn.Linear) or not is_free(module):
            return None
        weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
        if bias is not None and not (
            weight is not None
            and type(bias) is nn.Parameter
            and bias.dtype == weight.dtype
            and bias.device == weight.device
            and bias.is_contiguous()
        ):
            return None
        if type(weight) is not nn.Parameter:
            return self._quantized_weight(module, weight)
        plain = type(module) is nn.Linear and weight.device.type == "cpu" and weight.numel() > 0
        return weight if plain and is_tiled_available(weight) else None

    def _quantized_weight(self, module: nn.Module, weight: Tensor | None) -> QuantizedWeight | None:
        known = self._quantized.get(module)
        if known is None or known.own is not weight:
            known = quantized_weight(module)
            if known is not None:
                self._quantized[module] = known
        return known


def _forward(parameters: Any, made: LayerKernels) -> Callable[[Tensor], Tensor]:
    """A layer's ``forward``. It holds the parameters and not the layer, which could then not be freed."""
    by_tokens = [fastest for fastest, _, _ in made.by_tokens]
    known: Any = parameters["weight"]
    known_bias = parameters.get("bias")
    dtype, length = known.dtype, int(known.shape[1])
    most = len(by_tokens) - 1

    def forward(input: Tensor) -> Tensor:
        weight: Tensor = parameters["weight"]
        bias: Tensor | None = parameters.get("bias")
        if (
            weight is known
            and bias is known_bias
            and is_ordinary_call(input)
            and input.dtype is dtype
            and input.device.type == "cpu"
            and input.shape[-1] == length
        ):
            return by_tokens[min(input.numel() // length, most)](input)
        return linear(input, weight, bias)

    return forward
