"""Locks that a forked process can use: one that another thread held at the fork would stay locked there."""

from __future__ import annotations

import os
from itertools import count
from threading import Lock
from typing import Any
from weakref import WeakValueDictionary

from numba.core.compiler_lock import global_compiler_lock

__all__ = ["lock_for_moments"]

_forking = Lock()
_locks: WeakValueDictionary[int, Lock] = WeakValueDictionary()
_numbers = count()
_held: list[Any] = []


def lock_for_moments() -> Lock:
    """Makes a lock that a fork waits for, so that what it guards is whole in the child.

    It is held for moments only. Inside, kernels may be compiled, and such locks taken as were made later.
    """
    lock = Lock()
    _locks[next(_numbers)] = lock
    return lock


def _before_fork() -> None:
    _forking.acquire()
    locks: list[Any] = [*_locks.values(), global_compiler_lock]
    for lock in locks:
        lock.acquire()
        _held.append(lock)


def _after_fork() -> None:
    while _held:
        _held.pop().release()
    _forking.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)
