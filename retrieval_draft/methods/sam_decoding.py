"""SAM-Decoding by retrieval alone: a chain from the request's text, or a tree from a corpus.

Hu et al. (2024), "SAM Decoding: Speculative Decoding via Suffix Automaton" (arXiv:2411.10666), the released
`samd_sam_only`: the longest suffix of the text that occurred in it before, against the longest that occurs in
the corpora less 5 tokens; ties to the text. A match of m tokens drafts min(60, 1 + 4 m). From the text one
chain, from the position after the oldest occurrence; from the corpora a tree grown best first on the product
of count ratios, at most 8 children a node. There is no minimum length and no other drafter: one token is
enough, and without a match there is no draft.

Differences: missing tokens are not padded with zeros; a match stops at the end of a document and is at most
32 tokens in a corpus, where at most 5000 occurrences are read; equal counts are in the order of token ids.
Earlier requests and the store of other servers are looked up with the corpora.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush

import numpy as np

from retrieval_draft.index.segments.segment_session import Segments
from retrieval_draft.index.source import Proposal, TokenArray
from retrieval_draft.index.suffix_automaton import SuffixAutomaton
from retrieval_draft.methods.datastore import Datastore, StoredSource
from retrieval_draft.methods.lookup import GuessTree, LookupSession, after_references
from retrieval_draft.methods.method import Method, MethodContext, as_proposed
from retrieval_draft.methods.rest import Positions, TextEnd

__all__ = ["BIAS", "METHOD", "SamDecodingSession", "best_first"]

NAME = "sam_decoding"
MOST = 60
PER_TOKEN = 4
CHILDREN = 8
BIAS = 5
"""Tokens by which a match in a corpus must be longer to have the same weight."""


class SamDecodingSession(LookupSession):
    """A request's automaton and text, and the occurrences of its end in the corpora.

    Args:
        segments: Of corpora and other stores; may be none.
        prompt: int32, shape (length,).
        level: Their locality.

    Example:
        text 7 8 9 4 7 8 5 7 8: "7 8" first occurred at the start  ->  chain 9 4 7 8 5 7 8
    """

    def __init__(self, segments: Segments, prompt: TokenArray, level: str = "corpus") -> None:
        super().__init__(prompt[:0])
        self._level = level
        self._automaton = SuffixAutomaton(len(prompt) + 256)
        self._automaton.insert(prompt)
        self._bytes = bytearray(np.asarray(prompt, np.int32).tobytes())
        self._corpora = TextEnd(segments, prompt)
        self._looked, self._length, self._end = 0, 0, 0

    def propose(self, budget: int) -> Proposal:
        """The chain, or the tree."""
        dynamic, static = self._automaton.match_length, self._corpora.length - BIAS
        if static > dynamic:
            tree = GuessTree(NAME, self._level)
            best_first(tree, self._corpora.behind(static + BIAS), _size(static), static + BIAS)
            return tree.proposal(budget)
        tree = GuessTree(NAME)
        if dynamic:
            end = self._oldest_end(dynamic)
            copied = np.frombuffer(bytes(self._bytes[4 * end : 4 * (end + _size(dynamic))]), np.int32)
            tree.add_path(copied.tolist(), match_length=dynamic)
        return tree.proposal(budget)

    def observe(self, tokens: TokenArray) -> None:
        """Appends accepted tokens, int32, shape (m,)."""
        self._automaton.insert(tokens)
        self._corpora.observe(tokens)
        self._bytes += np.asarray(tokens, np.int32).tobytes()

    def _oldest_end(self, length: int) -> int:
        """End of the oldest occurrence of the last `length` tokens."""
        # Of the first `_looked` tokens the last `_length` first ended at `_end`. Mostly the text has
        # continued as it did then, so it is not searched again.
        text, grown = self._bytes, len(self._bytes) // 4 - self._looked
        went_on = text[4 * self._end : 4 * (self._end + grown)] == text[4 * self._looked :]
        if went_on and length == self._length + grown:
            self._end += grown
        else:
            suffix = text[-4 * length :]
            found = text.find(suffix)
            while found % 4:  # bytes of two neighbours that look like the token
                found = text.find(suffix, found + 1)
            self._end = found // 4 + length
        self._length, self._looked = length, self._looked + grown
        return self._end


def _size(match: int) -> int:
    return min(MOST, 1 + match * PER_TOKEN)


def best_first(tree: GuessTree, positions: Positions, size: int, match: int, least: float = 0.0) -> float:
    """Adds the `size` most probable nodes by the counts of the texts at `positions`.

    Args:
        tree: Gets the nodes; empty.
        positions: Those after the match.
        size: The most nodes.
        match: Tokens of the match.
        least: Path probability of a node at least.

    Returns:
        The sum of their path probabilities.

    Example:
        positions before 9 4, 9 4 and 9 3, size 2  ->  9 (3 of 3), 9 4 (2 of 3): 1.67
    """
    heap: list[
        tuple[float, int, int, int, float, Positions]
    ] = []  # path, order, parent, token, share, positions
    node, path, order, total = -1, 1.0, 0, 0.0
    while True:
        here = sum(len(found) for _, found in positions)
        for token, count, behind in _children(positions):
            order += 1
            if path * count / here >= least:
                heappush(heap, (-path * count / here, order, node, token, count / here, behind))
        if not heap or len(tree) == size:
            return total
        negative, _, parent, token, share, positions = heappop(heap)
        node, path, total = tree.add(parent, token, share, match), -negative, total - negative


def _children(positions: Positions) -> list[tuple[int, int, Positions]]:
    """The CHILDREN most frequent tokens at `positions`: token, count, the positions after it."""
    counts: dict[int, int] = {}
    behind: dict[int, Positions] = {}
    for segment, found in positions:
        tokens = segment.tokens[found]
        order = np.argsort(tokens, kind="stable")
        cuts = np.flatnonzero(np.diff(tokens[order])) + 1
        for group in np.split(order, cuts):
            token = int(tokens[group[0]])
            if token != segment.separator:
                counts[token] = counts.get(token, 0) + len(group)
                behind.setdefault(token, []).append((segment, found[group] + 1))
    best = sorted(counts, key=lambda token: (-counts[token], token))[:CHILDREN]
    return [(token, counts[token], behind[token]) for token in best]


def _sources(parts: MethodContext) -> Sequence[StoredSource]:
    store = Datastore(parts)

    def opened(prompt: TokenArray, references: Sequence[TokenArray]) -> SamDecodingSession:
        return SamDecodingSession(store.open(), after_references(prompt, references), store.level)

    return [StoredSource(NAME, store, opened)]


METHOD = Method(
    name=NAME,
    paper="Hu et al. 2024, arXiv:2411.10666",
    sources=_sources,
    tree=as_proposed,
    nodes=MOST,
)
