"""Replays of traces with every method that needs no model, side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from retrieval_draft.bench.replay import replay
from retrieval_draft.config import METHODS
from retrieval_draft.methods.registry import get_method

__all__ = ["ORACLE", "compare_methods", "lookup_methods"]

ORACLE = "best single source"
"""The oracle's row: in each step the one source of `calibrated` that turns out best, chosen in hindsight."""


def lookup_methods() -> list[str]:
    """Names of all methods that draft without a model."""
    return [name for name in METHODS if name != "none" and not get_method(name).needs_model]


def compare_methods(
    paths: Sequence[Path],
    *,
    nodes: Sequence[int],
    methods: Sequence[str] = (),
    progress: Callable[[], object] = lambda: None,
    **options: Any,
) -> dict[str, Any]:
    """Tokens per step of each method at each number of nodes, and of the oracle.

    Args:
        paths: Trace files.
        nodes: Draft nodes of every step, one or more.
        methods: Names; without any, all that need no model.
        progress: Called after each replay.
        **options: As for `replay`.

    Returns:
        ``{"methods": {name: {nodes: tokens_per_step}}, "by_task": {task: {name: {nodes: …}}},
        "nodes_per_step": {name: {nodes: …}}, "calibrated_to_best": {nodes: ratio}}``: `calibrated` over the
        best other method.
    """
    names = list(methods) or lookup_methods()
    found: dict[str, dict[int, float]] = {}
    used: dict[str, dict[int, float]] = {}
    tasks: dict[str, dict[str, dict[int, float]]] = {}
    for name in [*names, ORACLE]:
        oracle = name == ORACLE
        for size in nodes:
            method = "calibrated" if oracle else name
            result = replay(paths, nodes=size, method=method, oracle=oracle, **options)
            found.setdefault(name, {})[size] = result["tokens_per_step"]
            used.setdefault(name, {})[size] = result["nodes_per_step"]
            for task, value in result["by_task"].items():
                tasks.setdefault(task, {}).setdefault(name, {})[size] = value
            progress()
    others = [name for name in names if name != "calibrated"]
    ratios = {}
    if "calibrated" in found and others:
        ratios = {
            size: found["calibrated"][size] / max(found[name][size] for name in others) for size in nodes
        }
    return {"methods": found, "by_task": tasks, "nodes_per_step": used, "calibrated_to_best": ratios}
