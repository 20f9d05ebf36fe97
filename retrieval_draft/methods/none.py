"""Plain decoding through the same loop: the reference for drafted runs."""

from __future__ import annotations

from retrieval_draft.methods.method import Method, as_proposed

__all__ = ["METHOD"]

METHOD = Method("none", "", lambda parts: [], as_proposed, nodes=0, reads_text=False)
