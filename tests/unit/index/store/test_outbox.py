"""Tests of the queue of runs to send."""

import threading
import time

import numpy as np

from retrieval_draft.index.source import NodeLogits
from retrieval_draft.index.store.outbox import MOST_LEARNED, Outbox

NONE = np.empty(0, np.int32)


def run(tokens: int, value: int = 1):
    return np.full(tokens, value, np.int32)


def test_the_oldest_go_when_there_is_too_much() -> None:
    box = Outbox(100)
    for value in range(5):
        box.put(run(10, value), run(20, value))
    assert (len(box), box.dropped, box.nbytes) == (3, 2, 360)
    assert [int(taken.reply[0]) for taken in box.take(10, 1000, 0)] == [2, 3, 4]
    assert box.nbytes == 0
    box.put(NONE, run(500))
    assert len(box) == 1  # one that is too long by itself is kept


def test_taking_stops_at_runs_and_tokens() -> None:
    box = Outbox(1000)
    for _ in range(6):
        box.put(NONE, run(10))
    assert len(box.take(2, 1000, 0)) == 2
    assert len(box.take(10, 11, 0)) == 2
    assert len(box.take(10, 1000, 0)) == 2
    assert box.take(10, 1000, 0) == []


def test_nothing_is_kept_of_nothing_and_arrays_are_copied() -> None:
    box = Outbox(1000)
    box.put(NONE, NONE)
    assert len(box) == 0
    reply = run(3)
    box.put(NONE, reply)
    reply[:] = 9
    assert box.take(1, 1000, 0)[0].reply.tolist() == [1, 1, 1]


def test_a_waiting_thread_is_woken() -> None:
    box = Outbox(1000)
    taken = []
    thread = threading.Thread(target=lambda: taken.append(box.take(1, 1000, 30)))
    thread.start()
    time.sleep(0.01)
    box.put(NONE, run(3))
    thread.join(10)
    assert len(taken[0]) == 1
    thread = threading.Thread(target=lambda: taken.append(box.take(1, 1000, 30)))
    thread.start()
    box.wake()
    thread.join(10)
    assert taken[1] == []


def test_what_was_taken_is_unfinished_until_it_is_reported() -> None:
    box = Outbox(25)
    for _ in range(3):
        box.put(NONE, run(10))
    assert box.unfinished == 2  # one was dropped
    assert len(box.take(1, 1000, 0)) == 1
    assert box.unfinished == 2
    box.finish(1)
    assert box.unfinished == 1


def test_predictions_that_wait_are_counted_and_limited() -> None:
    box = Outbox(100)
    size = MOST_LEARNED // 4 + 1
    learned = [NodeLogits(np.zeros((size, 4), np.int32), run(size)[:, None], np.ones((size, 1), np.float32))]
    for _ in range(6):
        box.put(NONE, run(10), learned)
    assert 3 * 24 * size <= box.nbytes < 4 * 24 * size
    assert [len(each.learned) for each in box.take(6, 1000, 0)] == [1, 1, 1, 0, 0, 0]
    assert box.nbytes == 0
    for _ in range(20):  # the oldest are dropped, and their predictions with them
        box.put(NONE, run(50), learned)
    assert [len(each.learned) for each in box.take(2, 1000, 0)] == [1, 1]
