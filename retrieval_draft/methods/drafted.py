"""Shared parts of the published methods with a draft model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from retrieval_draft.engine.draft_models.expansion import Expansion, ExpansionLimits
from retrieval_draft.engine.draft_models.model_draft import ModelDraft
from retrieval_draft.errors import InvalidInputError
from retrieval_draft.methods.method import MethodContext

__all__ = ["all_expansions", "expansions"]


def expansions(parts: MethodContext, name: str, limits: ExpansionLimits) -> Callable[[], Expansion]:
    """A function that gives each request its own expansion of the best draft model; see `all_expansions`."""
    return all_expansions(parts, name, limits)[0]


def all_expansions(parts: MethodContext, name: str, limits: ExpansionLimits) -> list[Callable[[], Expansion]]:
    """For each draft model, best first, a function that gives each request its own expansion of it.

    Args:
        parts: With a draft model that has the target's tokenizer.
        name: The method's.
        limits: Limits of the expansion.

    Raises:
        InvalidInputError: There is no such model.
    """
    models = [model for model in parts.models if isinstance(model, ModelDraft)]
    if models:
        return [partial(model.expansion, limits) for model in models]
    raise InvalidInputError(
        f"The method {name!r} drafts with a model that has the target's tokenizer, and there is none.",
        'Pass one as draft_model=, or "self".',
    )
