"""Synthetic text in a store, as if from other servers."""

from __future__ import annotations

import os
from typing import Any

from retrieval_draft.bench.synthetic_text import SyntheticText
from retrieval_draft.index.store.connector import Connector
from retrieval_draft.index.store.entry import ID_BYTES, EntryCodec
from retrieval_draft.index.store.keys import SHARDS, stream_key
from retrieval_draft.index.store.log_replica import FIELD
from retrieval_draft.index.store.url import parse_store_url

__all__ = ["fill"]

_PIPELINE = 256


def fill(
    url: str,
    vocabulary: int,
    tokens: int,
    run: int,
    servers: int,
    tenant: str = "default",
    fingerprint: str = "bench",
) -> None:
    """Appends synthetic text.

    Args:
        url: Of the store.
        vocabulary: Number of token ids.
        tokens: Number of tokens in all.
        run: Tokens of an entry.
        servers: Number of simulated servers, in turn.
        tenant: Of the namespace.
        fingerprint: Of the namespace.
    """
    namespace = f"{fingerprint}:{tenant}"
    codec = EntryCodec(namespace, None, run)
    names = [os.urandom(ID_BYTES) for _ in range(servers)]
    text = SyntheticText(vocabulary).tokens(tokens, seed=5)
    client: Any = Connector(parse_store_url(url), 30.0).client()
    pipe = client.pipeline(transaction=False)
    for number, begin in enumerate(range(0, tokens, run)):
        server = number % servers
        payload = codec.encode(names[server], number // servers, text[begin : begin + run])
        pipe.xadd(stream_key(namespace, str(server % SHARDS)), {FIELD: payload})
        if number % _PIPELINE == _PIPELINE - 1:
            pipe.execute()
    pipe.execute()
    client.close()
