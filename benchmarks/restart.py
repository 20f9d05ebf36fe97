"""A server that is started again: seconds until it serves, and what it still drafts."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.agent_run import AgentRun, run_agent
from benchmarks.agent_script import Turn
from benchmarks.serve_process import ServeProcess
from benchmarks.valkey_process import ValkeyProcess

__all__ = ["measure_restart"]


def measure_restart(
    model: str, turns: Sequence[Turn], folder: Path, *, new: int, options: Sequence[str] = ()
) -> dict[str, Any]:
    """Sends one conversation to a server twice, to the one that follows it, and to one that knows a snapshot.

    The second server has the history folder of the first. The third has the snapshots of their store alone:
    an empty history folder, and a store that is empty.

    Args:
        model: Folder of a model.
        turns: The requests, greedy.
        folder: For history, stores and snapshots.
        new: Tokens of a reply.
        options: Further ones of ``serve``.

    Returns:
        Of each run: seconds from the server's start until it serves and to the conversation's end, tokens
        per step, and the number of replies that are those of the first run.
    """
    snapshots = folder / "snapshots"
    runs: dict[str, dict[str, Any]] = {}
    expected: list[list[int]] = []

    def serve(name: str, history: str, url: str, *more: str) -> None:
        began = time.perf_counter()
        server = ServeProcess([
            "--model", model, "--served-model-name", "agent", "--history", str(folder / history),
            "--store", url, "--snapshots", str(snapshots), *options,
        ])  # fmt: skip
        try:
            ready = time.perf_counter() - began
            for each in (name, *more):
                run = run_agent(server.port, "agent", turns, new, True)
                expected.extend(run.tokens[len(expected) :])
                runs[each] = _figures(run, expected) | {
                    "ready_seconds": ready, "all_seconds": time.perf_counter() - began,
                }  # fmt: skip
        finally:
            server.stop()

    with ValkeyProcess(folder / "store") as store:
        serve("first", "history", store.url, "repeated")
        serve("restarted", "history", store.url)
        command = [sys.executable, "-m", "retrieval_draft.cli", "store", "snapshot", "--store", store.url]
        subprocess.run(
            [*command, "--tokenizer", model, "--snapshots", str(snapshots)], check=True, capture_output=True
        )
    with ValkeyProcess(folder / "empty") as store:
        serve("from_snapshot", "nothing", store.url)
    return runs


def _figures(run: AgentRun, expected: Sequence[Sequence[int]]) -> dict[str, Any]:
    return {
        "equal": sum(list(a) == list(b) for a, b in zip(run.tokens, expected, strict=True)),
        "turns": len(run.tokens),
        "tokens_per_step": run.decoded / max(run.steps, 1),
        "cached_share": sum(run.cached_tokens) / max(sum(run.prompt_tokens), 1),
    }
