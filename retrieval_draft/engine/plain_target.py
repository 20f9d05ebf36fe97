"""A model that no drafts are verified with: its text is that of its own ``generate``."""

from __future__ import annotations

from typing import Any

from retrieval_draft.engine.target import Target

__all__ = ["PlainTarget"]


class PlainTarget(Target):
    """The facts of a model that callers ask for, and no passes.

    Args:
        model: Any model of transformers that generates text.

    Raises:
        UnsupportedModelError: It generates none.
    """

    shares_passes = False

    def __init__(self, model: Any) -> None:
        self._describe(model)
