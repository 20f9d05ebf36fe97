"""Models that compute in float64 throughout, to tell rounding from a difference."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["to_float64"]


def to_float64(model: Any, generates: Callable[[], object]) -> bool:
    """Converts a model; also what its code converts to float32, such as an index's scores, if it can be.

    Args:
        model: In float32.
        generates: Raises where the converted model cannot generate.

    Returns:
        False if it cannot.
    """
    for part in model.modules():
        if hasattr(getattr(part, "config", None), "_experts_implementation"):
            part.config._experts_implementation = "eager"  # grouped products know no float64
    model.double()
    widened = _Widened(model)
    for undo in (widened.remove, None):
        try:
            generates()
        except Exception:  # a model's own code raises anything
            if undo is not None:
                undo()
        else:
            return True
    return False


class _Widened:
    """Hooks of a model for its passes, in any thread.

    Args:
        model: Any.
    """

    def __init__(self, model: Any) -> None:
        self._modes = _Modes()
        self._handles = (
            model.register_forward_pre_hook(self._enter),
            model.register_forward_hook(self._leave, always_call=True),
        )

    def _enter(self, *_: Any) -> None:
        self._modes.stack.enter_context(_Wide())

    def _leave(self, *_: Any) -> None:
        self._modes.stack.close()

    def remove(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()


class _Modes(threading.local):
    """The modes of each thread: passes of a server that timed out overlap with later ones."""

    def __init__(self) -> None:
        self.stack = ExitStack()


class _Wide(TorchFunctionMode):
    """Replaces float32 by float64 in all calls of torch."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        given = {name: _wide(value) for name, value in (kwargs or {}).items()}
        return func(*map(_wide, args), **given)


def _wide(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value
