"""Locks that a forked process can use: one that another thread held at the fork would stay locked there."""

from __future__ import annotations

import os
from threading import Lock
from weakref import WeakSet

__all__ = ["lock_for_moments"]

_locks: WeakSet[Lock] = WeakSet()
_held: list[Lock] = []


def lock_for_moments() -> Lock:
    """Makes a lock that a fork waits for, so that what it guards is whole in the child.

    It is held for moments only, and no other lock is taken inside.
    """
    lock = Lock()
    _locks.add(lock)
    return lock


def _before_fork() -> None:
    for lock in list(_locks):
        lock.acquire()
        _held.append(lock)


def _after_fork() -> None:
    while _held:
        _held.pop().release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)
