"""Linear layers for few tokens on the CPU: the fastest kernel for each shape, while the drafter decodes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from retrieval_draft._progress import progress
from retrieval_draft.engine.linear_choice import SIZES, LinearChoices
from retrieval_draft.engine.linear_kernels import Linear, is_tiled_available

__all__ = ["CpuLinear"]

_users: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
_lock = threading.Lock()


class CpuLinear:
    """A model's linear layers, which can be told to use faster kernels for a while.

    Layers on other devices, quantised or wrapped ones, and those whose ``forward`` was replaced by someone else are
    left alone; so is every call under autograd, autocast or a compiler. Modules keep their class and weights.

    Args:
        model: Any model.
        enabled: False makes everything here do nothing.
    """

    def __init__(self, model: nn.Module, enabled: bool = True) -> None:
        self._model = model
        self._enabled = enabled
        self._choices: LinearChoices | None = None

    def prepare(self) -> None:
        """Measures what is not known yet of this model's shapes with the present number of threads."""
        layers = self._layers()
        if not layers:
            return
        choices = self._current()
        wanted = choices.missing([_weight(layer) for layer in layers])
        if wanted:
            with progress("Measuring linear layers", len(wanted) * len(SIZES)) as advance, torch.no_grad():
                choices.measure(wanted, advance)

    def choices(self) -> dict[str, dict[int, str]]:
        """The chosen kernel by shape and number of tokens, of what `prepare` measured."""
        from retrieval_draft.engine.linear_choice import shape_key

        choices = self._current()
        weights = [_weight(layer) for layer in self._layers()]
        missing = choices.missing(weights)
        return {shape_key(weight): choices.names(weight) for weight in weights if shape_key(weight) not in missing}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The layers use their chosen kernels inside, and what they had before afterwards."""
        changed: list[nn.Module] = []
        layers = self._layers()
        try:
            if layers:
                choices = self._current()
                missing = choices.missing([_weight(layer) for layer in layers])
                with _lock:
                    for layer in layers:
                        if not missing or not choices.missing([_weight(layer)]):
                            _take(layer, choices.layers(_weight(layer), _bias(layer)))
                            changed.append(layer)
            yield
        finally:
            with _lock:
                for layer in changed:
                    _give_back(layer)

    def _current(self) -> LinearChoices:
        threads = torch.get_num_threads()
        if self._choices is None or self._choices.threads != threads:
            self._choices = LinearChoices(threads)
        return self._choices

    def _layers(self) -> list[nn.Module]:
        if not self._enabled or torch.compiler.is_compiling():
            return []
        return [module for module in self._model.modules() if _is_plain(module)]


def _weight(layer: nn.Module) -> Tensor:
    weight: Any = layer.weight
    return weight  # type: ignore[no-any-return]


def _bias(layer: nn.Module) -> Tensor | None:
    return layer._parameters.get("bias")


def _is_plain(module: nn.Module) -> bool:
    """Whether a module is a linear layer as torch makes them, with weights that our kernels can read."""
    if type(module) is not nn.Linear or ("forward" in module.__dict__ and module not in _users):
        return False
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    return (
        type(weight) is nn.Parameter
        and weight.device.type == "cpu"
        and weight.numel() > 0
        and is_tiled_available(weight)
        and (bias is None or (type(bias) is nn.Parameter and bias.dtype == weight.dtype and bias.is_contiguous()))
    )


def _take(layer: nn.Module, by_tokens: list[Linear]) -> None:
    if layer not in _users:
        layer.__dict__["forward"] = _forward(layer._parameters, by_tokens)
    _users[layer] = _users.get(layer, 0) + 1


def _give_back(layer: nn.Module) -> None:
    _users[layer] -= 1
    if not _users[layer]:
        del _users[layer]
        layer.__dict__.pop("forward", None)


def _forward(parameters: Any, by_tokens: list[Linear]) -> Callable[[Tensor], Tensor]:
    """A layer's ``forward``; it holds the layer's parameters, not the layer, which could then not be freed."""
    known: Any = parameters["weight"]
    dtype, length = known.dtype, known.shape[1]
    most = len(by_tokens) - 1

    def forward(input: Tensor) -> Tensor:
        weight = parameters["weight"]
        if (
            torch.is_grad_enabled()
            or type(input) is not Tensor
            or weight is not known
            or input.dtype is not dtype
            or input.shape[-1] != length
            or torch.compiler.is_compiling()
            or torch.is_autocast_enabled("cpu")
        ):
            return linear(input, weight, parameters.get("bias"))
        return by_tokens[min(input.numel() // length, most)](input)

    return forward
