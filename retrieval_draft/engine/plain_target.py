"""A model that no drafts are verified with: its text is that of its own ``generate``."""

from __future__ import annotations

from typing import Any

from retrieval_draft.engine.target import Target
from retrieval_draft.engine.wrapped_models import check_generates, device_of, unwrap

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
        model = unwrap(model)
        check_generates(model)
        self.model = model
        embedding: Any = model.get_input_embeddings()
        text = model.config.get_text_config(decoder=True)
        self.embedding_rows = int(embedding.weight.shape[0])
        self.vocabulary = min(self.embedding_rows, int(getattr(text, "vocab_size", self.embedding_rows)))
        limit = getattr(text, "max_position_embeddings", None)
        self.max_positions = limit if isinstance(limit, int) and limit > 0 else None
        self.rope = None
        self.hidden = None
        self.device = device_of(embedding)
