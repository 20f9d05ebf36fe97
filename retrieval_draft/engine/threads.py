"""Compiled work on torch's own threads, so that two thread pools do not compete for the cores."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch

__all__ = ["in_live_pool", "on_threads"]

Result = TypeVar("Result")

_stale_thread: int | None = None
"""The thread that forked this process, or None in one that was not forked."""


def on_threads(function: int) -> Callable[[Any, int], object]:
    """Makes a function that calls a compiled one on several threads at once and returns when all calls have.

    The threads are those of torch's OpenMP pool, which the calling thread owns; they are counted by
    ``torch.set_num_threads`` and sleep or spin as torch's do. Where torch has no OpenMP, threads of our own.

    Args:
        function: Address of a C function of one pointer.

    Returns:
        Takes the ctypes object whose address each call is given, and the number of calls.
    """
    one, parallel = _C_FUNCTION(function), _openmp()

    def run(argument: Any, threads: int) -> None:
        if threads < 2:
            one(argument)
        elif parallel is None:
            _run_on_own_threads(one, argument, threads)
        else:
            parallel(function, argument, threads, 0)

    return run


def in_live_pool(work: Callable[[], Result]) -> Result:
    """Runs `work` where OpenMP works: here, unless this thread came out of a fork.

    libgomp ties a pool to the thread that made it. After a fork that thread waits for workers which the
    child does not have, in every parallel operation of torch (pytorch issue 17199); a new thread makes
    itself a new pool.
    """
    if threading.get_ident() != _stale_thread or torch.get_num_threads() == 1:
        return work()
    return _fresh_thread().submit(work).result()


_C_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@cache
def _openmp() -> Any:
    """GOMP_parallel of the OpenMP library that torch runs on, or None."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        # A symbol is looked up in the libraries that this one is linked to: no second OpenMP is loaded.
        parallel = ctypes.CDLL(str(library)).GOMP_parallel
    except (OSError, AttributeError):
        return None
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel


def _run_on_own_threads(function: Callable[[Any], object], argument: Any, threads: int) -> None:
    others = [_own_pool().submit(function, argument) for _ in range(threads - 1)]
    function(argument)
    for other in others:
        other.result()


@cache
def _own_pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(os.cpu_count() or 1, 1), thread_name_prefix="retrieval-draft")


@cache
def _fresh_thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="retrieval-draft-after-fork")


def _after_fork() -> None:
    global _stale_thread
    _stale_thread = threading.get_ident()
    _own_pool.cache_clear()
    _fresh_thread.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
