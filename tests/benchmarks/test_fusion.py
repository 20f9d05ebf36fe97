from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.fusion import measure_fusion
from retrieval_draft.errors import InvalidInputError

DATA = Path(__file__).parents[1] / "data" / "vicuna7b_specbench_12.jsonl.gz"


def test_times_are_counted_for_five_sources() -> None:
    found = measure_fusion([DATA], nodes=60, limit=None)
    assert found["steps"] > 200
    assert found["proposed"] > 120, "five sources, most of them in full"
    for name in ("fuse_us", "observe_us", "both_us"):
        assert 0 < found[name]["p50"] <= found[name]["p99"]


def test_too_little_to_time_is_said(tmp_path: Path) -> None:
    trace = tmp_path / "short.jsonl"
    trace.write_text(json.dumps({"prompt": [1], "output": [2, 3]}) + "\n", encoding="utf-8")
    with pytest.raises(InvalidInputError, match="too few to time"):
        measure_fusion([trace])
