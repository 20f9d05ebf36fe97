import ctypes
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from retrieval_draft.engine import threads as threads_module
from retrieval_draft.engine.cpu.linear_kernels import tiled
from retrieval_draft.engine.threads import end_own_threads, in_live_pool, number_of_threads, on_threads

TASKS = Path("/proc/self/task")
WORK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def record() -> tuple[object, int, list[tuple[int | None, int]]]:
    """A C function that notes its argument and its thread."""
    calls: list[tuple[int | None, int]] = []
    function = WORK(lambda argument: calls.append((argument, threading.get_native_id())))
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    return function, address, calls


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("openmp", [True, False])
def test_every_thread_gets_the_argument_once(
    number: int, openmp: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not openmp:
        monkeypatch.setattr(threads_module, "_openmp", lambda name: None)
    function, address, calls = record()
    argument = (ctypes.c_int64 * 2)(7, 8)
    on_threads(address)(argument, number)
    assert [given for given, _ in calls] == [ctypes.addressof(argument)] * number
    if openmp:
        assert len({thread for _, thread in calls}) == number
    del function


@pytest.mark.skipif(not TASKS.is_dir(), reason="threads cannot be counted here")
def test_torch_and_kernels_share_one_pool(two_threads: None) -> None:
    """After both have run there are no more threads than after torch alone."""
    weight, x = torch.ones(4096, 512), torch.ones(4, 512)
    torch.ones(1 << 22).sum()
    torch_alone = len(list(TASKS.iterdir()))
    tiled(weight)(x)
    assert len(list(TASKS.iterdir())) <= torch_alone


def test_the_number_of_threads_of_torch_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def note(function: int) -> object:
        run = on_threads(function)

        def noted(job: object, number: int) -> None:
            asked.append(number)
            run(job, number)

        return noted

    monkeypatch.setattr("retrieval_draft.engine.cpu.linear_kernels.on_threads", note)
    layer = tiled(torch.ones(2048, 512))
    for number in (1, 2):
        torch.set_num_threads(number)
        layer(torch.ones(1, 512))
    tiled(torch.ones(4, 4))(torch.ones(1, 4))
    torch.set_num_threads(1)
    assert asked == [1, 2, 1], "a small layer is not worth another thread"


def numbers_of_threads() -> set[int]:
    """Of torch, of OpenMP and of MKL, for the calling thread."""
    lines = torch.__config__.parallel_info().splitlines()
    return {
        int(line.split(":")[-1]) for line in lines if "num_threads() :" in line or "max_threads() :" in line
    }


def test_the_number_of_threads_is_the_callers_alone(two_threads: None) -> None:
    """A thread that begins meanwhile has the process's number, and keeps it."""
    meanwhile, done = threading.Event(), threading.Event()
    numbers: list[set[int]] = []

    def work() -> None:
        numbers.append(numbers_of_threads())
        meanwhile.set()
        done.wait()
        numbers.append(numbers_of_threads())

    other = threading.Thread(target=work)
    with number_of_threads(1):
        other.start()
        meanwhile.wait()
        assert numbers_of_threads() == {1}
    assert numbers_of_threads() == {2}
    done.set()
    other.join()
    assert numbers == [{2}, {2}]


def test_several_server_threads_at_once(two_threads: None) -> None:
    weight, x = torch.randn(3000, 300), torch.randn(5, 300)
    expected = tiled(weight)(x)
    wrong: list[int] = []

    def serve() -> None:
        layer = tiled(weight)
        for turn in range(30):
            if not torch.equal(layer(x), expected):
                wrong.append(turn)

    servers = [threading.Thread(target=serve) for _ in range(4)]
    for server in servers:
        server.start()
    for server in servers:
        server.join()
    assert not wrong


def test_work_runs_in_place_where_nothing_was_forked() -> None:
    assert in_live_pool(threading.get_ident) == threading.get_ident()


def test_threads_that_stand_for_openmps_end_and_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads_module, "_openmp", lambda name: None)
    function, address, calls = record()
    argument = (ctypes.c_int64 * 1)(7)
    for repeat in range(1, 3):
        on_threads(address)(argument, 3)
        assert len(calls) == 3 * repeat
        assert any(each.name.startswith("retrieval-draft_") for each in threading.enumerate())
        end_own_threads()
        assert not any(each.name.startswith("retrieval-draft_") for each in threading.enumerate())
    del function


FORK = """
import os, sys, threading
import torch
sys.path.insert(0, os.getcwd())
torch.set_num_threads(2)
from retrieval_draft import RetrievalDrafter
from tests.support.models import make
model = make("llama", hidden_size=512, intermediate_size=1024, vocab_size=4096)
drafter = RetrievalDrafter.for_model(model)
prompt = torch.arange(40)[None] % 17
first = drafter.generate(prompt, max_new_tokens=12, do_sample=False)
holding = threading.Event()
def hold():
    with drafter.lock:
        holding.set()
        threading.Event().wait(2)
threading.Thread(target=hold, daemon=True).start()
holding.wait()
child = os.fork()
if not child:
    again = drafter.generate(prompt, max_new_tokens=12, do_sample=False)
    through = model.generate(
        prompt, max_new_tokens=12, do_sample=False, custom_generate=drafter.custom_generate
    ) if sys.argv[1] == "custom" else again
    os._exit(0 if torch.equal(first, again) and torch.equal(first, through) else 3)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0, status
after = drafter.generate(prompt, max_new_tokens=12, do_sample=False)
assert torch.equal(first, after)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("way", ["generate", "custom"])
def test_a_forked_process_generates(way: str) -> None:
    """torch alone hangs in the child: the pool of the forking thread is gone (pytorch issue 17199)."""
    done = subprocess.run(
        [sys.executable, "-c", FORK, way], capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr
