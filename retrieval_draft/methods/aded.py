"""ADED (Adaptix): sentences from a tree search over a trigram matrix that is updated with the text.

"Adaptix", or "ADED" (2024, arXiv:2407.12021): a matrix of the 12 most probable third tokens of each pair,
made from a corpus; at each step the trigrams of the text's last 16 tokens gain 0.04, up to 3.0; 150 rounds of
a tree search over sentences of 4 tokens; the 24 most visited ones, each with its most probable fifth token,
are merged into at most 64 nodes.

Pairs are counted in the corpora and in the shared store when they are first needed, and again when these have
grown; without a corpus, the texts of earlier requests of this process come first. Not in the public material,
and chosen here: a round extends a sentence to its end at once and has the mean value of its tokens; the most
visited nodes are kept.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from retrieval_draft._forks import lock_for_moments
from retrieval_draft.index.segments.segment import Segment
from retrieval_draft.index.source import Proposal, TokenArray
from retrieval_draft.methods.datastore import Datastore, StoredSource
from retrieval_draft.methods.lookup import GuessTree, LookupSession
from retrieval_draft.methods.method import Method, MethodContext, as_proposed

__all__ = ["METHOD", "AdedSession", "TrigramMatrix"]

KEPT, GAIN, MAX_VALUE, WINDOW = 12, 0.04, 3.0, 16
ITERATIONS, LENGTH, SENTENCES, NODES = 150, 4, 24, 64
ROWS, ROW_BYTES = 1 << 16, 1000
"""Limit of kept pairs, and approximate bytes of one in CPython."""

GROWTH = 1.1
"""Growth of the texts from which on a pair that they hold is counted again; one that they did not hold is
counted after any change."""


class TrigramMatrix:
    """Values of third tokens by the two before. Safe for sessions in several threads.

    Args:
        segments: Texts to count trigrams in.
        rows: Limit of kept pairs; the least recently used ones are evicted.

    Example:
        remember 7 8 5, 7 8 9, 7 8 9: row(7, 8)  ->  9 .67, 5 .33; gain 7 8 5  ->  9 .67, 5 .37
    """

    def __init__(self, segments: Sequence[Segment] = (), rows: int = ROWS) -> None:
        self._segments, self._most = tuple(segments), rows
        self._size, self._change = _tokens_of(self._segments), 0
        self._rows: OrderedDict[tuple[int, int], dict[int, float]] = OrderedDict()
        self._seen, self._lock = dict[tuple[int, int], int](), lock_for_moments()
        self._counts: dict[tuple[int, int], _Count] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def renew(self, segments: Sequence[Segment]) -> None:
        """Takes other segments to count in, for all sessions."""
        with self._lock:
            if self._segments != (kept := tuple(segments)):
                self._segments, self._size = kept, _tokens_of(kept)
                self._change += 1

    def row(self, first: int, second: int) -> list[tuple[int, float]]:
        """The third tokens and their values, best first."""
        with self._lock:
            if not self._segments and (first, second) not in self._rows:
                return []
            return sorted(self._take((first, second)).items(), key=lambda entry: (-entry[1], entry[0]))

    def gain(self, text: Sequence[int]) -> None:
        """Raises the value of each trigram of `text`."""
        with self._lock:
            for first, second, third in zip(text, text[1:], text[2:], strict=False):
                _raise(self._take((first, second)), third, GAIN)

    def remember(self, text: Sequence[int]) -> None:
        """Moves rows towards a finished request's trigrams, a pair's n-th occurrence by 1/n."""
        with self._lock:
            for first, second, third in zip(text, text[1:], text[2:], strict=False):
                row = self._take(pair := (first, second), counted=False)
                self._counts.pop(pair, None)
                self._seen[pair] = seen = self._seen.get(pair, 0) + 1
                for token in row:
                    row[token] *= 1 - 1 / seen
                _raise(row, third, 1 / seen)

    def _take(self, pair: tuple[int, int], counted: bool = True) -> dict[int, float]:
        if pair not in self._rows:
            self._rows[pair] = {}
            if counted:
                self._counts[pair] = _Count(-1, 0, {})
            if len(self._rows) > self._most:
                oldest, _ = self._rows.popitem(last=False)
                self._seen.pop(oldest, None)
                self._counts.pop(oldest, None)
        self._rows.move_to_end(pair)
        count = self._counts.get(pair) if counted else None
        if count is not None and self._is_stale(count):
            self._recount(pair, count)
        return self._rows[pair]

    def _is_stale(self, count: _Count) -> bool:
        if count.change == self._change:
            return False
        return not count.shares or not count.size / GROWTH < self._size < count.size * GROWTH

    def _recount(self, pair: tuple[int, int], old: _Count) -> None:
        """Replaces the old shares by the present ones; what the row gained stays."""
        found: Counter[int] = Counter()
        for segment in self._segments:
            found.update(segment.followers(np.array(pair, np.int32), 1 << 16))
        total = found.total()
        shares = {token: count / total for token, count in found.most_common(KEPT)}
        row = Counter(self._rows[pair])
        row.subtract({token: share for token, share in old.shares.items() if token in row})
        row.update(shares)
        best = [(token, value) for token, value in row.most_common(KEPT) if value > _ROUNDING]
        self._rows[pair] = {token: min(MAX_VALUE, value) for token, value in best}
        self._counts[pair] = _Count(self._change, self._size, shares)


_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class _Count:
    """The shares that segments gave to a row: number of their change, their tokens, share of each token."""

    change: int
    size: int
    shares: dict[int, float]


def _tokens_of(segments: Sequence[Segment]) -> int:
    return sum(segment.num_tokens for segment in segments)


def _raise(row: dict[int, float], token: int, by: float) -> None:
    if token not in row and len(row) == KEPT:
        del row[min(row, key=lambda other: row[other])]
    row[token] = min(MAX_VALUE, row.get(token, 0.0) + by)


class _Node:
    """A sentence's beginning: its next tokens, and the number of visits of each."""

    def __init__(self, options: Sequence[tuple[int, float]]) -> None:
        self.options, self.below = options, dict[int, _Node]()
        self.visits, self.wins = [0] * len(options), [0.0] * len(options)

    def choose(self) -> int:
        """The next token with the best W/N + (32 + ln((N_parent + 9)/8)) * P * sqrt(N_parent)/(1 + N)."""
        visited = sum(self.visits)
        scale = (32 + math.log((visited + 9) / 8)) * math.sqrt(visited)
        best, choice = -1.0, 0
        for way, ((_, value), visits, wins) in enumerate(zip(self.options, self.visits, self.wins)):  # noqa: B905
            score = scale * value / (1 + visits) + (wins / visits if visits else 0.0)
            if score > best:
                best, choice = score, way
        return choice


class AdedSession(LookupSession):
    """A request's text beside the shared matrix.

    Args:
        matrix: Shared by all requests.
        prompt: int32, shape (length,).
        references: Texts of this request only, whose trigrams take precedence.
        keeps: Whether the matrix learns the request's text at its end.

    Example:
        rows "7 8": 9 .75, 5 .25; "8 9": 1; "8 5": 2; "9 1": 3, text .. 7 8
        ->  sentences 9 1 3 and 5 2, of which 9 1 3 has more visits: tokens [9, 1, 3, 5, 2]
    """

    def __init__(
        self,
        matrix: TrigramMatrix,
        prompt: TokenArray,
        references: Sequence[TokenArray] = (),
        keeps: bool = True,
    ) -> None:
        super().__init__(prompt)
        self._keeps = keeps
        self._matrix = matrix
        self._quoted = TrigramMatrix()
        for text in references:
            self._quoted.remember(text.tolist())

    def propose(self, budget: int) -> Proposal:
        """The most visited sentences, the most visited nodes first; chances are shares of visits."""
        visits: Counter[tuple[int, ...]] = Counter()
        for sentence, times in self._search().most_common(SENTENCES):
            longer = (*sentence, *(token for token, _ in self._row(sentence)[:1]))
            visits.update({longer[:size]: times for size in range(len(longer) + 1)})
        tree = GuessTree("aded")
        nodes: dict[tuple[int, ...], int] = {(): -1}
        for path in sorted(visits, key=lambda path: (-visits[path], len(path)))[1:]:
            nodes[path] = tree.add(nodes[path[:-1]], path[-1], visits[path] / visits[path[:-1]], 2)
        return tree.proposal(min(budget, NODES))

    def observe(self, tokens: TokenArray) -> None:
        """Appends accepted tokens, int32, shape (m,); the trigrams of the last 16 tokens gain."""
        super().observe(tokens)
        self._matrix.gain(self.text[-WINDOW:])

    def close(self) -> None:
        """Adds the text to the matrix for later requests, if it is to be kept."""
        if self._keeps:
            self._matrix.remember(self.text)

    def _row(self, sentence: tuple[int, ...]) -> list[tuple[int, float]]:
        pair = [*self.text[-2:], *sentence][-2:]
        return (self._quoted.row(*pair) or self._matrix.row(*pair)) if len(pair) == 2 else []

    def _search(self) -> Counter[tuple[int, ...]]:
        """Sentences with their visits."""
        found: Counter[tuple[int, ...]] = Counter()
        root = _Node(self._row(()))
        for _ in range(ITERATIONS if root.options else 0):
            sentence: tuple[int, ...] = ()
            path: list[tuple[_Node, int]] = []
            node, total = root, 0.0
            while node.options and len(path) < LENGTH:
                way = node.choose()
                path.append((node, way))
                token, value = node.options[way]
                sentence, total = (*sentence, token), total + value
                if way not in node.below:
                    node.below[way] = _Node(self._row(sentence) if len(path) < LENGTH else [])
                node = node.below[way]
            for node, way in path:
                node.visits[way] += 1
                node.wins[way] += total / len(path)
            found[sentence] += 1
        return found


def _sources(parts: MethodContext) -> Sequence[StoredSource]:
    store, matrix = Datastore(parts, earlier=False), TrigramMatrix()

    def opened(prompt: TokenArray, references: Sequence[TokenArray]) -> AdedSession:
        matrix.renew(store.open())
        return AdedSession(matrix, prompt, references, keeps=not store.corpora)

    return [StoredSource("aded", store, opened, lambda: len(matrix) * ROW_BYTES)]


METHOD = Method(
    name="aded",
    paper="ADED 2024, arXiv:2407.12021",
    sources=_sources,
    tree=as_proposed,
    nodes=NODES,
)
