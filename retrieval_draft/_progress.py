"""A progress bar that appears only when work is slow."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

__all__ = ["Advance", "progress"]

_LOG = logging.getLogger("retrieval_draft")


class Advance(Protocol):
    """Reports finished work; may be called from any thread."""

    def __call__(self, n: int = 1) -> None:
        """Counts `n` more units as done."""
        ...


@contextmanager
def progress(description: str, total: int | None, delay: float = 2.0) -> Iterator[Advance]:
    """Shows a bar on stderr when the work below it takes longer than `delay` seconds.

    If stderr is no terminal, one log line reports the running work.

    Args:
        description: The work, in a few words.
        total: Units of work, or None when that is not known.
        delay: Seconds of work before anything is shown.
    """
    bar = _Bar(description, total)
    timer = threading.Timer(delay, bar.show)
    timer.daemon = True
    timer.start()
    try:
        yield bar.advance
    finally:
        timer.cancel()
        bar.hide()


class _Bar:
    def __init__(self, description: str, total: int | None) -> None:
        self._description = description
        self._total = total
        self._done = 0
        self._over = False
        self._task: TaskID | None = None
        self._lock = threading.Lock()

    def advance(self, n: int = 1) -> None:
        with self._lock:
            self._done += n
            if self._task is not None:
                _BOARD.update(self._task, self._done)

    def show(self) -> None:
        with self._lock:
            if self._over:
                return
            if sys.stderr is None or not sys.stderr.isatty():
                _LOG.info("%s ...", self._description)
                return
            self._task = _BOARD.add(self._description, self._total, self._done)

    def hide(self) -> None:
        with self._lock:
            self._over = True
            if self._task is not None:
                _BOARD.remove(self._task)
                self._task = None


class _Board:
    """The live display of the process, shared by bars that overlap in time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._progress: Progress | None = None
        self._tasks = 0

    def add(self, description: str, total: int | None, done: int) -> TaskID:
        with self._lock:
            if self._progress is None:
                self._progress = _new_progress()
                self._progress.start()
            self._tasks += 1
            return self._progress.add_task(description, total=total, completed=done)

    def update(self, task: TaskID, done: int) -> None:
        with self._lock:
            if self._progress is not None:
                self._progress.update(task, completed=done)

    def remove(self, task: TaskID) -> None:
        with self._lock:
            self._tasks -= 1
            if self._progress is None:
                return
            self._progress.remove_task(task)
            if not self._tasks:
                self._progress.stop()
                self._progress = None


_BOARD = _Board()


def _new_progress() -> Progress:
    # rich takes 60 ms to import, only during slow work.
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
