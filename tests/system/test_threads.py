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


@pytest.mark.parametrize("shared", ["nothing", "model", "drafter"])
@needs_proc
def test_callers_in_a_pool(shared: str) -> None:
    """The same text from each, on two threads each; a caller that ends takes its threads with it."""
    run_program(
        BEGIN
        + """
import sys
together = threading.Barrier(3)
models = [wide_model() if sys.argv[1] == "nothing" else model for _ in range(3)]
drafters = [drafter_of(each, cpu_kernels=number != 2) for number, each in enumerate(models)]

def caller(number):
    drafter = drafters[0 if sys.argv[1] == "drafter" else number]
    together.wait(240)
    assert torch.get_num_threads() == 2
    return [text_of(drafter.generate) for _ in range(2)]

with ThreadPoolExecutor(3) as pool:
    for texts in pool.map(caller, range(3)):
        assert texts == [expected] * 2
assert calls and set(calls) == {2}
assert not any("forward" in part.__dict__ for each in models for part in each.modules())
for drafter in drafters:
    drafter.close()
wait_until(lambda: tasks() <= before)
assert only_this_thread()
assert text_of(model.generate) == expected
""",
        shared,
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
