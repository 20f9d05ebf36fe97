"""Drafting of one request: plans of the next step, and updates from its result."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from retrieval_draft._kernels.lazy import LazyKernels
from retrieval_draft.drafting.budget import Budget
from retrieval_draft.drafting.grammar.grammar_text import GrammarText
from retrieval_draft.drafting.grammar.grammar_tree import certain_tokens, constrain, forced_proposal
from retrieval_draft.drafting.hierarchy import SourceSessions
from retrieval_draft.drafting.predictions import Predictions
from retrieval_draft.drafting.stats import DraftStats
from retrieval_draft.drafting.tree import DraftTree
from retrieval_draft.index.source import CONTEXT, NodeLogits, Proposal, TokenArray

__all__ = ["DraftPlan", "DraftSession", "Fuse", "count_names", "prompt_contexts", "proposed_nodes"]


class Calibrates(Protocol):
    """Interface of a calibration, as drafting uses it."""

    noise: Any
    """Noise that tokens will be drawn with, where it is known."""

    position: int
    """Position in the text of the first drafted token."""

    def observe(self, tree: DraftTree, proposals: Sequence[Proposal], emitted: TokenArray) -> object:
        """Records which of the proposed nodes the target accepted; `emitted` is int32, shape (m,)."""
        ...

    def count(self, tokens: TokenArray) -> None:
        """Counts tokens appended to the text, int32, shape (m,)."""
        ...


NOISY_CHOICE = 4
MAX_CHOICE = 64
"""Nodes that sources propose for each that is verified, where the noise chooses between them. On replies of
Gemma 270M, 8 nodes: 1% more tokens a step at a temperature of 0.6, 3% at 1."""

_CHOICE_OF_PATHS = 64
"""Nodes of a tree from which a short chain is chosen, at most twice its own."""

OUTCOMES = 3
"""Outcomes of a pass that are prepared for while it runs, one after the other."""

_NONE = np.empty(0, np.int32)

_kernels = LazyKernels("retrieval_draft.drafting._kernels.tree")

Fuse = Callable[[int, Sequence[Proposal], Any, int], DraftTree]


class Asked(NamedTuple):
    """A paced source that was asked.

    Attributes:
        pacer: Its pacer.
        without: The fused tree without its drafts.
        fused: The fused tree with them.
        nodes: Draft nodes of `without` that would have been verified; None for as many as of `fused`.
    """

    pacer: Any
    without: DraftTree
    fused: DraftTree
    nodes: int | None = None


@dataclass(frozen=True, slots=True)
class DraftPlan:
    """One step's drafts.

    Attributes:
        tree: The tree to verify.
        fused: The whole fused tree, of which `tree` is the best part.
        proposals: The sources' proposals; bit s of ``tree.sources`` means ``proposals[s]``.
        ahead: Tokens that a grammar forces before the root of `fused`; `tree` begins with them.
        asked: Paced sources that were asked.
    """

    tree: DraftTree
    fused: DraftTree
    proposals: Sequence[Proposal]
    ahead: int = 0
    asked: tuple[Asked, ...] = ()

    def weighed(self, budget: Budget) -> DraftPlan:
        """The plan with what the passes of its step cost the sources that were asked.

        Args:
            budget: That by which the tree was cut.
        """
        if not self.asked:
            return self
        asked = []
        for each in self.asked:
            nodes, seconds = budget.beyond(self.tree, each.without)
            each.pacer.lengthened(seconds)
            asked.append(each._replace(nodes=nodes))
        return replace(self, asked=tuple(asked))

    def cut(self, nodes: int) -> DraftPlan:
        """The plan that verifies the best `nodes` nodes of this one's tree."""
        if nodes >= self.tree.num_draft_tokens:
            return self
        return replace(self, tree=self.tree.truncate(nodes))

    def chain(self, nodes: int) -> DraftPlan:
        """The plan that verifies the best path of this one's tree, `nodes` drafts at most."""
        if not self.tree.num_draft_tokens:
            return self
        return replace(self, tree=self.tree.path(self.tree.best_path(nodes)))


class DraftSession:
    """Sources, fusion and calibration of one request, called once a step.

    Args:
        sessions: Those of this request, in all sources.
        fuse: Unites proposals into a tree: (root token, proposals, calibration, max_nodes).
        calibration: Learns the weights of the evidence.
        max_nodes: Draft nodes at most.
        vocabulary: Number of token ids that the model can embed.
        stats: Counts to add to.
        excluded: Ids that are no text, such as those that stand for an image: neither drafted nor learned.
        grammar: Follows the reply; None where any text is allowed.
    """

    def __init__(
        self,
        sessions: SourceSessions,
        fuse: Fuse,
        calibration: Calibrates,
        max_nodes: int,
        vocabulary: int,
        stats: DraftStats,
        excluded: Iterable[int] = (),
        grammar: GrammarText | None = None,
    ) -> None:
        self._grammar = grammar
        # Tokens that the grammar forces, and that the sources have seen before they are in the text.
        self._seen: list[int] = []
        self._sessions = sessions
        self._fuse = fuse
        self._calibration = calibration
        self._max_nodes = max_nodes
        self._vocabulary = vocabulary
        self._stats = stats
        self._excluded = np.array(sorted(excluded), np.int32)
        # Nodes by the set of proposals that named them; the names come when the request ends.
        self._drafted: dict[int, int] = {}
        self._accepted: dict[int, int] = {}
        self._named: Sequence[Proposal] = ()

    def propose(self, root: int, length: int, max_depth: int, nodes: int | None = None) -> DraftPlan:
        """Drafts of the next step before the budget cuts them.

        Args:
            root: The last accepted token.
            length: Committed tokens before it.
            max_depth: Tokens that may still be emitted after the next one; deeper nodes are left out.
            nodes: Draft nodes at most in this step; None for as many as in any.
        """
        most = self._max_nodes if nodes is None else nodes
        if self._grammar is not None:
            return self._propose_by(self._grammar, root, length, max_depth, most)
        return self._propose(root, length, max_depth, most)

    def _propose(self, root: int, length: int, max_depth: int, most: int) -> DraftPlan:
        wanted = proposed_nodes(most, self._calibration.noise is not None)
        proposals = self._sessions.propose(wanted)
        if not proposals:
            tree = DraftTree.root(root)
            return DraftPlan(tree, tree, proposals)
        self._calibration.position = length + 1
        fused = self._fuse(root, proposals, self._calibration, most)
        asked = []
        for index, session in self._sessions.paced:
            if max_depth > 0 and session.pacer.asks(_expected(fused)):
                proposals[index] = self._sessions.ask(index, wanted)
                without, fused = fused, self._fuse(root, proposals, self._calibration, most)
                asked.append(Asked(session.pacer, without, fused))
        tree = _usable(fused, max_depth, self._vocabulary, self._excluded)
        return DraftPlan(tree, fused, proposals, asked=tuple(asked))

    def _propose_by(
        self, grammar: GrammarText, root: int, length: int, max_depth: int, most: int
    ) -> DraftPlan:
        """As `propose`: what the grammar forces is taken for granted, and looked up from its end on."""
        ahead = certain_tokens(grammar, min(most, max_depth))
        known = len(self._seen)
        if self.wants_hidden:  # the hidden state at the text's end drafts what follows there
            ahead, plan = [], self._propose(root, length, max_depth, most)
        elif ahead[:known] == self._seen:
            if len(ahead) > known:
                self._sessions.observe(np.array(ahead[known:], np.int32))
                self._seen = ahead
            depth = len(ahead)
            plan = self._propose(ahead[-1] if ahead else root, length + depth, max_depth - depth, most)
        else:  # the sources are ahead of what may still be emitted
            ahead, plan = [], DraftPlan(DraftTree.root(root), DraftTree.root(root), ())
        tree = constrain(root, ahead, plan.tree, grammar, most, max_depth, 1 << len(plan.proposals))
        return DraftPlan(tree, plan.fused, [*plan.proposals, forced_proposal(ahead)], len(ahead), plan.asked)

    def propose_chain(self, root: int, length: int, max_depth: int) -> DraftPlan:
        """As `propose`, but one path: the one with the most accepted tokens on average."""
        wanted = max(self._max_nodes, min(2 * self._max_nodes, _CHOICE_OF_PATHS))
        return self.propose(root, length, max_depth, wanted).chain(self._max_nodes)

    def prepare(self, plan: DraftPlan) -> None:
        """Has sources that draft beside the target's pass prepare for its outcomes; as it begins."""
        if self._sessions.prepares:
            self._sessions.prepare_for(_likely_outcomes(plan.tree, plan.ahead))

    def count(self, plan: DraftPlan, path: Sequence[int]) -> None:
        """Counts the nodes of a step that were verified and accepted; those of each source when it ends."""
        stats = self._stats
        stats.drafted += plan.tree.num_draft_tokens
        stats.accepted += len(path) - 1
        stats.nodes[plan.tree.num_draft_tokens] += 1
        if plan.proposals:
            named = plan.tree.sources.tolist()
            self._named = plan.proposals
            drafted, accepted = self._drafted, self._accepted
            for bits in named[1:]:
                drafted[bits] = drafted.get(bits, 0) + 1
            for node in path[1:]:
                bits = named[node]
                accepted[bits] = accepted.get(bits, 0) + 1

    def observe(self, emitted: TokenArray) -> None:
        """Appends a step's tokens, int32, shape (m,), to the text of every source."""
        self._calibration.count(emitted)
        if self._seen:
            emitted = self._unseen(emitted)
        if len(emitted):
            self._sessions.observe(emitted)

    def _unseen(self, emitted: TokenArray) -> TokenArray:
        """Those of a step's tokens that the sources have not seen as forced ones."""
        seen = self._seen[: len(emitted)]
        self._seen = self._seen[len(emitted) :]
        if seen == emitted[: len(seen)].tolist():
            return emitted[len(seen) :]
        self._seen = []
        return emitted

    @property
    def learns_early(self) -> bool:
        """True if a source drafts from the last predictions: `learn_early` comes before the next proposal."""
        return self._sessions.learns_early

    def learn_early(self, logits: NodeLogits) -> None:
        """Passes on the target's predictions to the sources that draft from the last ones."""
        self._sessions.learn(self._learnable(logits), early=True)

    def learn(
        self, plan: DraftPlan, emitted: TokenArray, logits: NodeLogits, early: bool | None = None
    ) -> None:
        """Passes on a step's result besides its tokens; now, or a step later.

        Args:
            plan: The step's drafts.
            emitted: int32, shape (m,). Tokens accepted in this step, the bonus token last.
            logits: The target's predictions, at nodes of the tree or elsewhere in the text.
            early: False after `learn_early`; None without it.
        """
        self._sessions.learn(self._learnable(logits), early)
        if plan.proposals:
            self._calibration.observe(plan.fused, plan.proposals, emitted[plan.ahead :])
        # Each tree at the size that is verified of it: as many tokens more as are due to the source.
        size = plan.tree.num_draft_tokens - plan.ahead
        for pacer, without, fused, nodes in plan.asked:
            tokens = emitted[plan.ahead : -1].tolist()
            before = _followed(without, tokens, size if nodes is None else nodes)
            pacer.added(_expected(without), _followed(fused, tokens, size) - before)

    @property
    def wants_hidden(self) -> bool:
        """True if a source drafts from the target's hidden states."""
        return self._sessions.wants_hidden

    def share_hidden(self, key: Hashable) -> None:
        """Sets the states that sources keep and find apart from those of requests with other keys."""
        self._sessions.share_hidden(key)

    def learn_hidden(self, hidden: Any, begin: int) -> None:
        """Passes on the target's states at the text's tokens from index `begin` on: (n, d).

        Those of a prompt come as its parts pass, those of a step with its tokens.
        """
        self._sessions.learn_hidden(hidden, begin)

    def wants_cache(self, captured: bool) -> bool:
        """True if a source drafts from the target's cache; `captured` as of `lend_cache`."""
        return self._sessions.wants_cache(captured)

    def lend_cache(self, cache: Any, captured: bool) -> None:
        """Lends sources the target's cache for the next proposal: the text but for its last token.

        Args:
            cache: The cache.
            captured: Whether captured passes use it.
        """
        # Not while sources have seen forced tokens beyond it.
        self._sessions.lend_cache(None if self._seen else cache, captured)

    def fork_hidden(self, other: DraftSession) -> None:
        """Takes over the states of a prompt that another request has passed; before `start`."""
        self._sessions.fork_hidden(other._sessions)

    def start(self, first: TokenArray, prompt: TokenArray, predictions: Predictions | None) -> None:
        """Passes on the first token and the target's predictions at the prompt's end.

        Args:
            first: int32, shape (1,). The token after the prompt.
            prompt: int32, shape (length,).
            predictions: At the last positions of the prompt; None if the sources have them already.
        """
        begin = time.perf_counter()
        self.observe(first)
        if predictions is not None:
            contexts = prompt_contexts(prompt, len(predictions.next_tokens))
            logits = NodeLogits(contexts, predictions.top_tokens, predictions.top_probs)
            self._sessions.learn(self._learnable(logits))
        self._stats.learn_seconds += time.perf_counter() - begin

    def _learnable(self, logits: NodeLogits) -> NodeLogits:
        """Leaves out positions at which excluded ids are among the predictions, or before them."""
        if not len(self._excluded):
            return logits
        kept = ~(
            np.isin(logits.top_tokens, self._excluded).any(-1)
            | np.isin(logits.contexts, self._excluded).any(-1)
        )
        return NodeLogits(logits.contexts[kept], logits.top_tokens[kept], logits.top_probs[kept])

    def close(self) -> None:
        """Ends the request in every source. Further calls do nothing."""
        sessions, self._sessions = self._sessions, SourceSessions()
        stats, proposals = self._stats, self._named
        count_names(proposals, self._drafted, stats.drafted_by_source, stats.drafted_by_level)
        count_names(proposals, self._accepted, stats.accepted_by_source, stats.accepted_by_level)
        self._named = ()
        sessions.close()


def _expected(tree: DraftTree) -> float:
    """Tokens of the best `_CHOICE_OF_PATHS` nodes that are accepted on average."""
    return float(tree.path_probs[1 : 1 + _CHOICE_OF_PATHS].sum())


def _likely_outcomes(tree: DraftTree, ahead: int) -> list[TokenArray]:
    """The paths that are likeliest to be accepted and to end there, int32 each, the likeliest first.

    Args:
        tree: The tree that is verified.
        ahead: Its first tokens, which the sources have seen.

    Example:
        tokens [8, 9, 4, 3], parents [-1, 0, 1, 0], path_probs [1, .8, .6, .05]: "9 4" .6, "9" .2, none .15
    """
    ends = tree.path_probs.copy()
    np.subtract.at(ends, tree.parents[1:], tree.path_probs[1:])
    outcomes = []
    for node in np.argsort(-ends, kind="stable")[:OUTCOMES].tolist():
        path: list[int] = []
        while node > 0:
            path.append(int(tree.tokens[node]))
            node = int(tree.parents[node])
        outcomes.append(np.array(path[::-1][ahead:], np.int32))
    return outcomes


def _followed(tree: DraftTree, tokens: Sequence[int], nodes: int) -> int:
    """Number of `tokens` that lie on a path of a tree's best `nodes` nodes."""
    node = 0
    for count, token in enumerate(tokens):
        end = nodes + 1
        below = np.flatnonzero((tree.parents[:end] == node) & (tree.tokens[:end] == token))
        if not len(below):
            return count
        node = int(below[0])
    return len(tokens)


def proposed_nodes(nodes: int, noisy: bool) -> int:
    """Nodes to request from each source for `nodes` verified ones: more where tokens are sampled."""
    return max(nodes, min(NOISY_CHOICE * nodes, MAX_CHOICE)) if noisy else nodes


def count_names(
    proposals: Sequence[Proposal],
    named: Mapping[int, int],
    by_source: Counter[str],
    by_level: Counter[str],
) -> None:
    """Counts nodes by the sources that named them, and by level; a node of two levels counts for both.

    Args:
        proposals: The step's proposals; bit s of a node means ``proposals[s]``.
        named: Number of nodes by their bits.
        by_source: Counts to add to.
        by_level: Counts to add to.
    """
    for bits, nodes in named.items():
        named_by = [proposal for bit, proposal in enumerate(proposals) if bits >> bit & 1]
        for proposal in named_by:
            by_source[proposal.source] += nodes
        for level in dict.fromkeys(proposal.level for proposal in named_by):
            by_level[level] += nodes


def prompt_contexts(prompt: TokenArray, count: int) -> NDArray[np.int32]:
    """Contexts of the last `count` positions: int32, shape (count, CONTEXT), -1 where there is no text.

    Example:
        prompt [5, 6, 7], count 2  ->  [[-1, -1, 5, 6], [-1, 5, 6, 7]]
    """
    head = np.full(CONTEXT - 1, -1, np.int32)
    windows = np.lib.stride_tricks.sliding_window_view(np.concatenate([head, prompt]), CONTEXT)
    last: NDArray[np.int32] = windows[len(windows) - count :].copy()  # writable, as kernels want it
    return last


def _usable(
    tree: DraftTree, max_depth: int, vocabulary: int, excluded: NDArray[np.int32] = _NONE
) -> DraftTree:
    """Leaves out nodes that are too deep to be emitted, that the model cannot embed, or that are excluded."""
    drafts_excluded = len(excluded) and np.isin(tree.tokens[1:], excluded).any()
    if _kernels.fits(tree.tokens, tree.depths, max_depth, vocabulary) and not drafts_excluded:
        return tree
    bad = (tree.depths > max_depth) | (tree.tokens >= vocabulary) | (tree.tokens < 0)
    bad |= np.isin(tree.tokens, excluded)
    bad[0] = False
    for node in range(1, len(tree)):
        bad[node] |= bad[tree.parents[node]]
    kept = np.flatnonzero(~bad)
    index = np.full(len(tree), -1, np.int32)
    index[kept] = np.arange(len(kept), dtype=np.int32)
    parents = tree.parents[kept]
    parents[1:] = index[parents[1:]]
    return DraftTree(
        tree.tokens[kept],
        parents,
        tree.depths[kept],
        tree.probs[kept],
        tree.path_probs[kept],
        tree.sources[kept],
    )
