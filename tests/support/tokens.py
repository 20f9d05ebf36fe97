"""Token ids, and the paths and sources that tests of lookups make of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from retrieval_draft.config import DraftConfig
from retrieval_draft.index.draft_stores import DraftStores
from retrieval_draft.index.segments.segment import Segment
from retrieval_draft.index.source import NodeLogits, Proposal, TokenArray
from retrieval_draft.methods.method import MethodContext


def ids(*tokens: int) -> TokenArray:
    return np.array(tokens, np.int32)


def paths(proposal: Proposal) -> list[tuple[int, ...]]:
    """The tokens from the root to each node."""
    found: list[tuple[int, ...]] = []
    for token, parent in zip(proposal.tokens.tolist(), proposal.parents.tolist(), strict=True):
        found.append((*(found[parent] if parent >= 0 else ()), token))
    return found


def predictions_after(token: int, *best: int) -> NodeLogits:
    """The best next tokens after one, equally probable."""
    return NodeLogits(
        ids(-1, -1, -1, token)[None], ids(*best)[None], np.full((1, len(best)), 0.1, np.float32)
    )


def method_source(method: Any, *segments: Any, vocabulary: int, **config: Any) -> Any:
    """The one source of a method; with `segments`, over a corpus that has one of the texts of each."""
    made = tuple(Segment.build([ids(*text) for text in texts], vocabulary) for texts in segments)
    corpora: Any = (SimpleNamespace(segments=made, nbytes=sum(each.nbytes for each in made)),) if made else ()
    (source,) = method.sources(MethodContext(DraftConfig(**config), DraftStores(vocabulary, corpora=corpora)))
    return source


def finish(source: Any, prompt: list[int], reply: list[int]) -> None:
    """A request that a source sees from its beginning to its end."""
    session = source.open(ids(*prompt))
    session.observe(ids(*reply))
    session.close()
