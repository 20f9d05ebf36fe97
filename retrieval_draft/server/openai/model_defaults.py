"""What a model's own generation configuration asks for and the server cannot do."""

from __future__ import annotations

import logging
from typing import Any

import torch

from retrieval_draft.drafter import RetrievalDrafter
from retrieval_draft.errors import InvalidInputError, RetrievalDraftError

__all__ = ["usable_defaults"]

_log = logging.getLogger("retrieval_draft.server")
_ONE = ("num_beams", "num_beam_groups", "num_return_sequences")
"""Settings that no field of OpenAI's API stands for: replies are single, and found without beams."""


def usable_defaults(drafter: RetrievalDrafter) -> dict[str, Any]:
    """Options to set in each request, in place of what the model's generation configuration says.

    Args:
        drafter: Whose model it is.

    Raises:
        InvalidInputError: It says something else that drafting does not do: no request could be answered.
    """
    target = drafter.continuous.target
    model: Any = target.model
    options: dict[str, Any] = {}
    for name in _ONE:
        value = getattr(model.generation_config, name, None)
        if value is not None and value > 1:
            options[name] = 1
            _log.warning("The model's generation_config has %s=%s, which is not taken over.", name, value)
    # As a request that sets nothing would be prepared.
    prompt = torch.zeros((1, 1), dtype=torch.int64, device=target.device)
    try:
        drafter.continuous.prepare(prompt, seed=0, **{"max_new_tokens": 1, **options})
    except (RetrievalDraftError, ValueError) as error:
        said = error.message if isinstance(error, RetrievalDraftError) else str(error)
        raise InvalidInputError(
            f"The model's generation_config asks for what drafting does not do: {said}",
            "Take it out of the model's generation_config.json.",
        ) from error
    return options
