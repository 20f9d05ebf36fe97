"""SAM[Token Recycling]: a copy after a long match, else the tree of recycled tokens.

Hu et al. (2024), "SAM Decoding: Speculative Decoding via Suffix Automaton" (arXiv:2411.10666), with Token
Recycling as the other drafter: where the longest suffix of the text that occurred before has 5 tokens or
more, one chain of the 40 tokens after its oldest occurrence; else the tree. Never both. A match in the static
texts counts 5 tokens less; ties to the text.

Differences: where fewer than 40 tokens follow, those are the chain (their code pads with zeros or takes a
shorter match); the tree is `token_recycling`'s. Suffix arrays instead of the static automaton, as in
`sam_decoding`: of corpora, earlier requests and the store of other servers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from retrieval_draft.index.segments.segment_session import Segments
from retrieval_draft.index.source import NodeLogits, Proposal, TokenArray
from retrieval_draft.index.suffix_automaton import SuffixAutomaton
from retrieval_draft.methods.datastore import Datastore, StoredSource
from retrieval_draft.methods.lookup import GuessTree, after_references
from retrieval_draft.methods.method import Method, MethodContext, as_proposed
from retrieval_draft.methods.rest import TextEnd
from retrieval_draft.methods.sam_decoding import BIAS
from retrieval_draft.methods.token_recycling import TEMPLATE, RecycledTokens

__all__ = ["METHOD", "SamTokenRecyclingSession"]

LONG = 5
COPIED = 40
NAME = "sam_token_recycling"


class SamTokenRecyclingSession:
    """A request's automaton and text beside the shared matrix.

    Args:
        matrix: Shared by all requests.
        segments: Of the static texts; may be none.
        prompt: int32, shape (length,).
        level: Locality of the static texts.

    Example:
        text 1 2 3 4 5 8 9 1 2 3 4 5: the last five occurred at the start  ->  chain 8 9 1 2 3 4 5;
        text 8 2 3 4 5 8 9 1 2 3 4 5: only four did  ->  the template below 5
    """

    def __init__(
        self, matrix: RecycledTokens, segments: Segments, prompt: TokenArray, level: str = "corpus"
    ) -> None:
        self._matrix = matrix
        self._static = TextEnd(segments, prompt)
        self._level = level
        self._automaton = SuffixAutomaton(len(prompt) + 256)
        self._bytes = bytearray()
        self._last = -1
        self._append(prompt)

    def propose(self, budget: int) -> Proposal:
        """The chain after a long match, or the tree."""
        length, static = self._automaton.match_length, self._static.length
        level, copied = self._level, []
        if static - BIAS > max(length, LONG - 1):
            copied = self._static.oldest(static, COPIED)
        if not copied and length < LONG:
            return self._matrix.propose(self._last, budget, NAME)
        if not copied:
            end, level, static = self._first_end(length), "request", length
            copied = np.frombuffer(bytes(self._bytes[4 * end : 4 * (end + COPIED)]), np.int32).tolist()
        tree = GuessTree(NAME, level)
        tree.add_path(copied, match_length=static)
        return tree.proposal(budget)

    def observe(self, tokens: TokenArray) -> None:
        """Appends accepted tokens, int32, shape (m,)."""
        self._static.observe(tokens)
        self._append(tokens)

    def _append(self, tokens: TokenArray) -> None:
        if len(tokens):
            self._automaton.insert(tokens)
            self._bytes += np.asarray(tokens, np.int32).tobytes()
            self._last = int(tokens[-1])

    def learn(self, logits: NodeLogits) -> None:
        """Overwrites the rows of every verified node."""
        self._matrix.learn(logits)

    def close(self) -> None:
        """Frees the automaton; the rows stay for later requests."""

    def _first_end(self, length: int) -> int:
        """End of the oldest occurrence of the last `length` tokens."""
        suffix = self._bytes[-4 * length :]
        found = self._bytes.find(suffix)
        while found % 4:  # bytes of two neighbours that look like the token
            found = self._bytes.find(suffix, found + 1)
        return found // 4 + length


def _sources(parts: MethodContext) -> Sequence[StoredSource]:
    matrix, store = RecycledTokens(parts.stores.vocabulary), Datastore(parts)

    def opened(prompt: TokenArray, references: Sequence[TokenArray]) -> SamTokenRecyclingSession:
        text = after_references(prompt, references)
        return SamTokenRecyclingSession(matrix, store.open(), text, store.level)

    return [StoredSource(NAME, store, opened, lambda: matrix.nbytes)]


METHOD = Method(
    name=NAME,
    paper="Hu et al. 2024, arXiv:2411.10666",
    sources=_sources,
    tree=as_proposed,
    nodes=len(TEMPLATE),
)
