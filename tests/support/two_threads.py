"""A model whose linear layers run on two threads, and programs about it in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from retrieval_draft.config import DraftConfig
from retrieval_draft.drafter import RetrievalDrafter
from retrieval_draft.engine import threads
from retrieval_draft.engine.cpu import linear_choice
from retrieval_draft.engine.thread_choice import ThreadChoice
from tests.support.models import make
from tests.support.pages import ROOT

PROMPT = torch.arange(40)[None] % 17
OPTIONS: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False}
TASKS = Path("/proc/self/task")

calls: list[int] = []
"""The number of threads of each call of a compiled function on several, after `on_two_threads`."""


def on_two_threads() -> None:
    """Makes every pass of this process use two threads and our kernels, whatever would be measured."""
    torch.set_num_threads(2)
    find = threads._openmp

    def counted(name: str) -> Any:
        function = find(name)
        if name != "GOMP_parallel":
            return function

        def call(address: int, argument: Any, number: int, flags: int) -> None:
            calls.append(number)
            function(address, argument, number, flags)

        return call

    # Until the process ends.
    mock.patch.object(threads, "_openmp", counted).start()
    mock.patch.object(ThreadChoice, "choose", lambda choice, tokens: choice._limit).start()
    mock.patch.object(linear_choice, "MAX_SECONDS", 0.0).start()  # our kernels


def wide_model() -> Any:
    """A tiny model, of layers that are worth two threads."""
    return make(
        "llama", hidden_size=256, intermediate_size=512, vocab_size=1024, num_attention_heads=8, head_dim=32
    )


def drafter_of(model: Any, cpu_kernels: bool = True) -> RetrievalDrafter:
    return RetrievalDrafter.for_model(model, config=DraftConfig(cpu_kernels=cpu_kernels))


def text_of(generate: Callable[..., Any]) -> list[int]:
    return list(generate(PROMPT, **OPTIONS)[0].tolist())


def text_of_new_process() -> tuple[list[int], bool]:
    """The text of a drafter made here, and whether two threads made it."""
    on_two_threads()
    return text_of(drafter_of(wide_model()).generate), 2 in calls


def forked(work: Callable[[], bool], seconds: int = 240) -> int:
    """Starts a child process that runs `work`; see `code_of`."""
    child = os.fork()
    if child:
        return child
    signal.alarm(seconds)  # one that hangs is killed
    code = 4
    try:
        code = 0 if work() else 3
    finally:
        os._exit(code)


def code_of(child: int) -> int:
    """The exit code of a process of `forked`: 0 if `work` was true; negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run_program(code: str, *arguments: str) -> str:
    """Runs code that knows the names of this module, in a process of its own; returns its output."""
    program = f"from tests.support.two_threads import *\n{code}"
    # Passive waiting: several processes of two threads each take turns on two processors.
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *arguments],
        env={**os.environ, **environment}, cwd=ROOT, timeout=300, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
