"""Drafting methods: sources, a rule that makes the tree, and its size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from retrieval_draft.config import DraftConfig
from retrieval_draft.drafting.cost import CostModel
from retrieval_draft.drafting.tree import DraftTree
from retrieval_draft.index.draft_stores import DraftStores
from retrieval_draft.index.source import DraftSource, Proposal

__all__ = ["Method", "MethodContext", "TreeRule", "as_proposed"]

TreeRule = Callable[[int, Sequence[Proposal], Any, int], DraftTree]
"""Root token, one proposal of each source, calibration, most nodes: the tree to verify."""


@dataclass(frozen=True, slots=True)
class MethodContext:
    """Parts that a method can be made from.

    Attributes:
        config: The user's configuration.
        stores: Corpora, phrases, vocabulary.
        models: Draft models, the best first; empty without one.
    """

    config: DraftConfig
    stores: DraftStores
    models: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class Method:
    """A drafting method.

    Attributes:
        name: As in ``DraftConfig.method``.
        paper: Its publication.
        sources: Makes its sources, nearest locality first.
        tree: Makes one tree of their proposals.
        nodes: Draft nodes of a step as published; None lets the measured cost decide.
        costs: Chooses their number by the measured cost.
        calibrates: Whether acceptance is learned.
        needs_model: Whether it drafts with a draft model.
        needs_head: Whether that is a trained head of one kind.
        reads_text: Whether it looks tokens up in text of the request, such as reference texts.
    """

    name: str
    paper: str
    sources: Callable[[MethodContext], Sequence[DraftSource]]
    tree: TreeRule
    nodes: int | None
    calibrates: bool = False
    needs_model: bool = False
    needs_head: bool = False
    reads_text: bool = True
    costs: type[CostModel] = CostModel

    def reads_references(self, config: DraftConfig) -> bool:
        """True if it drafts from reference texts as it is configured."""
        return self.reads_text and (not self.calibrates or "automaton" in config.sources)


def as_proposed(
    root_token: int, proposals: Sequence[Proposal], calibration: object, max_nodes: int
) -> DraftTree:
    """The first proposal itself, cut to `max_nodes`, as published systems verify it.

    Args:
        root_token: The last accepted token.
        proposals: The proposal of one source.
        calibration: Not used.
        max_nodes: The most draft nodes to keep.

    Example:
        root 8, proposal tokens [9, 4], parents [-1, 0]  ->  tokens [8, 9, 4], parents [-1, 0, 1]
    """
    import numpy as np

    if not proposals or not len(proposals[0]):
        return DraftTree.root(root_token)
    proposal = proposals[0]
    size = min(len(proposal), max_nodes) + 1
    tree = DraftTree(
        tokens=np.full(size, root_token, np.int32),
        parents=np.full(size, -1, np.int32),
        depths=np.zeros(size, np.int32),
        probs=np.ones(size, np.float32),
        path_probs=np.ones(size, np.float32),
        sources=np.ones(size, np.int64),
    )
    tree.tokens[1:] = proposal.tokens[: size - 1]
    tree.parents[1:] = proposal.parents[: size - 1] + 1
    tree.probs[1:] = proposal.probs[: size - 1]
    tree.sources[0] = 0
    for node in range(1, size):
        above = tree.parents[node]
        tree.depths[node] = tree.depths[above] + 1
        tree.path_probs[node] = tree.path_probs[above] * tree.probs[node]
    return tree
