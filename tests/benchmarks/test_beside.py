"""The benchmark of drafts made beside the target's passes, with tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.support.commands import Command
from tests.support.tiny import TEXT, save_tiny


def test_both_ways_take_turns(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # of this process, for other tests
    target, draft = (str(save_tiny(tmp_path / name)) for name in ("target", "draft"))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"task": task, "prompt": TEXT}) + "\n" for task in ("a", "b")))
    options = ["--model", target, "--draft-model", draft, "--prompts", str(prompts), "--max-new-tokens", "24"]
    code, shown, err = command("benchmarks", "beside", *options, "--nodes", "6", "--no-lookups", "--json")
    assert code == 0, err
    result = json.loads(shown)
    assert result["equal"] == result["prompts"] == 2
    assert result["prepared"] > 0
    assert 0 <= result["hits"] <= 1
    assert all(each["tokens_per_step"] >= 1 for each in result["ways"].values())
    assert result["ratio"] > 0
