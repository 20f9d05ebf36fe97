"""REST: continuations of the text's end in a datastore, counted and verified as one tree.

He et al. (2024), "REST: Retrieval-Based Speculative Decoding" (NAACL 2024): of the last 16, 15, .. 2 tokens,
the first that occur in the datastore; the next 10 tokens of at most 5000 occurrences, in the order of the
suffix array; of all their prefixes the 64 most frequent. The released code then drops the longest prefixes
until the lengths of those left add up to 64, although they share nodes. The same is done here: about 20 are
left.

Differences: drafts stop at the end of a document; of equal counts the shorter prefix is first, then that
first in the suffix array (theirs is random); segments are read one after the other up to 5000 occurrences.
The datastore is all that there is: reference texts, corpora, replies of other servers, earlier requests.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from retrieval_draft.index.segments.segment import Segment, match_state
from retrieval_draft.index.segments.segment_session import Segments
from retrieval_draft.index.source import Proposal, TokenArray
from retrieval_draft.methods.datastore import Datastore, StoredSource
from retrieval_draft.methods.lookup import GuessTree, LookupSession
from retrieval_draft.methods.method import Method, MethodContext, as_proposed

__all__ = ["METHOD", "RestSession", "TextEnd", "common_prefixes"]

LONGEST, SHORTEST, COPIED = 16, 2, 10
MAX_MATCHES = 5000
CHOICES = 64

Positions = list[tuple[Segment, NDArray[np.int64]]]
"""For each segment, positions in its tokens."""
Counted = tuple[tuple[int, ...], int]


class TextEnd:
    """Occurrences of the end of a growing text, which begins with `prompt`, in segments.

    Example:
        one segment with the text 7 8 9 4, prompt 5 7 8: behind(2) -> position 2, that of 9
    """

    def __init__(self, segments: Segments, prompt: TokenArray) -> None:
        from retrieval_draft.index._kernels import segment_match

        self._kernels = segment_match
        self._segments = segments
        self._rows: NDArray[np.int64] = np.array([part.row for part in segments], np.int64)
        self._chain, self._longest, self._tail = match_state(len(segments))
        if segments:
            self.observe(prompt[-segment_match.LONGEST :])

    @property
    def length(self) -> int:
        """Tokens of the text's end that occur, up to 32. Fewer than a sort key's (4 at most) count as 0."""
        return int(self._longest.max(initial=0))

    def observe(self, tokens: TokenArray) -> None:
        """Appends accepted tokens, int32, shape (m,)."""
        if self._segments:
            tokens = np.array(tokens, np.int32)
            self._kernels.advance(self._rows, self._chain, self._longest, self._tail, tokens)

    def behind(self, length: int, most: int = MAX_MATCHES) -> Positions:
        """The positions after at most `most` occurrences of the last `length` tokens (1 to 32)."""
        kernels, found = self._kernels, []
        for number, segment in enumerate(self._segments):
            count = kernels.occurrences(self._rows, number, self._chain, self._longest, self._tail, length)
            if not count or not most:
                continue
            first, last = self._chain[number, length].tolist()
            if last == kernels.SINGLE:
                starts = np.array([first], np.int64)
            else:
                starts = segment.suffixes[first : min(last, first + most)].astype(np.int64)
            most -= len(starts)
            # Altered files may hold any position; the last token is a separator.
            found.append((segment, np.clip(starts + length, 0, len(segment.tokens) - 1)))
        return found

    def oldest(self, length: int, most: int) -> list[int]:
        """At most `most` tokens after the oldest occurrence of the last `length`, in the first segment."""
        (segment, starts), *_ = self.behind(length)
        copied: list[int] = segment.tokens[starts.min() : starts.min() + most].tolist()
        return copied[: copied.index(segment.separator)] if segment.separator in copied else copied


def common_prefixes(positions: Positions, copied: int, number: int, shortest: int = 1) -> list[Counted]:
    """The `number` most frequent prefixes of `shortest` to `copied` tokens at `positions`, with their counts.

    Example:
        positions before 9 4 and before 9 3, copied 2, number 2  ->  (9): 2, (9 3): 1
    """
    if not positions:
        return []
    parts = []
    for segment, starts in positions:
        spread = np.minimum(starts[:, None] + np.arange(copied), len(segment.tokens) - 1)
        part = segment.tokens[spread].astype(np.int32)
        part[np.logical_or.accumulate(part == segment.separator, axis=1)] = -1
        parts.append(part)
    rows = np.concatenate(parts)
    if len(parts) > 1:  # those of one segment are in order already
        keys = np.ascontiguousarray((rows + 1).astype(">u4")).view(f"S{4 * copied}")[:, 0]
        rows = rows[np.argsort(keys, kind="stable")]
    changes = np.logical_or.accumulate(rows[1:] != rows[:-1], axis=1)
    counts, depths, firsts = [], [], []
    for depth in range(shortest, copied + 1):
        begins = np.concatenate(([0], np.flatnonzero(changes[:, depth - 1]) + 1))
        whole = rows[begins, depth - 1] >= 0
        counts.append(np.diff(begins, append=len(rows))[whole].astype(np.int16))
        firsts.append(begins[whole])
        depths.append(np.full(len(firsts[-1]), depth))
    # int16 arrays are sorted by radix.
    best = np.argsort(-np.concatenate(counts), kind="stable")[:number]
    chosen = (np.concatenate(part)[best].tolist() for part in (firsts, depths, counts))
    return [(tuple(rows[first, :depth].tolist()), count) for first, depth, count in zip(*chosen, strict=True)]


class RestSession(LookupSession):
    """Occurrences of one request's text end in the datastore.

    Args:
        segments: The datastore for this request.
        prompt: int32, shape (length,).
        level: Locality of the datastore.

    Example:
        datastore 7 8 9 4 and 7 8 9 3, prompt 1 7 8  ->  tokens [9, 3, 4], parents [-1, 0, 0]
    """

    def __init__(self, segments: Segments, prompt: TokenArray, level: str = "corpus") -> None:
        super().__init__(prompt[:0])
        self._end = TextEnd(segments, prompt)
        self._level = level

    def propose(self, budget: int) -> Proposal:
        """The most frequent prefixes of the continuations."""
        tree = GuessTree("rest", self._level)
        for span in range(min(LONGEST, max(self._end.length, 4)), SHORTEST - 1, -1):
            positions = self._end.behind(span)
            kept = _cut(common_prefixes(positions, COPIED, CHOICES))
            matches = sum(len(starts) for _, starts in positions)
            for prefix, count in kept.items():
                tree.add_path(prefix, prob=count / kept.get(prefix[:-1], matches), match_length=span)
            if kept:
                break
        return tree.proposal(budget)

    def observe(self, tokens: TokenArray) -> None:
        """Appends accepted tokens, int32, shape (m,)."""
        self._end.observe(tokens)


def _cut(prefixes: list[Counted]) -> dict[tuple[int, ...], int]:
    """Drops the longest prefixes, rarer ones first, until the lengths add up to CHOICES or less."""
    kept = dict(prefixes)
    longest = sorted(kept, key=len)  # of equal lengths the rarest last
    while sum(map(len, kept)) > CHOICES:
        del kept[longest.pop()]
    return kept


def _sources(parts: MethodContext) -> Sequence[StoredSource]:
    store = Datastore(parts)

    def opened(prompt: TokenArray, references: Sequence[TokenArray]) -> RestSession:
        return RestSession(store.open(references), prompt, store.level)

    return [StoredSource("rest", store, opened, level=store.level)]


METHOD = Method(
    name="rest",
    paper="He et al. 2024, arXiv:2311.08252",
    sources=_sources,
    tree=as_proposed,
    nodes=CHOICES,
)
