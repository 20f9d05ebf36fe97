"""The pass of a prompt with images that joins a running batch."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import GenerationConfig

from retrieval_draft.engine.prompt_inputs import NotVerifiable, pass_prompts
from retrieval_draft.engine.request import DecodeRequest
from retrieval_draft.engine.substitution import own_forwards
from retrieval_draft.engine.target import Target
from retrieval_draft.errors import UnsupportedGenerationError

__all__ = ["prompt_pass"]


def prompt_pass(
    target: Target,
    requests: Sequence[DecodeRequest],
    input_ids: Tensor,
    config: GenerationConfig,
    model_inputs: Mapping[str, Any],
    names: frozenset[str],
) -> Callable[[], None]:
    """A function that has the model pass the prompt of these requests, as `pass_prompts` does.

    It is called on the thread that decodes, perhaps after other prompts were prepared: some models keep
    offsets of positions, from the preparation to the pass, which are put back.

    Args:
        target: The model; its `media_lock` is held now.
        requests: One for each row.
        input_ids: int64, shape (batch, length).
        config: As prepared by model.generate.
        model_inputs: As prepared by model.generate.
        names: Of the inputs that are no text.
    """
    kind: Hashable = (names, False, len(requests) > 1)
    held = {
        part: part.__dict__["rope_deltas"]
        for part in target.model.modules()
        if "rope_deltas" in part.__dict__
    }

    def begin() -> None:
        with target.media_lock, own_forwards(target.model):
            for part, deltas in held.items():
                part.__dict__["rope_deltas"] = deltas
            try:
                pass_prompts(target, requests, input_ids, config, model_inputs, kind)
            except NotVerifiable as reason:
                raise UnsupportedGenerationError(
                    f"{type(target.model).__name__} cannot decode a prompt like this one in a running batch: "
                    f"{reason}.",
                    "Use model.generate for it.",
                ) from reason

    return begin
