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

from retrieval_draft.index.source import TokenArray
from retrieval_draft.methods.datastore import Datastore, StoredSource
from retrieval_draft.methods.lookup import after_references
from retrieval_draft.methods.method import Method, MethodContext, as_proposed
from retrieval_draft.methods.sam_decoding import SamBesideSession
from retrieval_draft.methods.token_recycling import TEMPLATE, RecycledTokens, TokenRecyclingSession

__all__ = ["METHOD"]

NAME = "sam_token_recycling"


def _sources(parts: MethodContext) -> Sequence[StoredSource]:
    matrix, store = RecycledTokens(parts.stores.vocabulary), Datastore(parts)

    def opened(prompt: TokenArray, references: Sequence[TokenArray]) -> SamBesideSession:
        text = after_references(prompt, references)
        recycled = TokenRecyclingSession(matrix, prompt, NAME)
        return SamBesideSession(NAME, recycled, store.open(), text, store.level)

    return [StoredSource(NAME, store, opened, lambda: matrix.nbytes)]


METHOD = Method(
    name=NAME,
    paper="Hu et al. 2024, arXiv:2411.10666",
    sources=_sources,
    tree=as_proposed,
    nodes=len(TEMPLATE),
)
