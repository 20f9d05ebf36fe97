from __future__ import annotations

from pathlib import Path

import pytest

from retrieval_draft.bench.compare import ORACLE, compare_methods, lookup_methods
from retrieval_draft.bench.replay import replay
from retrieval_draft.errors import InvalidInputError

TRACES = [Path(__file__).parents[2] / "data" / "vicuna7b_specbench_12.jsonl.gz"]


def test_every_lookup_method_runs_and_calibrated_leads() -> None:
    names = lookup_methods()
    assert {"calibrated", "prompt_lookup", "token_recycling", "suffix_decoding", "racer"} <= set(names)
    turns: list[None] = []
    found = compare_methods(TRACES, nodes=[16], progress=lambda: turns.append(None))
    assert set(found["methods"]) == {*names, ORACLE}
    assert len(turns) == len(names) + 1
    assert all(sizes[16] >= 1 for sizes in found["methods"].values())
    assert all(sizes[16] <= 16 for sizes in found["nodes_per_step"].values())
    assert found["calibrated_to_best"][16] > 1.05
    assert found["methods"][ORACLE][16] > 1.5


def test_parts_are_disjoint_and_whole() -> None:
    tokens = {part: replay(TRACES, nodes=4, part=part)["tokens"] for part in ("all", "even", "odd")}
    assert tokens["even"] + tokens["odd"] == tokens["all"]
    with pytest.raises(InvalidInputError, match="part is 'third'"):
        replay(TRACES, nodes=4, part="third")


def test_calibration_is_reported_and_believable() -> None:
    found = replay(TRACES, nodes=32)
    assert found["calibration"]["error"] < 0.03
    assert found["calibration"]["path_error"] < 0.03
    assert "calibration" not in replay(TRACES, nodes=8, method="prompt_lookup")


def test_evidence_left_out_costs_log_loss() -> None:
    losses = {
        without: replay(TRACES, nodes=32, priors=False, without=without)["calibration"]["log_loss"]
        for without in ((), ("length", "depth", "rank", "absent", "request", "cells"))
    }
    assert losses[()] < losses[("length", "depth", "rank", "absent", "request", "cells")]
