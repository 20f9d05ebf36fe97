"""Several proposals, one draft tree."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from retrieval_draft.engine.calibration import PRIOR, Calibration, places_of
from retrieval_draft.engine.tree import DraftTree
from retrieval_draft.index.source import Proposal

__all__ = ["fuse"]


def fuse(
    root_token: int, proposals: Sequence[Proposal], calibration: Calibration, max_nodes: int
) -> DraftTree:
    """The `max_nodes` most probable nodes of the union of `proposals`.

    Equal tokens under equal parents are one node, however many sources name it.

    Args:
        root_token: The last accepted token.
        proposals: What the sources guess, one for each source, always in the same order.
        calibration: Mixes their estimates and turns them into acceptance probabilities.
        max_nodes: The most draft nodes to keep, the root not counted.

    Example:
        root 8, proposals "9 4" (.8, .5) and "9, 3" (.5, .1), nothing learned: one node 9, in log odds
        .6 * 1.39 + .6 * 0 + .3, so .76, then tokens [8, 9, 4, 3], parents [-1, 0, 1, 0],
        path_probs [1, .76, .38, .1]
    """
    total = sum(len(proposal) for proposal in proposals)
    if total == 0 or max_nodes <= 0:
        return DraftTree.root(root_token)
    from retrieval_draft.engine._kernels import fusion

    starts = np.zeros(len(proposals) + 1, np.int64)
    np.cumsum([len(proposal) for proposal in proposals], out=starts[1:])
    size = min(total, max_nodes) + 1
    tokens = np.empty(size, np.int32)
    parents = np.empty(size, np.int32)
    depths = np.zeros(size, np.int32)
    probs = np.ones(size, np.float32)
    path_probs = np.ones(size, np.float32)
    sources = np.zeros(size, np.int64)
    evidence = np.zeros((size, fusion.EVIDENCE), np.float32)
    tokens[0] = root_token
    parents[0] = -1
    kept = fusion.fuse(
        np.concatenate([proposal.tokens for proposal in proposals]),
        np.concatenate([proposal.parents for proposal in proposals]),
        np.concatenate([proposal.probs for proposal in proposals]),
        np.concatenate([proposal.match_lengths for proposal in proposals]),
        starts,
        places_of(tuple([proposal.source for proposal in proposals])),
        calibration.weights,
        calibration.parameters,
        calibration.request,
        calibration.expected,
        calibration.accepted,
        PRIOR,
        max_nodes,
        tokens,
        parents,
        depths,
        probs,
        path_probs,
        sources,
        evidence,
    )
    return DraftTree(
        tokens[:kept],
        parents[:kept],
        depths[:kept],
        probs[:kept],
        path_probs[:kept],
        sources[:kept],
        evidence[:kept],
    )
