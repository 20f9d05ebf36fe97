"""SAM-Decoding: a chain from the request's text, or a tree from a corpus; with a draft model beside it.

Hu et al. (2024), "SAM Decoding: Speculative Decoding via Suffix Automaton" (arXiv:2411.10666), the released
`samd_sam_only`: the longest suffix of the text that occurred in it before, against the longest that occurs in
the corpora less 5 tokens; ties to the text. A match of m tokens drafts min(60, 1 + 4 m). From the text one
chain, from the position after the oldest occurrence; from the corpora a tree grown best first on the product
of count ratios, at most 8 children a node. There is no minimum length and no other drafter: one token is
enough, and without a match there is no draft.

With a draft model or a trained head (SAM-Decoding[EAGLE-2] and its kin): where the longest suffix of the
text that occurred before has 5 tokens or more, one chain of the 40 tokens after its oldest occurrence; else
the model's tree. Never both. A match in the corpora counts 5 tokens less.

Differences: missing tokens are not padded with zeros; a match stops at the end of a document and is at most
32 tokens in a corpus, where at most 5000 occurrences are read; equal counts are in the order of token ids.
Earlier requests and the store of other servers are looked up with the corpora.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush

import numpy as np

from retrieval_draft.drafting.hierarchy import OuterSession
from retrieval_draft.engine.draft_models.expansion import ExpansionLimits
from retrieval_draft.index.segments.segment_session import Segments
from retrieval_draft.index.source import NodeLogits, Proposal, SourceSession, TokenArray
from retrieval_draft.index.suffix_automaton import SuffixAutomaton
from retrieval_draft.methods.datastore import Datastore, StoredSource
from retrieval_draft.methods.drafted import drafter
from retrieval_draft.methods.lookup import GuessTree, LookupSession, after_references
from retrieval_draft.methods.method import Method, MethodContext, as_proposed
from retrieval_draft.methods.rest import Positions, TextEnd

__all__ = ["BIAS", "METHOD", "SamBesideSession", "SamDecodingSession", "best_first"]

NAME = "sam_decoding"
MOST = 60
PER_TOKEN = 4
CHILDREN = 8
BIAS = 5
"""Tokens by which a match in a corpus must be longer to have the same weight."""

LONG = 5
COPIED = 40
LIMITS = ExpansionLimits(top_k=10, depth=6, entropy_stop=None)
"""Of a draft model's tree: EAGLE-2's."""


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


class SamBesideSession(OuterSession):
    """A request's automaton and text beside another drafter, which drafts where no long match is.

    Args:
        name: The method's.
        other: The other drafter's session of the request.
        segments: Of the static texts; may be none.
        prompt: int32, shape (length,).
        level: Locality of the static texts.

    Example:
        text 1 2 3 4 5 8 9 1 2 3 4 5: the last five occurred at the start  ->  chain 8 9 1 2 3 4 5;
        text 8 2 3 4 5 8 9 1 2 3 4 5: only four did  ->  the other's
    """

    def __init__(
        self, name: str, other: SourceSession, segments: Segments, prompt: TokenArray, level: str = "corpus"
    ) -> None:
        self._name, self._other = name, other
        self.inner = (other,)
        self._static = TextEnd(segments, prompt)
        self._level = level
        self._automaton = SuffixAutomaton(len(prompt) + 256)
        self._bytes = bytearray()
        self._append(prompt)

    def propose(self, budget: int) -> Proposal:
        """The chain after a long match, or the other drafter's guesses."""
        length, static = self._automaton.match_length, self._static.length
        level, copied = self._level, []
        if static - BIAS > max(length, LONG - 1):
            copied = self._static.oldest(static, COPIED)
        if not copied and length < LONG:
            return self._other.propose(budget)
        if not copied:
            end, level, static = self._first_end(length), "request", length
            copied = np.frombuffer(bytes(self._bytes[4 * end : 4 * (end + COPIED)]), np.int32).tolist()
        tree = GuessTree(self._name, level)
        tree.add_path(copied, match_length=static)
        return tree.proposal(budget)

    def observe(self, tokens: TokenArray) -> None:
        """Appends accepted tokens, int32, shape (m,)."""
        self._static.observe(tokens)
        self._other.observe(tokens)
        self._append(tokens)

    def _append(self, tokens: TokenArray) -> None:
        if len(tokens):
            self._automaton.insert(tokens)
            self._bytes += np.asarray(tokens, np.int32).tobytes()

    def learn(self, logits: NodeLogits) -> None:
        """Lets the other drafter learn."""
        self._other.learn(logits)

    def close(self) -> None:
        """Ends the request in the other drafter."""
        self._other.close()

    def _first_end(self, length: int) -> int:
        """End of the oldest occurrence of the last `length` tokens."""
        suffix = self._bytes[-4 * length :]
        found = self._bytes.find(suffix)
        while found % 4:  # bytes of two neighbours that look like the token
            found = self._bytes.find(suffix, found + 1)
        return found // 4 + length


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
    if parts.models:
        model = drafter(parts, NAME)

        def beside(prompt: TokenArray, references: Sequence[TokenArray]) -> SamBesideSession:
            text = after_references(prompt, references)
            return SamBesideSession(NAME, model.session(prompt, LIMITS, 1), store.open(), text, store.level)

        return [StoredSource(NAME, store, beside)]

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
