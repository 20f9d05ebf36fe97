"""Whole generations in several threads, and the threads that are left."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.two_threads import TASKS, run_program

needs_proc = pytest.mark.skipif(not Path(TASKS).is_dir(), reason="threads cannot be counted here")

BEGIN = """
import gc, threading
from concurrent.futures import ThreadPoolExecutor
import torch
from tests.support.stores import wait_until
on_two_threads()

def tasks():
    return len(list(TASKS.iterdir()))

def only_this_thread():
    return threading.enumerate() == [threading.current_thread()]

model = wide_model()
expected = text_of(model.generate)
(torch.ones(512, 512) @ torch.ones(512, 512)).sum()  # torch's own threads
before = tasks()
assert only_this_thread()
"""


@pytest.mark.parametrize("models", ["one", "each"])
@needs_proc
def test_callers_in_a_pool_each_with_its_own_drafter(models: str) -> None:
    """The same text from each, on two threads each; a caller that ends takes its threads with it."""
    run_program(
        BEGIN
        + """
import sys
together = threading.Barrier(4)

def caller(number):
    mine = drafter_of(model if sys.argv[1] == "one" else wide_model(), cpu_kernels=number != 3)
    together.wait(120)
    with mine:
        assert torch.get_num_threads() == 2
        texts = [text_of(mine.generate) for _ in range(3)]
    return texts

with ThreadPoolExecutor(4) as pool:
    for texts in pool.map(caller, range(4)):
        assert texts == [expected] * 3
assert calls and set(calls) == {2}
assert not any("forward" in part.__dict__ for part in model.modules())
wait_until(lambda: tasks() <= before)
assert only_this_thread()
assert text_of(model.generate) == expected
""",
        models,
    )


@needs_proc
def test_closing_a_drafter_leaves_no_thread() -> None:
    run_program(
        BEGIN
        + """
for _ in range(5):
    with drafter_of(model) as drafter:
        drafter.warm_up()
        assert text_of(drafter.generate) == expected
        assert not only_this_thread(), "the history has a thread"
    assert only_this_thread(), threading.enumerate()
    wait_until(lambda: tasks() <= before, 2)
assert 2 in calls
assert text_of(drafter.generate) == expected, "a closed drafter generates, and learns no more"
assert only_this_thread(), threading.enumerate()
"""
    )


@needs_proc
def test_a_drafter_that_nobody_holds_leaves_no_thread() -> None:
    run_program(
        BEGIN
        + """
for _ in range(3):
    drafter = drafter_of(model)
    assert text_of(drafter.generate) == expected
    assert not only_this_thread(), "the history has a thread"
    del drafter
    gc.collect()
    wait_until(only_this_thread, 5)
    wait_until(lambda: tasks() <= before, 2)
"""
    )
