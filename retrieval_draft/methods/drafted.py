"""Shared parts of the published methods with a draft model or a trained head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from retrieval_draft.drafting.hierarchy import OuterSession
from retrieval_draft.engine.draft_models.expansion import ExpansionLimits
from retrieval_draft.engine.draft_models.heads import HeadDraft
from retrieval_draft.engine.draft_models.model_draft import ModelDraft
from retrieval_draft.errors import InvalidInputError
from retrieval_draft.index.source import NodeLogits, Proposal, TokenArray
from retrieval_draft.methods.lookup import LookupSession, MethodSource
from retrieval_draft.methods.method import Method, MethodContext, as_proposed

__all__ = ["DraftedSession", "Drafter", "drafter", "drafters", "head_method"]


class Drafter(Protocol):
    """One request's session of a draft model or a head: `ModelSession`, `HeadSession`."""

    def propose(self, budget: int) -> Proposal:
        """Its most probable nodes, the best first."""
        ...

    def review(self, chain: TokenArray) -> Tensor:
        """Log probabilities after the text and along a chain of guesses, as far as it sees."""
        ...

    def observe(self, tokens: TokenArray) -> None:
        """Appends accepted tokens, int32, shape (m,)."""
        ...

    def learn(self, logits: NodeLogits) -> None:
        """Adds the target's predictions to what it learns from."""
        ...

    def close(self) -> None:
        """Ends the request."""
        ...


class DraftedSession(OuterSession, LookupSession):
    """A request's text and its draft models, which see what it sees. Subclasses propose.

    Args:
        models: The draft models' sessions of the request.
        prompt: int32, shape (length,).
    """

    def __init__(self, models: Sequence[Drafter], prompt: TokenArray) -> None:
        super().__init__(prompt)
        self.inner = tuple(models)

    def observe(self, tokens: TokenArray) -> None:
        """Appends accepted tokens, int32, shape (m,)."""
        super().observe(tokens)
        for model in self.inner:
            model.observe(tokens)

    def learn(self, logits: NodeLogits) -> None:
        """Passes the target's predictions on."""
        for model in self.inner:
            model.learn(logits)

    def close(self) -> None:
        """Ends the request in the draft models."""
        for model in self.inner:
            model.close()


def drafter(parts: MethodContext, name: str) -> ModelDraft | HeadDraft:
    """The best draft model; see `drafters`."""
    return drafters(parts, name)[0]


def drafters(parts: MethodContext, name: str) -> list[ModelDraft | HeadDraft]:
    """The draft models and heads, best first.

    Args:
        parts: With a draft model that has the target's tokenizer, or a head.
        name: The method's.

    Raises:
        InvalidInputError: There is neither.
    """
    models = [model for model in parts.models if isinstance(model, (ModelDraft, HeadDraft))]
    if models:
        return models
    raise InvalidInputError(
        f"The method {name!r} drafts with a model that has the target's tokenizer, or with a trained head, "
        "and there is none.",
        'Pass one as draft_model=, or "self".',
    )


def head_method(
    name: str, paper: str, kind: tuple[type[Any], ...], limits: ExpansionLimits, nodes: int
) -> Method:
    """A method that drafts with a trained head alone.

    Args:
        name: The method's.
        paper: Its publication.
        kind: Classes of its heads.
        limits: Limits on the growth of its trees.
        nodes: Draft nodes of a step as published.
    """

    def sources(parts: MethodContext) -> Sequence[MethodSource]:
        heads = [model for model in parts.models if isinstance(model, HeadDraft)]
        head = next((each for each in heads if isinstance(each.head, kind)), None)
        if head is None:
            given = ", ".join(type(getattr(each, "head", each)).__name__ for each in parts.models) or "none"
            raise InvalidInputError(
                f"The method {name!r} drafts with a head of the class "
                f"{' or '.join(each.__name__ for each in kind)}; draft_model has {given}.",
                "Pass the folder or hub name of such a head as draft_model=.",
            )
        return [MethodSource(name, lambda prompt, references: head.session(prompt, limits, 1))]

    return Method(
        name, paper, sources, as_proposed, nodes, needs_model=True, needs_head=True, reads_text=False
    )
