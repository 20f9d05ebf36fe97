"""SSSD: continuations from the request's own n-grams and from a datastore, weighed against each other.

Marzollo et al. (2024), "SSSD: Simply-Scalable Speculative Decoding" (arXiv:2411.05894), as its authors
describe and configure it: of the last 4, 3, .. tokens, the first that occur in prompt and output, and the
first that occur in the datastore; of the datastore's occurrences 100 at equal distances. Branches have up to
10 tokens, fewer in a small tree. Both are counted, the request's counts are toned down, as few occurrences
are too sure of themselves, and the most probable nodes of the weighted sum are one tree. Finished requests
join the datastore, which is live.

A draft is as long as the hardware computes at no more than the cost of reading its weights, the knee of its
roofline (`RooflineCost`), or `DraftConfig.nodes`.

Differences: their weights come from a search over a grid that is not public; these are from such a search,
`scripts/fit_sssd.py`, on chat replies of SmolLM2 135M alone. The request's shorter ends are looked up as
theirs are, the datastore's too. Finished requests can be looked up at once, not after 20 minutes, and whole,
not from the last 3 tokens of their prompt on; so can those of other servers. The knee is that of the measured
passes, not of two kernels, and is not rounded to a multiple of 16.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from retrieval_draft.drafting.roofline import RooflineCost
from retrieval_draft.index.segments.segment_session import Segments
from retrieval_draft.index.source import Proposal, TokenArray
from retrieval_draft.methods.datastore import Datastore, StoredSource
from retrieval_draft.methods.lookup import GuessTree, LookupSession, after_references
from retrieval_draft.methods.method import Method, MethodContext, as_proposed
from retrieval_draft.methods.rest import TextEnd

__all__ = ["METHOD", "SssdSession"]

NAME = "sssd"
LONGEST = 4
SEARCHED = 100
BRANCHES = ((5, 4), (8, 5), (32, 6), (48, 8))
"""Tokens of a branch by the nodes of a tree, the root counted; LONGEST_BRANCH in larger ones."""

LONGEST_BRANCH = 10
BACKOFF = 1.0
"""Occurrences without a continuation that the request's counts are toned down by."""

OWN = 0.8
"""Weight of the request where the datastore has a match too."""

SHORTER = 0.1
"""Weight that each shorter end of the text has of what longer ones leave."""

Path = tuple[int, ...]
Shares = dict[Path, float]


class SssdSession(LookupSession):
    """One request's text with the ends of its n-grams, beside the datastore.

    Args:
        segments: The datastore for this request.
        prompt: int32, shape (length,).
        level: Locality of the datastore.

    Example:
        text 7 8 9 7 8, datastore 7 8 5: 9 has .8 / 2 and 5 has .2  ->  tokens [9, 5, 7, ..]
    """

    def __init__(self, segments: Segments, prompt: TokenArray, level: str = "corpus") -> None:
        super().__init__(prompt)
        self._end = TextEnd(segments, prompt)
        self._level = level
        self._ends: dict[Path, list[int]] = {}
        self._indexed = 0

    def propose(self, budget: int) -> Proposal:
        """The most probable nodes of both."""
        self._index()
        branch = next((size for most, size in BRANCHES if budget < most), LONGEST_BRANCH)
        own, stored = self._own(branch), self._stored(branch)
        weight = OWN if own and stored else float(bool(own))
        merged: Shares = {}
        for shares, part in ((own, weight), (stored, 1 - weight)):
            for path, share in shares.items():
                merged[path] = merged.get(path, 0.0) + part * share
        tree = GuessTree(NAME, "request" if own else self._level)
        nodes: dict[Path, int] = {(): -1}
        for path in sorted(merged, key=lambda path: (-merged[path], len(path)))[:budget]:
            above = merged[path[:-1]] if len(path) > 1 else 1.0
            nodes[path] = tree.add(nodes[path[:-1]], path[-1], merged[path] / above, LONGEST)
        return tree.proposal(budget)

    def observe(self, tokens: TokenArray) -> None:
        """Appends accepted tokens, int32, shape (m,)."""
        super().observe(tokens)
        self._end.observe(tokens)

    def _index(self) -> None:
        text = self.text
        for end in range(self._indexed + 1, len(text)):  # the text's own end is not followed yet
            for size in range(1, min(LONGEST, end) + 1):
                self._ends.setdefault(tuple(text[end - size : end]), []).append(end)
        self._indexed = max(self._indexed, len(text) - 1)

    def _own(self, branch: int) -> Shares:
        found = []
        for size in range(min(LONGEST, len(self.text)), 0, -1):
            ends = self._ends.get(tuple(self.text[-size:]), ())[-SEARCHED:]
            found.append([self.text[end : end + branch] for end in ends])
        return _mixed(found, BACKOFF)

    def _stored(self, branch: int) -> Shares:
        found = []
        for size in range(LONGEST, 0, -1):
            positions = self._end.behind(size)
            ranks = np.cumsum([0, *(len(starts) for _, starts in positions)])
            every = np.linspace(0, ranks[-1], min(SEARCHED, ranks[-1]), endpoint=False).astype(np.int64)
            rows = []
            for (segment, starts), first, last in zip(positions, ranks, ranks[1:], strict=False):
                for start in starts[every[(every >= first) & (every < last)] - first].tolist():
                    row = segment.tokens[start : start + branch].tolist()
                    rows.append(row[: row.index(segment.separator)] if segment.separator in row else row)
            found.append(rows)
        return _mixed(found, 0.0)


def _mixed(found: Iterable[Sequence[Sequence[int]]], backoff: float) -> Shares:
    """Probabilities of the beginnings of continuations, those after longer ends first.

    Example:
        after two tokens 9 4; after one of them 9 4 and 5: 9 4 has .9 + .1 / 2, 5 has .1 / 2
    """
    mixed: Shares = {}
    longest_first = [rows for rows in found if rows]
    left = 1.0
    for number, rows in enumerate(longest_first, 1):
        weight = left * (1 - SHORTER) if number < len(longest_first) else left
        left -= weight
        counts = Counter(tuple(row[:depth]) for row in rows for depth in range(1, len(row) + 1))
        for path, count in counts.items():
            mixed[path] = mixed.get(path, 0.0) + weight * count / (len(rows) + backoff)
    return mixed


def _sources(parts: MethodContext) -> Sequence[StoredSource]:
    store = Datastore(parts)

    def opened(prompt: TokenArray, references: Sequence[TokenArray]) -> SssdSession:
        return SssdSession(store.open(), after_references(prompt, references), store.level)

    return [StoredSource(NAME, store, opened)]


METHOD = Method(
    name=NAME,
    paper="Marzollo et al. 2024, arXiv:2411.05894",
    sources=_sources,
    tree=as_proposed,
    nodes=None,
    costs=RooflineCost,
)
