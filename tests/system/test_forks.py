"""Whole generations beside processes that are forked or spawned, and in them."""

from __future__ import annotations

import os

import pytest

from tests.support.two_threads import run_program

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")

BEGIN = """
import multiprocessing, os, sys, threading
import torch
on_two_threads()
model = wide_model()
drafter, plain = drafter_of(model), drafter_of(model, cpu_kernels=False)
expected = text_of(model.generate)

def all_equal():
    calls.clear()
    ours = text_of(drafter.generate) == expected
    assert 2 in calls, "the kernels ran on one thread"
    return ours and text_of(plain.generate) == expected and text_of(model.generate) == expected

assert all_equal()
"""


def test_a_child_generates_and_so_does_the_parent() -> None:
    """With our kernels, without them and without the drafter; after the fork, and at the same time."""
    run_program(
        BEGIN
        + """
for _ in range(3):
    child = forked(all_equal)
    assert all_equal()
    assert code_of(child) == 0, "the child"
grandchild = lambda: code_of(forked(all_equal)) == 0 and all_equal()
assert code_of(forked(grandchild)) == 0, "the grandchild"
with multiprocessing.get_context("fork").Pool(1) as pool:
    asked = pool.apply_async(all_equal)
    assert all_equal() and asked.get(240)
assert all_equal()
"""
    )


def test_a_child_forked_in_the_middle_of_another_threads_generation() -> None:
    """It has the model as nobody uses it, and no lock is held for ever."""
    run_program(
        BEGIN
        + """
import time
from transformers import StoppingCriteria

class Note(StoppingCriteria):
    def __call__(self, ids, scores, **options):
        running.set()
        return torch.zeros(len(ids), dtype=torch.bool)

running, over = threading.Event(), threading.Event()
texts = []
def generate():
    while not over.is_set():
        ids = drafter.generate(PROMPT, stopping_criteria=[Note()], **OPTIONS)
        texts.append(ids[0].tolist())

def as_unused():
    return not any("forward" in part.__dict__ for part in model.modules()) and all_equal()

thread = threading.Thread(target=generate)
thread.start()
for turn in range(6):
    running.clear()
    running.wait()
    time.sleep(0.003 * turn)
    assert code_of(forked(as_unused)) == 0
over.set()
thread.join()
assert texts and all(text == expected for text in texts)
"""
    )


def test_a_streamer_forks_and_both_processes_go_on() -> None:
    run_program(
        BEGIN
        + """
class Forks:
    child = None
    def put(self, ids):
        if self.child is None and ids.numel() == 1:
            self.child = os.fork()
            if not self.child:
                signal.alarm(240)
    def end(self):
        pass

streamer = Forks()
out = drafter.generate(PROMPT, streamer=streamer, **OPTIONS)
good = out[0].tolist() == expected and all_equal()
if not streamer.child:
    os._exit(0 if good else 3)
assert code_of(streamer.child) == 0 and good
"""
    )


def test_a_spawned_process_generates() -> None:
    run_program(
        BEGIN
        + """
with multiprocessing.get_context("spawn").Pool(2) as pool:
    asked = [pool.apply_async(text_of_new_process) for _ in range(2)]
    assert all_equal()
    for text, on_two in (each.get(240) for each in asked):
        assert text == expected and on_two
assert all_equal()
"""
    )


LOADERS = """
from torch.utils.data import DataLoader, Dataset

class Sums(Dataset):
    def __len__(self):
        return 12
    def __getitem__(self, row):
        return torch.full((1 << 17,), float(row)).sum() / (1 << 17)

class Texts(Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, row):
        return drafter.generate(PROMPT, **OPTIONS)[0]

def load(rows):
    loader = DataLoader(rows, num_workers=2, multiprocessing_context="fork", timeout=240)
    return torch.cat(list(loader)).tolist()

sums = [float(row) for row in range(12)]
"""


@pytest.mark.parametrize("kernels", [True, False])
def test_workers_of_a_data_loader_before_beside_and_after_generations(kernels: bool) -> None:
    run_program(
        BEGIN
        + LOADERS
        + """
generator = drafter if sys.argv[1] == "True" else plain
assert load(Sums()) == sums
assert text_of(generator.generate) == expected
texts, over = [], threading.Event()
def generate():
    while not over.is_set():
        texts.append(text_of(generator.generate))
thread = threading.Thread(target=generate)
thread.start()
for _ in range(4):
    assert load(Sums()) == sums
over.set()
thread.join()
assert texts and all(text == expected for text in texts)
assert load(Sums()) == sums
iterator = iter(DataLoader(Sums(), num_workers=2, multiprocessing_context="fork", timeout=240))
for value in sums:  # workers live while the thread that forked them generates
    assert text_of(generator.generate) == expected
    assert next(iterator).item() == value
assert all_equal()
""",
        str(kernels),
    )


def test_workers_of_a_data_loader_generate() -> None:
    run_program(BEGIN + LOADERS + "assert load(Texts()) == [expected] * 4 and all_equal()\n")
