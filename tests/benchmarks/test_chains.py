from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.chains import measure_chains, replay_chains
from benchmarks.commands import app
from retrieval_draft.errors import InvalidInputError

DATA = Path(__file__).parents[1] / "data" / "vicuna7b_specbench_12.jsonl.gz"


def test_steps_are_timed_with_and_without_history() -> None:
    found = measure_chains([1, 3], context=400, history_tokens=30_000, steps=10, max_chain=4)
    for rows in ("1", "3"):
        for part in (found["requests"][rows], found["requests"][rows]["history"]):
            assert 0 < part["step_us"]["p50"] <= part["step_us"]["p99"]
            assert part["us_per_request"] == pytest.approx(part["step_us"]["p50"] / int(rows))
            assert 1 <= part["tokens_per_step"] <= 5
            assert 0 <= part["drafted_per_step"] <= 4


def test_chains_of_a_batch_are_worth_those_of_a_proposer() -> None:
    found = replay_chains([DATA], max_chain=8)
    assert found["requests"] == 12
    mine, tree, copied = (found[name]["tokens_per_step"] for name in ("batch", "proposer", "prompt_lookup"))
    assert mine > 0.97 * tree
    assert mine > 1.02 * copied


def test_nothing_to_replay_is_said(tmp_path: Path) -> None:
    trace = tmp_path / "short.jsonl"
    trace.write_text(json.dumps({"prompt": [1], "output": [2]}) + "\n", encoding="utf-8")
    with pytest.raises(InvalidInputError, match="Nothing to replay"):
        replay_chains([trace])


def test_the_command_prints_one_object() -> None:
    words = ["chains", str(DATA), "--requests", "2", "--context", "50", "--history-tokens", "0"]
    result = CliRunner().invoke(app, [*words, "--steps", "4", "--limit", "2", "--json"])
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["requests"]["2"]["tokens_per_step"] >= 1
    assert found["replay"]["requests"] == 2
    assert CliRunner().invoke(app, ["chains", "--requests", "x"]).exit_code != 0
