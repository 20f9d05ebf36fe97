"""Tests of what malloc keeps, each in a process of its own."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

import retrieval_draft.http.malloc as malloc

_C_LIBRARY = """
import ctypes, sys, threading, time
from retrieval_draft.http.malloc import keep_malloc_small
library = ctypes.CDLL(None)
library.malloc.restype = library.fopen.restype = ctypes.c_void_p
library.malloc.argtypes = [ctypes.c_size_t]
library.free.argtypes = library.fclose.argtypes = [ctypes.c_void_p]
library.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
library.malloc_info.argtypes = [ctypes.c_int, ctypes.c_void_p]
"""

_IN_THREADS = """
assert keep_malloc_small()
together = threading.Barrier(4)
def allocate():
    library.malloc(5000)  # too large for the piece of memory that each thread keeps
    together.wait()
threads = [threading.Thread(target=allocate) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
file = library.fopen(sys.argv[1].encode(), b"w")
assert library.malloc_info(0, file) == 0
library.fclose(file)
"""

_PIECES = """
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20
blocks = [library.malloc(60000) for _ in range(2000)]
for block in blocks:
    library.memset(block, 1, 60000)
full = resident()
for number, block in enumerate(blocks):
    if number % 10:  # those that stay are between the others, and at the end
        library.free(block)
assert full - resident() < 20, "malloc gave it back by itself"
assert keep_malloc_small(seconds=0.05)
until = time.monotonic() + 20
while full - resident() < 80:
    assert time.monotonic() < until, (full, resident())
    time.sleep(0.05)
"""

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="pools and trims are glibc's")


def run(program: str, *words: str, **variables: str) -> None:
    names = ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES")
    environment = {key: value for key, value in os.environ.items() if key not in names}
    subprocess.run(
        [sys.executable, "-c", _C_LIBRARY + program, *words], env=environment | variables, check=True
    )


@pytest.mark.parametrize(
    ("variables", "is_limited"),
    [
        ({}, True),
        ({"GLIBC_TUNABLES": "glibc.malloc.check=0"}, True),
        ({"MALLOC_ARENA_MAX": "3"}, False),
        ({"GLIBC_TUNABLES": "glibc.malloc.arena_max=3"}, False),
    ],
)
def test_all_threads_allocate_from_one_pool_unless_the_environment_names_a_number(
    variables: dict[str, str], is_limited: bool, tmp_path: Path
) -> None:
    run(_IN_THREADS, str(tmp_path / "info"), **variables)
    pools = len(re.findall("<heap nr", (tmp_path / "info").read_text()))
    assert pools == 1 if is_limited else pools > 1


def test_free_pieces_between_others_return_to_the_system() -> None:
    run(_PIECES)


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(malloc.ctypes, "CDLL", lambda name: object())
    assert malloc.keep_malloc_small() is False
