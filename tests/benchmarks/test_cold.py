"""Tests of what a fresh install waits for."""

import sys

import pytest

from benchmarks.cold import measure_first_use
from retrieval_draft.bench.datastores import resident_bytes
from tests.support.tiny import save_tiny


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells through /proc")
def test_resident_memory_grows_with_what_is_written() -> None:
    before = resident_bytes()
    block = bytearray(b"1" * (64 << 20))
    after = resident_bytes()
    assert before is not None
    assert after is not None
    assert after - before > len(block) // 2


def test_the_second_process_finds_what_the_first_measured(tmp_path) -> None:
    found = measure_first_use(str(save_tiny(tmp_path)), "float32")
    assert found["again_seconds"] < found["first_seconds"] / 4
    assert found["weight_bytes"] > 0
