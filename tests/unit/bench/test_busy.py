from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from retrieval_draft.bench.busy import busy_processes


def children() -> set[str]:
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


needs_proc = pytest.mark.skipif(
    not Path(f"/proc/self/task/{os.getpid()}/children").exists(), reason="processes cannot be counted here"
)


@needs_proc
def test_processes_run_inside_the_context_only() -> None:
    before = children()
    with busy_processes(2):
        assert len(children() - before) == 2
    assert children() == before
    with busy_processes(0):
        assert children() == before


@needs_proc
def test_they_end_with_a_parent_that_was_killed() -> None:
    code = """
import os, time
from pathlib import Path
from retrieval_draft.bench.busy import busy_processes
with busy_processes(1):
    print(Path(f"/proc/self/task/{os.getpid()}/children").read_text(), flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline().split()[0])
        parent.kill()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline, "a busy process outlives its parent"
        time.sleep(0.05)
