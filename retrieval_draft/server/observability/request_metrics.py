"""Draft counts in a response: ``metrics.speculative_decoding``, with vLLM's keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from retrieval_draft.drafting.stats import DraftStats

__all__ = ["speculative_decoding"]


def speculative_decoding(
    stats: DraftStats, accepted_steps: Mapping[int, int] | None = None
) -> dict[str, Any]:
    """The counts of one request under vLLM's keys, and some of ours.

    As there, a step counts only if it verified drafts, and the bonus token is no draft. A draft is a tree
    here, so ``num_draft_tokens`` counts its nodes, and no more of them can be accepted than its longest path
    has.

    Args:
        stats: Counts of the request.
        accepted_steps: Number of steps with drafts by the number of accepted ones; None where that was not
            counted, and the histogram is left out.

    Returns:
        Plain types for JSON.

    Example:
        3 steps with 4 nodes each that accepted 2, 0 and 2, and one without drafts:
        num_spec_steps 3, num_draft_tokens 12, num_accepted_draft_tokens 4,
        mean_acceptance_length 2.33, acceptance_histogram [1, 0, 2], tokens_per_step 2.0
    """
    steps = stats.steps - stats.nodes[0]
    counts: dict[str, Any] = {
        "mean_acceptance_length": 1.0 + stats.accepted / steps if steps else 1.0,
        "draft_acceptance_rate": stats.acceptance_rate,
        "num_spec_steps": steps,
        "num_accepted_draft_tokens": stats.accepted,
        "num_draft_tokens": stats.drafted,
    }
    if accepted_steps is not None:
        longest = max(accepted_steps, default=0)
        counts["acceptance_histogram"] = [accepted_steps.get(count, 0) for count in range(longest + 1)]
    return counts | {
        "num_steps": stats.steps,
        "tokens_per_step": stats.tokens_per_step,
        "accepted_by_source": dict(stats.accepted_by_source),
        "accepted_by_level": dict(stats.accepted_by_level),
    }
