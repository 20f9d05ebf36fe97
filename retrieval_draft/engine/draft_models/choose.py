"""Draft sources from the argument `draft_model`."""

from __future__ import annotations

import re
from copy import copy
from typing import Any

from transformers import PreTrainedModel

from retrieval_draft.engine.draft_models.beside import DraftThread, WayChoice
from retrieval_draft.engine.draft_models.foreign_draft import ForeignModelDraft
from retrieval_draft.engine.draft_models.head_files import load_head
from retrieval_draft.engine.draft_models.heads import HeadDraft
from retrieval_draft.engine.draft_models.model_draft import ModelDraft, SelfDraft, draft_of
from retrieval_draft.engine.draft_models.mtp import load_mtp
from retrieval_draft.engine.draft_models.window_draft import WINDOW, WindowDraft
from retrieval_draft.engine.target import Target
from retrieval_draft.engine.wrapped_models import device_of
from retrieval_draft.errors import InvalidInputError
from retrieval_draft.index.source import DraftSource
from retrieval_draft.models.fingerprint import tokenizer_fingerprint
from retrieval_draft.models.loading import load_model, rounded_copy

__all__ = ["INT8", "MTP", "SELF", "is_self", "load_draft_model", "make_draft_sources"]

SELF = "self"
MTP = "mtp"
INT8 = "int8"


def is_self(given: Any) -> bool:
    """True for "self", or "self:" with layers to skip or a window."""
    return isinstance(given, str) and (given == SELF or given.startswith(f"{SELF}:"))


def make_draft_sources(
    given: Any, target: Target, tokenizer: Any, beside: bool | None = False
) -> tuple[DraftSource, ...]:
    """Draft sources from models.

    Args:
        given: None; a model with the target's tokenizer; a pair of a model and its own tokenizer; "self" for
            the target with layers skipped, "self:3,5" for these ones, "self:window" for all of them after a
            text's first and last tokens alone, "int8" for a copy of it with rounded weights, "mtp" for its
            layers for multi-token prediction; the folder or hub name of a trained head or of a model; a
            `DraftHead`; a ready source such as `HeadDraft`; a list of those.
        target: The target.
        tokenizer: The target's, or None.
        beside: Whether models draft beside the target's passes, see `DraftConfig.draft_beside`.

    Raises:
        InvalidInputError: It is none of these, or a pair and the target's tokenizer is missing.
        UnsupportedModelError: A draft model cannot pass trees, or the target has no output head
            over a decoder.
        ModelFileError: A checkpoint is missing, torn, or not for this target.
    """
    return tuple(_beside(source, target, beside) for source in _sources(given, target, tokenizer))


def _beside(source: DraftSource, target: Target, beside: bool | None) -> DraftSource:
    """The source, or a copy with a thread of its own where it is a model that drafts beside the target."""
    model = source.model if isinstance(source, ForeignModelDraft) else source
    if not isinstance(model, ModelDraft) or model.target.model is target.model:
        return source  # it drafts with the target's own states or layers
    is_elsewhere = model.target.device != target.device
    if not (is_elsewhere if beside is None else beside):
        return source
    model = copy(model)
    model.thread = DraftThread(WayChoice() if beside is None else None)
    if not isinstance(source, ForeignModelDraft):
        return model
    translated = copy(source)
    translated.model = model
    return translated


def _sources(given: Any, target: Target, tokenizer: Any) -> tuple[DraftSource, ...]:
    if given is None:
        return ()
    if isinstance(given, list):
        return tuple(source for one in given for source in _sources(one, target, tokenizer))
    if hasattr(given, "read") and hasattr(given, "expand"):
        given = HeadDraft(given)
    if isinstance(given, HeadDraft):
        given.bind(target)
        return (given,)
    if isinstance(given, PreTrainedModel):
        return (draft_of(given, target.vocabulary),)
    if is_self(given):
        return (_self_draft(given, target.model),)
    if isinstance(given, str):
        found = load_draft_model(given, target.model)
        own = isinstance(found, tuple) and tokenizer is None  # nothing to compare its tokenizer with
        return _sources(found[0] if own else found, target, tokenizer)
    if isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], PreTrainedModel):
        return (_translated(given[0], given[1], target, tokenizer),)
    if all(hasattr(given, name) for name in ("open", "name", "level", "nbytes")):
        return (given,)
    raise InvalidInputError(
        f"draft_model is {given!r}.",
        'Pass a model, (model, tokenizer), "self", "int8", "mtp", a folder or hub name, a draft source, or a '
        "list of those.",
    )


def _self_draft(given: str, model: Any) -> SelfDraft | WindowDraft:
    """The source that "self", "self:3,5", "self:window" or "self:window=256" names.

    Raises:
        InvalidInputError: It names none of these, or layers or keys that cannot be.
    """
    named = given.partition(":")[2]
    window = re.fullmatch(r"window(?:=(\d+))?", named)
    if window:
        return WindowDraft(model, int(window[1] or WINDOW))
    try:
        layers = [int(layer) for layer in named.split(",")] if named else None
    except ValueError as error:
        raise InvalidInputError(
            f"draft_model is {given!r}.",
            'Name layers to skip as in "self:3,5", or last tokens to read as in "self:window=512", or pass '
            '"self".',
        ) from error
    return SelfDraft(model, layers)


def load_draft_model(name: str, model: Any) -> Any:
    """A trained head, a model and its tokenizer, or a copy of the target.

    Args:
        name: A folder, a hub name, "int8" for a copy of the target, or "mtp" for its layers for multi-token
            prediction.
        model: The target.

    Returns:
        A `DraftHead`, a pair or a model, as `make_draft_sources` takes them.

    Raises:
        InvalidInputError: The target's weights cannot be rounded.
        ModelFileError: A checkpoint is missing, torn, or not for this target, or quanto is not installed.
        UnsupportedModelError: The target has no layers for multi-token prediction that can be used.
        UnsupportedEngineError: This transformers cannot read them.
    """
    if name == INT8:
        return rounded_copy(model, INT8)
    head = load_mtp(model) if name == MTP else load_head(name, model)
    if head is not None:
        return head
    return load_model(name, dtype=model.dtype, device=device_of(model.get_input_embeddings()))


def _translated(model: Any, own: Any, target: Target, tokenizer: Any) -> DraftSource:
    if tokenizer is None:
        raise InvalidInputError(
            "A draft model with a tokenizer of its own needs the target's tokenizer too.",
            "Pass it to RetrievalDrafter.for_model(model, tokenizer, ...).",
        )
    if tokenizer_fingerprint(own) == tokenizer_fingerprint(tokenizer):
        return draft_of(model, target.vocabulary)
    return ForeignModelDraft(model, own, tokenizer)
