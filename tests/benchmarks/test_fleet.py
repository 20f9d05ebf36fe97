"""A fleet by replay: more is gained the more is shared, and every byte is counted."""

from __future__ import annotations

from pathlib import Path

from benchmarks.fleet import measure_fleet

TRACE = Path(__file__).parents[1] / "data" / "vicuna7b_specbench_12.jsonl.gz"


def test_sharing_gains_and_costs() -> None:
    found = measure_fleet([TRACE], servers=[3], nodes=16, levels=("nothing", "rows"), limit=6, points=2)
    nothing, rows = found["fleets"]
    assert (
        nothing["tokens_per_step"] < rows["tokens_per_step"] <= found["one_server"]["tokens_per_step"] * 1.02
    )
    assert (nothing["text_bytes_per_request"], nothing["learned_bytes_per_request"]) == (0, 0)
    assert rows["text_bytes_per_request"] > rows["learned_bytes_per_request"] > 0
    assert [requests for requests, _ in rows["curve"]] == [3, 6]
