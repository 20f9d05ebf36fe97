"""A thread pool that is fair between lanes."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

__all__ = ["FairPool"]

Result = TypeVar("Result")


class FairPool:
    """Runs calls on threads: one of each lane at a time, the lanes in turns.

    No lane waits for a call of another lane: each has a thread, and the operating system shares the
    processors between them in slices of milliseconds wherever the GIL is released. May be used from any
    thread.

    Args:
        threads: At most; beyond it lanes take turns.
        name: Prefix of the threads' names.

    Example:
        pool.submit("a", slow), pool.submit("a", slow), pool.submit("b", quick)
        # quick runs beside the first slow call, the second slow one after it
    """

    def __init__(self, threads: int, name: str) -> None:
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._lock = threading.Lock()
        self._lanes: dict[Hashable, deque[tuple[Future[Any], Callable[[], Any]]]] = {}
        self._busy: set[Hashable] = set()

    def submit(self, lane: Hashable, call: Callable[[], Result]) -> Future[Result]:
        """Runs `call` on a thread once its lane is free and has its turn.

        Args:
            lane: Lane of the call.
            call: The function to run.

        Returns:
            Its result. Cancelled before it runs, the call is dropped at once with everything it references.
        """
        future: Future[Result] = Future()
        with self._lock:
            self._lanes.setdefault(lane, deque()).append((future, call))
        future.add_done_callback(lambda done: self._drop(lane, done) if done.cancelled() else None)
        self._next()
        return future

    def close(self, wait: bool = False) -> None:
        """Stops running calls.

        Args:
            wait: Whether to wait for running calls.
        """
        with self._lock:
            waiting = [future for lane in self._lanes.values() for future, _ in lane]
        for future in waiting:
            future.cancel()
        self._pool.shutdown(wait=wait, cancel_futures=True)

    def _next(self) -> None:
        with self._lock:
            for lane in list(self._lanes):
                if len(self._busy) >= self._threads:
                    return
                if lane in self._busy:
                    continue
                waiting = self._lanes.pop(lane)
                future, call = waiting.popleft()
                if waiting:
                    self._lanes[lane] = waiting  # after the others
                self._busy.add(lane)
                try:
                    self._pool.submit(self._run, lane, [(future, call)])
                except RuntimeError:  # closed
                    self._busy.discard(lane)
                    return

    def _run(self, lane: Hashable, work: list[tuple[Future[Any], Callable[[], Any]]]) -> None:
        # Taken out of the list, and deleted at the end: an error knows this frame and its callers, and with
        # the error's own future in one of them, both and the request would wait for a garbage collection.
        future, call = work.pop()
        try:
            if future.set_running_or_notify_cancel():
                try:
                    result = call()
                except BaseException as error:
                    future.set_exception(error)
                else:
                    future.set_result(result)
        finally:
            del future, call
            with self._lock:
                self._busy.discard(lane)
            self._next()

    def _drop(self, lane: Hashable, future: Future[Any]) -> None:
        with self._lock:
            kept = deque(each for each in self._lanes.get(lane, ()) if each[0] is not future)
            if kept:
                self._lanes[lane] = kept
            else:
                self._lanes.pop(lane, None)
