"""Modules of kernels, imported when they are first used: importing numba takes half a second."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = ["LazyKernels"]


class LazyKernels:
    """The names of a module, each found without an import from its second use on.

    An import inside of a function costs a microsecond, and twenty of them where a forward pass has just taken
    the caches.

    Args:
        module: Its full name.
    """

    def __init__(self, module: str) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        value = getattr(import_module(self._module), name)
        setattr(self, name, value)
        return value
