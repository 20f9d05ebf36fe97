"""A verified tree as data for the page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from retrieval_draft.drafting.session import DraftPlan
from retrieval_draft.server.scheduler.events import RowStep

__all__ = ["tree_view"]

_MOST = 40
"""Nodes drawn, the root included; the most probable ones."""


def tree_view(row: RowStep, text: Callable[[int], str]) -> dict[str, Any]:
    """Nodes with texts, parents, probabilities and sources; the accepted ones marked.

    Args:
        row: The step of one row.
        text: Returns the text of a token.

    Returns:
        Plain types for JSON. Accepted nodes are included even if improbable.
    """
    tree, accepted = row.plan.tree, set(row.path)
    shown = [node for node in range(len(tree)) if node < _MOST or node in accepted]
    index_of = {node: number for number, node in enumerate(shown)}
    nodes = [
        {
            "text": text(int(tree.tokens[node])),
            "parent": index_of.get(int(tree.parents[node]), -1),
            "prob": round(float(tree.path_probs[node]), 4),
            "sources": _sources(row.plan, node),
            "accepted": node in accepted,
        }
        for node in shown
    ]
    bonus = text(int(row.tokens[-1])) if len(row.tokens) == len(row.path) else None
    return {"nodes": nodes, "size": tree.num_draft_tokens, "accepted": len(row.path) - 1, "bonus": bonus}


def _sources(plan: DraftPlan, node: int) -> Sequence[str]:
    bits = int(plan.tree.sources[node])
    return [proposal.source for bit, proposal in enumerate(plan.proposals) if bits >> bit & 1]
