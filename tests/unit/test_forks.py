from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

import pytest
from numba.core.compiler_lock import global_compiler_lock

from retrieval_draft._forks import lock_for_moments

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


def code_of_child(work: Callable[[], bool]) -> int:
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    signal.alarm(20)  # one that hangs is killed
    os._exit(0 if work() else 3)


def free(*locks: threading.Lock) -> bool:
    return not any(lock.locked() for lock in locks)


def test_a_fork_waits_for_what_another_thread_does() -> None:
    outer, inner = lock_for_moments(), lock_for_moments()
    value, over = [0, 0], threading.Event()

    def change() -> None:
        while not over.is_set():
            with outer, inner, global_compiler_lock:
                value[0] += 1
                over.wait(0.001)
                value[1] += 1

    def whole() -> bool:
        with global_compiler_lock:
            return free(outer, inner) and value[0] == value[1]

    thread = threading.Thread(target=change)
    thread.start()
    codes = {code_of_child(whole) for _ in range(10)}
    over.set()
    thread.join()
    assert codes == {0}
    assert whole()


def test_several_threads_fork() -> None:
    locks = [lock_for_moments() for _ in range(3)]
    codes: list[int] = []
    threads = [
        threading.Thread(target=lambda: codes.extend(code_of_child(lambda: free(*locks)) for _ in range(5)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert codes == [0] * 15
    assert free(*locks)
