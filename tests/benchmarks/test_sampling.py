"""The benchmarks of batches, samples and draws, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.commands import Command
from tests.support.tiny import TEXT


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = tmp_path / "prompts.jsonl"
    texts = [TEXT, TEXT[5:40], "a b a b a b", "1. one\n2. two\n"]
    path.write_text("".join(json.dumps({"prompt": text, "task": "t"}) + "\n" for text in texts))
    return str(path)


def test_bench_batch(command: Command, tiny: str, prompts: str) -> None:
    words = [
        "benchmarks",
        "batch",
        "--model",
        tiny,
        "--prompts",
        prompts,
        "--rows",
        "2",
        "--max-new-tokens",
        "12",
    ]
    code, out, _ = command(*words, "--json")
    assert code == 0
    result = json.loads(out)
    assert result["batches"] == 2
    assert set(result["methods"]) == {"stock", "none", "calibrated"}
    for entry in result["methods"].values():
        assert entry["equal_to_stock_alone"] + entry["near_ties"] == 4
    assert result["methods"]["none"]["tokens_per_step"] == 1.0
    code, out, _ = command(*words, "--methods", "stock,calibrated")
    assert code == 0
    assert "calibrated" in out
    assert command(*words[:-4], "--rows", "9")[0] == 1


def test_bench_samples(command: Command, tiny: str, prompts: str) -> None:
    words = ["benchmarks", "samples", "--model", tiny, "--prompts", prompts, "--samples", "3", "--limit", "2"]
    every = "alone,alone_without_noise,together,plain"
    code, out, _ = command(*words, "--max-new-tokens", "12", "--ways", every, "--json")
    assert code == 0
    result = json.loads(out)
    assert result["same_in_all_ways"] == result["samples"] == 6
    assert result["ways"]["plain"]["tokens_per_step"] == 1.0
    assert len({entry["tokens"] for entry in result["ways"].values()}) == 1
    assert command(*words, "--ways", "apart")[0] == 1
    assert "together" in command(*words, "--max-new-tokens", "4")[1]


def test_bench_draw(command: Command, tiny: str, prompts: str) -> None:
    words = ["benchmarks", "draw", "--model", tiny, "--prompts", prompts, "--tokens", "8"]
    code, out, _ = command(*words, "--json")
    assert code == 0
    result = json.loads(out)
    assert all(taken > 0 for taken in result["draw_ms"].values())
    assert "share of a step" in command(*words)[1]
