"""Speed and size of the suffix automaton on real text: insertion, bytes, and proposals at several lengths."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retrieval_draft.bench.measuring import percentiles
from retrieval_draft.bench.replay import read_traces
from retrieval_draft.errors import InvalidInputError
from retrieval_draft.index.source import TokenArray
from retrieval_draft.index.suffix_automaton import SuffixAutomaton

__all__ = ["measure_automaton"]

ROUNDS = 5
PROPOSALS = 4000


def measure_automaton(paths: Sequence[Path], *, lengths: Sequence[int], nodes: int) -> dict[str, Any]:
    """Inserts the text of traces and proposes after every further token.

    Each proposal follows one insertion, as in a decoding step.

    Args:
        paths: Trace files; prompts and outputs are joined to one text.
        lengths: Context lengths in tokens.
        nodes: Nodes of each proposal.

    Returns:
        For each length: insert_tokens_per_second (best of five), bytes_per_token, propose_us p50, p99 and
        mean (least of five), nodes (mean), states and edges a token.
    """
    parts = [part for trace in read_traces(paths) for part in (trace.prompt, trace.output)]
    text = np.concatenate(parts) if parts else np.empty(0, np.int32)
    most = max(lengths) + PROPOSALS
    if len(text) < most:
        raise InvalidInputError(
            f"The traces hold {len(text)} tokens; {most} are needed for a context of {max(lengths)}.",
            "Give more traces or smaller lengths.",
        )
    _measure(text, 1024, nodes)  # loads or compiles the kernels
    results: dict[str, dict[str, Any]] = {}
    for _ in range(ROUNDS):  # lengths alternate, so that a slow moment of the machine affects all of them
        for length in lengths:
            found = _measure(text, length, nodes)
            best = results.setdefault(str(length), found)
            if best is not found:
                best["insert_tokens_per_second"] = max(
                    best["insert_tokens_per_second"], found["insert_tokens_per_second"]
                )
                best["propose_us"] = {
                    name: min(value, found["propose_us"][name]) for name, value in best["propose_us"].items()
                }
    return {"lengths": results, "config": {"nodes": nodes, "traces": [path.name for path in paths]}}


def _measure(text: TokenArray, length: int, nodes: int) -> dict[str, Any]:
    automaton = SuffixAutomaton(length)
    begin = time.perf_counter()
    automaton.insert(text[:length])
    inserted = time.perf_counter() - begin
    size = {
        "bytes_per_token": automaton.nbytes / length,
        "states_per_token": automaton.num_states / length,
        "edges_per_token": automaton.num_edges / length,
    }
    workspace = automaton.workspace()
    automaton.propose(nodes, workspace)
    times, proposed = np.empty(PROPOSALS), 0
    for step in range(PROPOSALS):
        automaton.insert(text[length + step : length + step + 1])
        begin = time.perf_counter()
        proposal = automaton.propose(nodes, workspace)
        times[step] = time.perf_counter() - begin
        proposed += len(proposal)
    times *= 1e6
    return {
        "insert_tokens_per_second": length / inserted,
        **size,
        "propose_us": percentiles(times, mean=True),
        "nodes": proposed / PROPOSALS,
    }
