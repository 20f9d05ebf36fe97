"""A fleet by replay: every byte of what is shared is counted."""

from __future__ import annotations

from pathlib import Path

from benchmarks.fleet import measure_fleet

TRACE = Path(__file__).parents[1] / "data" / "vicuna7b_specbench_12.jsonl.gz"


def test_a_fleet_is_compared_with_one_server() -> None:
    found = measure_fleet([TRACE], servers=[3], nodes=8, levels=("nothing", "rows"), limit=4, points=2)
    nothing, rows = found["fleets"]
    assert rows["ratio"] == rows["tokens_per_step"] / found["one_server"]["tokens_per_step"]
    assert (nothing["text_bytes_per_request"], nothing["learned_bytes_per_request"]) == (0, 0)
    assert rows["text_bytes_per_request"] > rows["learned_bytes_per_request"] > 0
    assert [requests for requests, _ in rows["curve"]] == [2, 4]
