"""Times of fusion, selection and calibration updates, for five sources with full proposals."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from retrieval_draft.bench.measuring import percentiles
from retrieval_draft.bench.replay import read_traces
from retrieval_draft.config import DraftConfig
from retrieval_draft.drafting.calibration import Calibration
from retrieval_draft.drafting.fusion import fuse
from retrieval_draft.drafting.hierarchy import SourceHierarchy
from retrieval_draft.drafting.sources import make_sources
from retrieval_draft.errors import InvalidInputError
from retrieval_draft.index.draft_stores import DraftStores
from retrieval_draft.index.source import NodeLogits, Proposal, TokenArray

__all__ = ["measure_fusion"]

OTHERS = (("corpus", "corpus"), ("model", "model"))
WARM = 64


def measure_fusion(paths: Sequence[Path], *, nodes: int = 60, limit: int | None = 60) -> dict[str, Any]:
    """Replays traces and times each step's fusion, selection and learning.

    Automaton, adjacency and history propose for the step itself. Their proposals of the step before are used
    again as those of a corpus and of a draft model: these fit the text as badly as another source's, so that
    the tries are larger than those of five sources that agree.

    Args:
        paths: Trace files.
        nodes: Draft nodes of every step.
        limit: Replay only so many requests.

    Returns:
        ``{"fuse_us": {"p50", "p99", "mean"}, "observe_us": …, "both_us": …, "proposed", "steps", "nodes"}``,
        `proposed` being the nodes proposed in a step.

    Raises:
        InvalidInputError: The traces are too short to time.
    """
    config = DraftConfig(nodes=nodes, sources=("automaton", "adjacency", "history"))
    traces = list(islice(read_traces(paths), limit))
    vocabulary = max((int(t.output.max(initial=0)) + int(t.prompt.max(initial=0)) for t in traces), default=0)
    hierarchy = SourceHierarchy(make_sources(config, DraftStores(vocabulary + 1)))
    shared = Calibration()
    fuse_us: list[float] = []
    observe_us: list[float] = []
    proposed: list[int] = []
    for trace in traces:
        calibration, drafts = shared.open(trace.prompt), hierarchy.open(trace.prompt)
        text = np.concatenate((trace.prompt, trace.output))
        earlier: list[Proposal] = []
        done = 0
        while done < len(trace.output):
            at = len(trace.prompt) + done
            proposals = drafts.propose(nodes)
            full = sorted(proposals, key=len)[-len(OTHERS) :]
            others = [
                replace(old, source=name, level=level)
                for old, (name, level) in zip(earlier or full, OTHERS, strict=True)
            ]
            begin = time.perf_counter()
            tree = fuse(int(text[at - 1]) if at else 0, [*proposals, *others], calibration, nodes)
            fused = time.perf_counter()
            emitted = trace.output[done : done + len(tree.walk(trace.output[done:]))]
            walked = time.perf_counter()
            calibration.observe(tree, proposals, emitted)
            observe_us.append((time.perf_counter() - walked) * 1e6)
            fuse_us.append((fused - begin) * 1e6)
            proposed.append(sum(map(len, proposals)) + sum(map(len, others)))
            earlier = full
            drafts.learn(_emitted_logits(text, at, emitted))
            drafts.observe(emitted)
            calibration.count(emitted)
            done += len(emitted)
        drafts.close()
        hierarchy.flush()
    hierarchy.close()
    if len(fuse_us) <= 2 * WARM:
        raise InvalidInputError(
            f"{len(fuse_us)} steps are too few to time.", f"Take traces of more than {2 * WARM} tokens."
        )
    both = [one + other for one, other in zip(fuse_us, observe_us, strict=True)]
    times = {"fuse_us": fuse_us, "observe_us": observe_us, "both_us": both}
    found: dict[str, Any] = {name: percentiles(values[WARM:], mean=True) for name, values in times.items()}
    return {**found, "proposed": float(np.mean(proposed)), "steps": len(fuse_us), "nodes": nodes}


def _emitted_logits(text: TokenArray, at: int, emitted: TokenArray) -> NodeLogits:
    """The trace's own tokens as predictions, each after the last four of the text."""
    padded = np.concatenate((np.full(4, -1, np.int32), text))
    contexts = np.stack([padded[at + step : at + step + 4] for step in range(len(emitted))])
    return NodeLogits(contexts, emitted[:, None], np.ones((len(emitted), 1), np.float32))
