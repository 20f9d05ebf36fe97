"""Settings of a model's generation configuration that the server does not support."""

from __future__ import annotations

import logging
from typing import Any

import torch

from retrieval_draft.drafter import RetrievalDrafter
from retrieval_draft.errors import InvalidInputError, RetrievalDraftError

__all__ = ["usable_defaults"]

_log = logging.getLogger("retrieval_draft.server")
_ONE = ("num_beams", "num_beam_groups", "num_return_sequences")
"""Settings without a field in OpenAI's API: replies are single, and found without beams."""


def usable_defaults(drafter: RetrievalDrafter) -> dict[str, Any]:
    """Options for each request that override the model's generation configuration.

    Args:
        drafter: Drafter of the model.

    Raises:
        InvalidInputError: Another of its settings is not supported: no request could be answered.
    """
    target = drafter.continuous.target
    model: Any = target.model
    options: dict[str, Any] = {}
    for name in _ONE:
        value = getattr(model.generation_config, name, None)
        if value is not None and value > 1:
            options[name] = 1
            _log.warning("The model's generation_config has %s=%s, which is not taken over.", name, value)
    # Prepared as for a request without options.
    prompt = torch.zeros((1, 1), dtype=torch.int64, device=target.device)
    try:
        drafter.continuous.prepare(prompt, seed=0, **{"max_new_tokens": 1, **options})
    except (RetrievalDraftError, ValueError) as error:
        reason = error.message if isinstance(error, RetrievalDraftError) else str(error)
        raise InvalidInputError(
            f"The model's generation_config asks for what drafting does not do: {reason}",
            "Take it out of the model's generation_config.json.",
        ) from error
    return options
