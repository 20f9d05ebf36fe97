"""SuffixDecoding: a tree of the continuations of the text's end, as large as the match is long.

Oliaro et al. (2024), "SuffixDecoding: Extreme Speculative Decoding for Emerging AI Applications"
(arXiv:2411.04975), as in Arctic Inference: for every suffix of the text that is in a tree of suffixes, of m
tokens, the min(budget, m) best nodes after it, grown best first on the product of count ratios while that is
0.1 or more; of all suffixes the one with the largest sum of products, the longer in a tie. One tree holds the
request's prompt and output, one the outputs of earlier requests; the better of them, the request's in a tie.
Match and draft have 64 tokens together at most. The text's own end counts as an occurrence, as published, so
k occurrences have a ratio of k / (k + 1) in the request's tree.

The engine plug-in verifies paths of 16 tokens; for trees only the depth is given: 64 nodes here.

Differences: automata instead of trees. Suffixes that occur at the same positions have the same tree after
them and are tried once, at the greatest length that leaves room for a chain. The ends of earlier outputs,
which no token followed, do not count. Replies of other servers, corpora, and the history of a folder are
looked up as well: the tree after the longest suffix that they have, of 32 tokens at most. Beyond 10,000
outputs or `history_bytes` the oldest quarter is removed at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from heapq import heappop, heappush
from operator import itemgetter

import numpy as np

from retrieval_draft._forks import lock_for_moments
from retrieval_draft.index.segments.segment_session import Segments
from retrieval_draft.index.source import Proposal, TokenArray
from retrieval_draft.index.suffix_automaton import SuffixAutomaton
from retrieval_draft.methods.datastore import Datastore, StoredSource
from retrieval_draft.methods.lookup import GuessTree, LookupSession, after_references
from retrieval_draft.methods.method import Method, MethodContext, as_proposed
from retrieval_draft.methods.rest import TextEnd
from retrieval_draft.methods.sam_decoding import best_first

__all__ = ["METHOD", "Replies", "SuffixDecodingSession", "suffix_tree"]

DEPTH = 64
MIN_PROB = 0.1
MAX_REPLIES = 10_000
NAME = "suffix_decoding"

Scored = tuple[GuessTree, float]


def suffix_tree(automaton: SuffixAutomaton, end: Sequence[int], budget: int, level: str) -> Scored:
    """The best tree after a suffix of `end`, and its score: the tokens it expects to be accepted.

    Args:
        automaton: Of the texts to look up in.
        end: At most DEPTH - 1 tokens. With level "request" the automaton's text ends so.
        budget: The most nodes.
        level: "request" or "history".

    Example:
        end 7 8 of the text 7 8 9 5 7 8  ->  9 with 1/2, 5 below it with 1: 1/2 + 1/2 is a score of 1
    """
    best, best_score = GuessTree(NAME, level), 0.0
    for state, low, high in _matches(automaton, end):
        if best_score >= min(budget, high):
            break  # shorter suffixes have smaller trees, and no product is more than 1
        length = min(high, max(low, DEPTH - budget, DEPTH // 2))
        tree, score = _grow(automaton, state, length, min(budget, length), level)
        if score > best_score:
            best, best_score = tree, score
    return best, best_score


def _matches(automaton: SuffixAutomaton, end: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """The states that suffixes of `end` lead to, longest first, each with its shortest and longest suffix."""
    from retrieval_draft.index._kernels import automaton as kernels

    states, edges, table = automaton._states, automaton._edges, automaton._table
    state, length = 0, 0
    for token in end:
        edge = kernels.find_edge(states, edges, table, state, token)
        while edge < 0 and state:
            state = int(states[state, kernels.LINK])
            length = int(states[state, kernels.LENGTH])
            edge = kernels.find_edge(states, edges, table, state, token)
        if edge >= 0:
            state, length = int(edges[edge, kernels.TARGET]), length + 1
    while state:
        link = int(states[state, kernels.LINK])
        shorter = int(states[link, kernels.LENGTH])
        yield state, shorter + 1, length
        state, length = link, shorter


def _grow(automaton: SuffixAutomaton, state: int, length: int, size: int, level: str) -> Scored:
    """The `size` most probable nodes after a suffix of `length` tokens, and the sum of their products."""
    from retrieval_draft.index._kernels import automaton as kernels

    states, edges = automaton._states, automaton._edges
    tree, score = GuessTree(NAME, level), 0.0
    heap: list[tuple[float, int, int, int, int, int, int, float]] = []
    node, depth, path, order = -1, 0, 1.0, 0
    total = int(states[state, kernels.COUNT]) + (level == "request")
    while True:
        left = int(states[state, kernels.COUNT]) if depth < DEPTH - length else 0
        edge = int(states[state, kernels.FIRST_EDGE])
        while edge >= 0 and path * left / total >= MIN_PROB:  # else the rest is too rare
            _, token, target, edge, _, taken = edges[edge].tolist()
            left -= taken
            share = taken / total
            if path * share >= MIN_PROB:
                order += 1
                heappush(heap, (-path * share, order, node, depth + 1, token, target, taken, share))
        if not heap or len(tree) == size:
            return tree, score
        negative, _, parent, depth, token, state, total, share = heappop(heap)
        path, score = -negative, score - negative
        node = tree.add(parent, token, share, length)


class Replies:
    """Outputs of earlier requests, `most_bytes` of them. Safe for sessions in several threads.

    Example:
        add 8 9 4; behind([7, 8], 60)  ->  the match "8" has one token, so 9 alone: score 1
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._texts: deque[TokenArray] = deque()
        self._automaton = SuffixAutomaton()
        self._writing = lock_for_moments()
        self._reading = lock_for_moments()

    @property
    def nbytes(self) -> int:
        """Bytes of the automaton and the outputs."""
        return self._automaton.nbytes + 4 * len(self._automaton)

    def add(self, text: TokenArray) -> None:
        """Adds an output, int32, shape (n,); removes the oldest quarter if they are too many or too large."""
        with self._writing:
            self._texts.append(text)
            with self._reading:
                self._automaton.insert(text)
                self._automaton.end_text()
            while self._texts and (len(self._texts) > MAX_REPLIES or self.nbytes > self._most_bytes):
                for _ in range(-(-len(self._texts) // 4)):
                    self._texts.popleft()
                made = SuffixAutomaton(sum(len(kept) + 1 for kept in self._texts))
                for kept in self._texts:
                    made.insert(kept)
                    made.end_text()
                with self._reading:
                    self._automaton = made

    def behind(self, end: Sequence[int], budget: int) -> Scored:
        """The best tree after a suffix of `end`, and its score."""
        with self._reading:
            return suffix_tree(self._automaton, end, budget, "history")


class SuffixDecodingSession(LookupSession):
    """A request's automaton beside `replies`, which all requests share, and stored texts.

    Args:
        replies: Outputs of earlier requests.
        prompt: int32, shape (length,).
        segments: Of the stored texts; may be none.
        level: Their locality.

    Example:
        text 7 8 9 4 7 8, no earlier outputs: two nodes after "7 8", 9 and 4  ->  parents [-1, 0]
    """

    def __init__(
        self, replies: Replies, prompt: TokenArray, segments: Segments = (), level: str = "corpus"
    ) -> None:
        super().__init__(prompt)
        self._replies = replies
        self._prompted = len(prompt)
        self._automaton = SuffixAutomaton(len(prompt) + 256)
        self._automaton.insert(prompt)
        self._stored = TextEnd(segments, prompt)
        self._level = level

    def propose(self, budget: int) -> Proposal:
        """The best of the request's tree, that of earlier outputs and that of stored texts."""
        end = self.text[1 - DEPTH :]
        own = suffix_tree(self._automaton, end, budget, "request")
        best, _ = max(own, self._replies.behind(end, budget), self._behind(budget), key=itemgetter(1))
        return best.proposal(budget)

    def observe(self, tokens: TokenArray) -> None:
        """Appends accepted tokens, int32, shape (m,)."""
        super().observe(tokens)
        self._automaton.insert(tokens)
        self._stored.observe(tokens)

    def close(self) -> None:
        """Adds the output for later requests."""
        self._replies.add(np.array(self.text[self._prompted :], np.int32))

    def _behind(self, budget: int) -> Scored:
        tree = GuessTree(NAME, self._level)
        for span in range(max(self._stored.length, 4), 0, -1):  # lengths below 4 are not told
            positions = self._stored.behind(span)
            if positions:
                return tree, best_first(tree, positions, min(budget, span), span, MIN_PROB)
        return tree, 0.0


def _sources(parts: MethodContext) -> Sequence[StoredSource]:
    replies = Replies(parts.config.history_bytes if parts.config.history_replies else 0)
    store = Datastore(parts, earlier=parts.config.history_folder is not None)

    def opened(prompt: TokenArray, references: Sequence[TokenArray]) -> SuffixDecodingSession:
        text = after_references(prompt, references)
        return SuffixDecodingSession(replies, text, store.open(), store.level)

    return [StoredSource(NAME, store, opened, lambda: replies.nbytes)]


METHOD = Method(
    name=NAME,
    paper="Oliaro et al. 2024, arXiv:2411.04975",
    sources=_sources,
    tree=as_proposed,
    nodes=DEPTH,
)
