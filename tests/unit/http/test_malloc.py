"""Tests of the limit of malloc's pools, each in a process of its own."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

import retrieval_draft.http.malloc as malloc

_IN_THREADS = """
import ctypes, sys, threading
from retrieval_draft.http.malloc import limit_malloc_pools
assert limit_malloc_pools() is (sys.argv[2] == "limited")
library = ctypes.CDLL(None)
library.malloc.restype = library.fopen.restype = ctypes.c_void_p
library.malloc.argtypes = [ctypes.c_size_t]
together = threading.Barrier(4)
def allocate():
    library.malloc(5000)  # too large for the piece of memory that each thread keeps
    together.wait()
threads = [threading.Thread(target=allocate) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
library.fclose.argtypes = [ctypes.c_void_p]
library.malloc_info.argtypes = [ctypes.c_int, ctypes.c_void_p]
file = library.fopen(sys.argv[1].encode(), b"w")
assert library.malloc_info(0, file) == 0
library.fclose(file)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the pools are glibc's")
@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"MALLOC_ARENA_MAX": "3"},
        {"GLIBC_TUNABLES": "glibc.malloc.arena_max=3"},
        {"GLIBC_TUNABLES": "glibc.malloc.check=0"},
    ],
)
def test_all_threads_allocate_from_one_pool_unless_the_environment_names_a_number(
    variables: dict[str, str], tmp_path: Path
) -> None:
    is_limited = "3" not in str(variables)
    environment = {
        key: value for key, value in os.environ.items() if key not in ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES")
    }
    subprocess.run(
        [sys.executable, "-c", _IN_THREADS, str(tmp_path / "info"), "limited" if is_limited else "free"],
        env=environment | variables,
        check=True,
    )
    pools = len(re.findall("<heap nr", (tmp_path / "info").read_text()))
    assert pools == 1 if is_limited else pools > 1


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)
    monkeypatch.setattr(malloc.ctypes, "CDLL", lambda name: object())
    assert malloc.limit_malloc_pools() is False
