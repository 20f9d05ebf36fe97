"""Generation without drafts: the model's own ``generate``, for models that verify none."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from retrieval_draft.drafting.stats import DraftStats
from retrieval_draft.errors import InvalidInputError, UnsupportedGenerationError

__all__ = ["generate_plainly", "refuse_extras", "sample_plainly"]


def refuse_extras(**options: Any) -> None:
    """Refuses options that only our own loop has.

    Raises:
        UnsupportedGenerationError: Names the option.
    """
    for name, value in options.items():
        if value:
            raise UnsupportedGenerationError(
                f"{name}={value!r} is not supported for this model, whose text is that of model.generate.",
                "Leave it out; drafter.verification says why nothing is drafted.",
            )


def generate_plainly(model: Any, inputs: Any, seed: Any, options: dict[str, Any]) -> tuple[Any, DraftStats]:
    """The output of the model's own ``generate``, and its counts.

    Args:
        model: Of transformers.
        inputs: Its first argument, or None.
        seed: For torch's generators during the call; None leaves them as they are.
        options: Its other arguments; those that are None are left out.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if inputs is not None:
        given["inputs"] = inputs
    with _seeded(seed):
        # Of the class: model.generate may have been replaced by a drafter's own.
        out = type(model).generate(model, **given)
    return out, _counts(model, inputs, out)


def sample_plainly(
    model: Any,
    input_ids: Tensor,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    seed: Any,
    options: dict[str, Any],
) -> tuple[Any, DraftStats]:
    """The output of the model's own loop with what ``generate`` prepared, and its counts.

    Args:
        model: Of transformers.
        input_ids: int64, shape (batch, length).
        processors: As prepared.
        criteria: As prepared.
        config: As prepared.
        seed: As for `generate_plainly`.
        options: Further arguments of the loop and of the model's forward pass.

    Raises:
        UnsupportedGenerationError: Beams.
    """
    if (config.num_beams or 1) > 1:
        raise UnsupportedGenerationError(
            f"num_beams={config.num_beams!r} is not supported by a decoding loop of one's own.",
            "Use model.generate without custom_generate for it.",
        )
    with _seeded(seed):
        out = model._sample(
            input_ids,
            logits_processor=processors,
            stopping_criteria=criteria,
            generation_config=config,
            **options,
        )
    return out, _counts(model, input_ids, out)


@contextmanager
def _seeded(seed: Any) -> Iterator[None]:
    if seed is None:
        yield
        return
    try:
        number = operator.index(seed)
    except TypeError:
        raise InvalidInputError(
            f"seed is {seed!r}, a {type(seed).__name__}; it must be an integer for a model that nothing is "
            "drafted for."
        ) from None
    with torch.random.fork_rng():
        torch.manual_seed(number)
        yield


def _counts(model: Any, inputs: Any, out: Any) -> DraftStats:
    """Counts of a call, its padding included."""
    sequences = out if isinstance(out, Tensor) else getattr(out, "sequences", None)
    if not isinstance(sequences, Tensor) or sequences.ndim != 2:
        return DraftStats(requests=1)
    rows, length = sequences.shape
    text = isinstance(inputs, Tensor) and inputs.ndim == 2 and not inputs.is_floating_point()
    prompt = int(inputs.shape[1]) if text else 0
    first = 1 if getattr(model.config, "is_encoder_decoder", False) else prompt
    new = max(length - first, 0)
    steps = rows * max(new - 1, 0)
    return DraftStats(
        requests=rows,
        prompt_tokens=prompt * (len(inputs) if text else 0),
        tokens=rows * new,
        steps=steps,
        passes=max(new - 1, 0),
    )
