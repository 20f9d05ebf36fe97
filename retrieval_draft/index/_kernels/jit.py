"""The one way kernels are compiled here."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

from numba import njit

__all__ = ["kernel"]

Function = TypeVar("Function", bound=Callable[..., object])


def kernel(function: Function) -> Function:
    """Compiles on first call, keeps the machine code beside the module, and runs without the GIL.

    Floating point stays strict (no fastmath): the same input gives the same tree on every run.
    """
    return cast(Function, njit(cache=True, nogil=True, error_model="numpy")(function))
