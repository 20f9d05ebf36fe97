"""One request's side of drafting: what to verify next, and what to learn from it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from retrieval_draft.drafting.locality import RequestDrafts
from retrieval_draft.drafting.predictions import Predictions
from retrieval_draft.drafting.stats import DraftStats
from retrieval_draft.drafting.tree import DraftTree
from retrieval_draft.index.source import CONTEXT, NodeLogits, Proposal, TokenArray

__all__ = ["Drafting", "Fuse", "Plan", "count_names", "prompt_contexts", "proposed_nodes"]


class Calibrates(Protocol):
    """What drafting asks of a calibration."""

    noise: Any
    """What tokens will be drawn with, where that is known."""

    position: int
    """Where in the text the first drafted token would stand."""

    def observe(self, tree: DraftTree, proposals: Sequence[Proposal], emitted: TokenArray) -> object:
        """Notes which of the proposed nodes the target took."""
        ...


NOISY_CHOICE = 4
MOST_CHOICE = 64
"""Nodes that sources propose for each that is verified, where the noise chooses between them. On replies of
Gemma 270M, 8 nodes: 1% more tokens a step at a temperature of 0.6, 3% at 1."""

Fuse = Callable[[int, Sequence[Proposal], Any, int], DraftTree]


@dataclass(frozen=True, slots=True)
class Plan:
    """One step's drafts.

    Attributes:
        tree: What to verify.
        fused: The whole fused tree, of which `tree` is the best part.
        proposals: What the sources said; bit s of ``tree.sources`` means ``proposals[s]``.
    """

    tree: DraftTree
    fused: DraftTree
    proposals: Sequence[Proposal]

    def cut(self, nodes: int) -> Plan:
        """The plan that verifies the best `nodes` nodes of this one's tree."""
        if nodes >= self.tree.num_draft_tokens:
            return self
        return Plan(self.tree.truncate(nodes), self.fused, self.proposals)


class Drafting:
    """Sources, fusion and calibration, asked and told once a step.

    Args:
        drafts: The sources, opened for this request.
        fuse: Unites proposals into a tree: (root token, proposals, calibration, max_nodes).
        calibration: Learns what evidence is worth.
        max_nodes: Draft nodes at most.
        vocabulary: Token ids the model can embed.
        stats: Counts to add to.
    """

    def __init__(
        self,
        drafts: RequestDrafts,
        fuse: Fuse,
        calibration: Calibrates,
        max_nodes: int,
        vocabulary: int,
        stats: DraftStats,
    ) -> None:
        self._drafts = drafts
        self._fuse = fuse
        self._calibration = calibration
        self._max_nodes = max_nodes
        self._vocabulary = vocabulary
        self._stats = stats

    def propose(self, root: int, length: int, deepest: int, nodes: int | None = None) -> Plan:
        """All that could be verified in the next step; the budget cuts it.

        Args:
            root: The last accepted token.
            length: Committed tokens before it.
            deepest: Tokens that may still be emitted after the next one; deeper nodes are useless.
            nodes: Draft nodes at most in this step; None for as many as in any.
        """
        most = self._max_nodes if nodes is None else nodes
        wanted = proposed_nodes(most, self._calibration.noise is not None)
        proposals = self._drafts.propose(wanted)
        if not proposals:
            tree = DraftTree.root(root)
            return Plan(tree, tree, proposals)
        self._calibration.position = length + 1
        fused = self._fuse(root, proposals, self._calibration, most)
        return Plan(_usable(fused, deepest, self._vocabulary), fused, proposals)

    def count(self, plan: Plan, path: Sequence[int]) -> None:
        """Counts what a step verified and accepted."""
        stats = self._stats
        stats.drafted += plan.tree.num_draft_tokens
        stats.accepted += len(path) - 1
        stats.nodes[plan.tree.num_draft_tokens] += 1
        count_names(plan.proposals, plan.tree.sources[1:], stats.drafted_by_source, stats.drafted_by_level)
        taken = plan.tree.sources[list(path[1:])]
        count_names(plan.proposals, taken, stats.accepted_by_source, stats.accepted_by_level)

    def learn(self, plan: Plan, emitted: TokenArray, tail: TokenArray, said: Predictions) -> None:
        """Tells sources and calibration what a step showed.

        Args:
            plan: The step's drafts.
            emitted: int32, shape (m,). Tokens accepted in this step, the bonus token last.
            tail: int32. Committed text before the root.
            said: The target's predictions at every node of ``plan.tree``.
        """
        self.take_in(emitted)
        self.learn_from(plan, emitted, NodeLogits(plan.tree.contexts(tail), said.top_tokens, said.top_probs))

    def take_in(self, emitted: TokenArray) -> None:
        """Appends a step's tokens to the text of every source."""
        self._drafts.observe(emitted)

    def learn_from(self, plan: Plan, emitted: TokenArray, logits: NodeLogits) -> None:
        """Tells sources and calibration what a step showed besides its tokens, now or a step later.

        Args:
            plan: The step's drafts.
            emitted: int32, shape (m,). Tokens accepted in this step.
            logits: What the target said, at nodes of the tree or anywhere.
        """
        self._drafts.learn(logits)
        if plan.proposals:
            self._calibration.observe(plan.fused, plan.proposals, emitted)

    @property
    def wants_hidden(self) -> bool:
        """Whether a source drafts from the target's hidden states."""
        return self._drafts.wants_hidden

    def learn_hidden(self, hidden: Any) -> None:
        """Tells the sources the hidden state that chose the new root; after `learn` or `start`."""
        self._drafts.learn_hidden(hidden)

    def start(self, first: TokenArray, prompt: TokenArray, said: Predictions | None) -> None:
        """Tells the sources the first token and what the target predicted at the prompt's end.

        Args:
            first: int32, shape (1,). The token after the prompt.
            prompt: int32, shape (length,).
            said: Predictions at the last positions of the prompt; None if the sources know them already.
        """
        begin = time.perf_counter()
        self._drafts.observe(first)
        if said is not None:
            contexts = prompt_contexts(prompt, len(said.next_tokens))
            self._drafts.learn(NodeLogits(contexts, said.top_tokens, said.top_probs))
        self._stats.learn_seconds += time.perf_counter() - begin

    def close(self) -> None:
        """Ends the request in every source. Once is enough, twice does no harm."""
        drafts, self._drafts = self._drafts, RequestDrafts(())
        drafts.close()


def proposed_nodes(nodes: int, noisy: bool) -> int:
    """Nodes to ask each source for, if `nodes` are verified: more where noise may favour the unlikely."""
    return max(nodes, min(NOISY_CHOICE * nodes, MOST_CHOICE)) if noisy else nodes


def count_names(
    proposals: Sequence[Proposal],
    named: NDArray[np.int64],
    by_source: Counter[str],
    by_level: Counter[str],
) -> None:
    """Counts nodes by the sources that named them, and by level; a node of two levels counts for both.

    Args:
        proposals: The step's proposals; bit s of a node means ``proposals[s]``.
        named: int64. The bits of each node.
        by_source: Counts to add to.
        by_level: Counts to add to.
    """
    if not len(named):
        return
    levels: dict[str, int] = {}
    for bit, proposal in enumerate(proposals):
        if len(proposal):
            by_source[proposal.source] += int(np.count_nonzero(named >> bit & 1))
            levels[proposal.level] = levels.get(proposal.level, 0) | 1 << bit
    for level, bits in levels.items():
        by_level[level] += int(np.count_nonzero(named & bits))


def prompt_contexts(prompt: TokenArray, count: int) -> NDArray[np.int32]:
    """Contexts of the last `count` positions: int32, shape (count, CONTEXT), -1 where there is no text.

    Example:
        prompt [5, 6, 7], count 2  ->  [[-1, -1, 5, 6], [-1, 5, 6, 7]]
    """
    head = np.full(CONTEXT - 1, -1, np.int32)
    windows = np.lib.stride_tricks.sliding_window_view(np.concatenate([head, prompt]), CONTEXT)
    return np.ascontiguousarray(windows[len(windows) - count :])


def _usable(tree: DraftTree, deepest: int, vocabulary: int) -> DraftTree:
    """Leaves out nodes that are too deep to be emitted or that the model cannot embed."""
    if (
        int(tree.tokens.max()) < vocabulary
        and int(tree.tokens.min()) >= 0
        and (len(tree) <= deepest or int(tree.depths.max()) <= deepest)
    ):
        return tree
    bad = (tree.depths > deepest) | (tree.tokens >= vocabulary) | (tree.tokens < 0)
    bad[0] = False
    for node in range(1, len(tree)):
        bad[node] |= bad[tree.parents[node]]
    kept = np.flatnonzero(~bad)
    place = np.full(len(tree), -1, np.int32)
    place[kept] = np.arange(len(kept), dtype=np.int32)
    parents = tree.parents[kept]
    parents[1:] = place[parents[1:]]
    return DraftTree(
        tree.tokens[kept],
        parents,
        tree.depths[kept],
        tree.probs[kept],
        tree.path_probs[kept],
        tree.sources[kept],
    )
