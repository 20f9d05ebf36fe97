"""This project's own method: every source, one tree of what each is worth, as large as it pays."""

from __future__ import annotations

from collections.abc import Sequence

from retrieval_draft.engine.fusion import fuse
from retrieval_draft.index.registry import make_sources
from retrieval_draft.index.source import DraftSource
from retrieval_draft.methods.method import Method, Parts

__all__ = ["METHOD"]


def _sources(parts: Parts) -> Sequence[DraftSource]:
    return [*make_sources(parts.config, parts.stores), *parts.models]


METHOD = Method("calibrated", "this project", _sources, fuse, nodes=None, calibrates=True)
