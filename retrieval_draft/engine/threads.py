"""Compiled work on torch's own threads, so that two thread pools do not compete for the cores."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch

from retrieval_draft._forks import lock_for_moments

__all__ = ["end_own_threads", "in_live_pool", "number_of_threads", "on_threads"]

Result = TypeVar("Result")

_stale_thread: int | None = None
"""The thread that forked this process with a pool of threads, or None."""


def on_threads(function: int) -> Callable[[Any, int], object]:
    """Makes a function that calls a compiled one on several threads at once and returns when all calls have.

    The threads are those of torch's OpenMP pool, which the calling thread owns; they are counted by
    ``torch.set_num_threads`` and sleep or spin as torch's do. Where torch has no OpenMP, threads of our own.

    Args:
        function: Address of a C function of one pointer.

    Returns:
        Takes the ctypes object whose address each call is given, and the number of calls.
    """
    one, parallel = _C_FUNCTION(function), _openmp("GOMP_parallel")

    def run(argument: Any, threads: int) -> None:
        if threads < 2:
            one(argument)
        elif parallel is None:
            _run_on_own_threads(one, argument, threads)
        else:
            parallel(function, argument, threads, 0)

    return run


@contextmanager
def number_of_threads(count: int) -> Iterator[None]:
    """Makes this thread's work of torch and of ours run on `count` threads inside the context.

    ``torch.set_num_threads`` would do so, and lastingly for every thread whose first work with torch begins
    meanwhile: that takes over the process's number then.
    """
    before = torch.get_num_threads()  # a thread's first call takes over the process's number, later ones none
    if count != before:
        _set_threads(count, count)
    try:
        yield
    finally:
        if count != before:
            _set_threads(before, 0)


def _set_threads(count: int, for_mkl: int) -> None:
    """Sets the calling thread's number; that for MKL may be 0, the process's."""
    openmp, mkl = _openmp("omp_set_num_threads"), _openmp("MKL_Set_Num_Threads_Local")
    if openmp is None or (mkl is None and torch.backends.mkl.is_available()):
        torch.set_num_threads(count)
        return
    openmp(count)
    if mkl is not None:
        mkl(for_mkl)


def in_live_pool(work: Callable[[], Result]) -> Result:
    """Runs `work` where OpenMP works: here, unless this thread came out of a fork with a pool.

    libgomp ties a pool to the thread that made it. After a fork that thread waits for workers which the
    child does not have, in every parallel operation of torch (pytorch issue 17199); a new thread makes
    itself a new pool. libgomp 9 and later can end the pool before the fork, and then nothing of this happens.
    """
    if threading.get_ident() != _stale_thread or torch.get_num_threads() == 1:
        return work()
    with ThreadPoolExecutor(1, thread_name_prefix="retrieval-draft-after-fork") as pool:
        return pool.submit(work).result()


_C_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

_ARGUMENTS: dict[str, list[Any]] = {
    "GOMP_parallel": [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint],
    "omp_set_num_threads": [ctypes.c_int],
    "omp_pause_resource_all": [ctypes.c_int],
    "MKL_Set_Num_Threads_Local": [ctypes.c_int],
}
_SOFT_PAUSE = 1
"""omp_pause_soft: a pool is freed, settings stay."""


@cache
def _openmp(name: str) -> Any:
    """A function of the OpenMP library that torch runs on, or of its MKL; None where there is none."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        # A symbol is looked up in the libraries that this one is linked to: no second OpenMP is loaded.
        function = getattr(ctypes.CDLL(str(library)), name)
    except (OSError, AttributeError):
        return None
    function.argtypes = _ARGUMENTS[name]
    function.restype = ctypes.c_int if name.startswith("omp_pause") else None
    return function


def _run_on_own_threads(function: Callable[[Any], object], argument: Any, threads: int) -> None:
    global _own_pool
    with _own_pool_lock:
        if _own_pool is None:
            _own_pool = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="retrieval-draft")
        others = [_own_pool.submit(function, argument) for _ in range(threads - 1)]
    function(argument)
    for other in others:
        other.result()


_own_pool: ThreadPoolExecutor | None = None
_own_pool_lock = lock_for_moments()


def end_own_threads() -> None:
    """Ends the threads that stand for OpenMP's where torch has none; they come again when needed."""
    global _own_pool
    with _own_pool_lock:
        pool, _own_pool = _own_pool, None
    if pool is not None:
        pool.shutdown()


_has_pool = True
"""True if the thread that forks keeps its pool, so that the child has one without workers."""


def _before_fork() -> None:
    """Ends the forking thread's pool; its next parallel work, here or in the child, makes a new one."""
    global _has_pool
    pause = _openmp("omp_pause_resource_all")
    _has_pool = pause is None or pause(_SOFT_PAUSE) != 0


def _after_fork() -> None:
    global _own_pool, _stale_thread
    _stale_thread = threading.get_ident() if _has_pool else None
    _own_pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_child=_after_fork)
