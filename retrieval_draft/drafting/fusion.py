"""Several proposals, one draft tree."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from retrieval_draft._kernels.lazy import LazyKernels
from retrieval_draft.drafting.calibration import PRIOR, Calibration, columns_of
from retrieval_draft.drafting.tree import DraftTree
from retrieval_draft.index.source import Proposal

__all__ = ["fuse"]

_kernels = LazyKernels("retrieval_draft.drafting._kernels.fusion")


def fuse(
    root_token: int, proposals: Sequence[Proposal], calibration: Calibration, max_nodes: int
) -> DraftTree:
    """The `max_nodes` most probable nodes of the union of `proposals`.

    Equal tokens under equal parents are one node, even if several sources name it.

    Args:
        root_token: The last accepted token.
        proposals: One of each source, always in the same order.
        calibration: Mixes their estimates and turns them into acceptance probabilities.
        max_nodes: The most draft nodes to keep, the root not counted.

    Example:
        root 8, proposals "9 4" (.8, .5) and "9, 3" (.5, .1), nothing learned: one node 9, in log odds
        .6 * 1.39 + .6 * 0 + .3, so .76, then tokens [8, 9, 4, 3], parents [-1, 0, 1, 0],
        path_probs [1, .76, .38, .1]
    """
    sizes = [len(proposal.tokens) for proposal in proposals]
    total = sum(sizes)
    if total == 0 or max_nodes <= 0:
        return DraftTree.root(root_token)
    noise = calibration.noise
    noise_key = np.uint64(0) if noise is None else noise.sample_key
    size = min(total, max_nodes) + 1
    nodes = np.empty((3, size), np.int32)
    probs = np.empty((2, size), np.float32)
    sources = np.empty(size, np.int64)
    columns, used = columns_of(tuple([proposal.source for proposal in proposals]))
    evidence = np.empty((size, _kernels.OWN + _kernels.PER_SOURCE * used.bit_count()), np.float32)
    filled = [proposal for proposal in proposals if len(proposal.tokens)]
    kept = _kernels.fuse(
        np.concatenate([proposal.tokens for proposal in filled]),
        np.concatenate([proposal.parents for proposal in filled]),
        np.concatenate([proposal.probs for proposal in filled]),
        np.concatenate([proposal.match_lengths for proposal in filled]),
        np.array([0, *accumulate(sizes)]),
        columns,
        used,
        calibration.weights,
        calibration.parameters,
        calibration.request,
        calibration.occurrences,
        calibration.expected,
        calibration.accepted,
        PRIOR,
        max_nodes,
        root_token,
        noise_key,
        -1 if noise is None else calibration.position,
        0 if noise is None else noise.vocabulary,
        calibration.sharpness,
        nodes,
        probs,
        sources,
        evidence,
    )
    if kept < size:  # several sources named a node
        nodes, probs, sources, evidence = nodes[:, :kept], probs[:, :kept], sources[:kept], evidence[:kept]
    return DraftTree(nodes[0], nodes[1], nodes[2], probs[0], probs[1], sources, evidence)
