"""Tests of what a fresh install waits for."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cold
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


def test_the_second_process_finds_what_the_first_compiled_and_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, kept = cold._run, []

    def noted(program: str, environment: dict[str, str], *arguments: str) -> Any:
        found = whole(program, environment, *arguments)
        folder = Path(environment["NUMBA_CACHE_DIR"])
        files = [path for path in folder.rglob("*") if path.suffix in (".nbi", ".nbc", ".json")]
        kept.append({path.relative_to(folder): path.stat().st_mtime_ns for path in files})
        return found

    monkeypatch.setattr(cold, "_run", noted)
    found = measure_first_use(str(save_tiny(tmp_path)), "float32")
    first, again = kept
    assert {path.suffix for path in first} == {".nbi", ".nbc", ".json"}, (
        "machine code, and choices of kernels"
    )
    assert again == first, "nothing was compiled, or measured and kept, again"
    assert found["weight_bytes"] > 0


def test_the_program_that_compiles_everything_runs() -> None:
    assert cold._run(cold._COMPILE, {}) > 0
