"""Hands finished requests to the shared datastore."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from retrieval_draft.engine.request import DecodeRequest
from retrieval_draft.index.source import TokenArray
from retrieval_draft.index.store.store import SharedStore

__all__ = ["share_when_finished"]


def share_when_finished(
    store: SharedStore | None, requests: Sequence[DecodeRequest], share: str | None
) -> None:
    """Lets each request go to the store as soon as it is complete; one that fails before does not.

    Args:
        store: None for no sharing.
        requests: Their `finished` is set.
        share: "none", "reply" or "all"; None for what the store says.
    """
    if store is None:
        return
    nothing = np.empty(0, np.int32)
    for request in requests:
        # Rows with the same prompt share it once.
        prompt = request.prompt if request.leader is None else nothing
        request.finished = partial(_hand_over, store, prompt, share)


def _hand_over(store: SharedStore, prompt: TokenArray, share: str | None, reply: TokenArray) -> None:
    store.share(prompt, reply, share)
