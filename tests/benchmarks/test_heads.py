"""The benchmarks of draft models beside the lookups, with a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.commands import Command
from tests.support.tiny import TEXT, save_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("heads") / "model")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"task": task, "prompt": TEXT}) + "\n" for task in ("a", "b")))
    return path


def test_the_ways_take_turns(command: Command, folder: Path, prompts: Path) -> None:
    options = ["--model", str(folder), "--prompts", str(prompts), "--max-new-tokens", "24"]
    code, shown, err = command(
        "benchmarks", "heads", "--draft-model", "self", *options, "--nodes", "6", "--json"
    )
    assert code == 0, err
    result = json.loads(shown)
    assert result["equal"] == result["prompts"] == 2
    assert set(result["by_task"]) == {"a", "b", "all"}
    for ways in result["by_task"].values():
        assert ways["lookups"]["ratio"] == 1
        assert all(each["tokens_per_step"] >= 1 for each in ways.values())
    code, shown, err = command("benchmarks", "heads", "--draft-model", "self", *options)
    assert code == 0, err
    assert "asked in so many steps" in shown


def test_an_unknown_way_is_refused(command: Command, folder: Path) -> None:
    code, _, err = command("benchmarks", "heads", "--draft-model", "self", "--ways", "lookups,none")
    assert code != 0
    assert "lookups, head, both" in err


def test_a_trimmed_vocabulary(command: Command, folder: Path, prompts: Path) -> None:
    options = ["--model", str(folder), "--prompts", str(prompts), "--max-new-tokens", "12", "--json"]
    code, shown, err = command("benchmarks", "trim", *options)
    assert code == 0, err
    assert set(json.loads(shown)["ways"]) == {"whole", "trimmed"}
