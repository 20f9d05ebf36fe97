"""Checks of callers' arguments, with errors that name the option and a remedy."""

from __future__ import annotations

import inspect
from collections.abc import Sequence, Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, UnbatchedClassifierFreeGuidanceLogitsProcessor

from retrieval_draft.engine.compat import CACHE_NAMES, callers_model_inputs
from retrieval_draft.errors import InvalidInputError, TokenizerMismatchError, UnsupportedGenerationError
from retrieval_draft.generation.streaming import effective
from retrieval_draft.index.source import TokenArray, check_ids

__all__ = [
    "arguments_of_generate",
    "best_of_options",
    "check_generation",
    "check_new_tokens",
    "check_options",
    "check_prompt",
    "check_tokenizer",
    "further_inputs",
    "reference_tokens",
    "strip_prompts",
]

_CACHES = (None, "dynamic", "dynamic_full")
_CACHE_HINT = "Leave it out: the drafter brings its own cache."


def arguments_of_generate(
    given: Sequence[Any], options: dict[str, Any]
) -> tuple[Any, Tensor | None, GenerationConfig | None]:
    """Sorts arguments: by position they come in the order of `RetrievalDrafter.generate` or model.generate.

    Args:
        given: Those by position: prompts; mask and configuration, or configuration; logits processors and
            the next arguments of model.generate.
        options: Keyword arguments for model.generate, changed in place: returned ones are removed, positional
            ones are added.

    Returns:
        Prompts, mask and configuration.

    Raises:
        InvalidInputError: An argument was given twice, or has a type that it cannot have.
    """
    names = ["input_ids", "attention_mask", "generation_config"]
    if len(given) > 1 and isinstance(given[1], GenerationConfig):
        names.remove("attention_mask")
    elif len(given) > 2 and isinstance(given[2], list):
        # No argument can be the configuration.
        names = ["input_ids", "generation_config"]
    of_model = list(inspect.signature(inspect.unwrap(GenerationMixin.generate)).parameters)
    names += of_model[of_model.index("logits_processor") :]
    for name, value in zip(names, given, strict=False):
        if value is not None:
            if options.get(name) is not None:
                raise InvalidInputError(f"{name} was given twice.", "Give it by position or by name.")
            options[name] = value
    inputs, input_ids = options.pop("inputs", None), options.pop("input_ids", None)
    if inputs is not None and input_ids is not None:
        raise InvalidInputError("inputs and input_ids were both given.", "They are the same: give one.")
    mask, config = options.pop("attention_mask", None), options.pop("generation_config", None)
    for name, value, kind in (
        ("attention_mask", mask, Tensor),
        ("generation_config", config, GenerationConfig),
        ("logits_processor", options.get("logits_processor"), list),
    ):
        if value is not None and not isinstance(value, kind):
            raise InvalidInputError(f"{name} is a {type(value).__name__}; it must be a {kind.__name__}.")
    return inputs if input_ids is None else input_ids, mask, config


def check_prompt(input_ids: Any, attention_mask: Tensor | None) -> None:
    """Checks types and shapes of a batch of prompts; `strip_prompts` checks their content.

    Args:
        input_ids: Integers, shape (batch, length).
        attention_mask: The same shape; None for no padding.

    Raises:
        InvalidInputError: Wrong type, dtype or shape, or an empty prompt.
    """
    if not isinstance(input_ids, Tensor):
        raise InvalidInputError(
            f"input_ids is a {type(input_ids).__name__}; it must be a tensor of shape (batch, length).",
            'Tokenize with return_tensors="pt".',
        )
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise InvalidInputError(f"input_ids has dtype {input_ids.dtype}; token ids must be int64 or int32.")
    if input_ids.ndim != 2:
        raise InvalidInputError(
            f"input_ids has shape {tuple(input_ids.shape)}; it must be (batch, length).",
            "A single prompt is input_ids[None].",
        )
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise InvalidInputError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, input_ids {tuple(input_ids.shape)}; "
            "they must be equal."
        )
    if input_ids.numel() == 0:
        raise InvalidInputError("The prompt is empty.", "Pass at least one token, for example the bos token.")


def strip_prompts(
    input_ids: Tensor, attention_mask: Tensor | None, vocabulary: int, max_positions: int | None
) -> list[TokenArray]:
    """Removes the left padding from a batch of prompts, and checks their content.

    Args:
        input_ids: Integers, shape (batch, length).
        attention_mask: 0 and 1, the same shape, zeros to the left only; None for no padding.
        vocabulary: Rows of the model's embedding.
        max_positions: The longest text the model allows, or None.

    Returns:
        For each row int32, shape (its length,).

    Raises:
        InvalidInputError: An empty or too long prompt, or an unknown id.
    """
    ids = input_ids.detach().cpu().numpy()
    mask = None if attention_mask is None else attention_mask.detach().cpu().numpy()
    rows = [_strip_row(ids[row], None if mask is None else mask[row]) for row in range(len(ids))]
    for row, tokens in enumerate(rows):
        if max_positions is not None and len(tokens) > max_positions:
            raise InvalidInputError(
                f"Prompt {row} has {len(tokens)} tokens; the model allows {max_positions}.",
                "Shorten the prompt or use a model with a longer context.",
            )
        check_ids(tokens, f"Prompt {row}", vocabulary)
    return rows


def _strip_row(ids: Any, mask: Any) -> TokenArray:
    """One prompt without its left padding: int32, shape (length,)."""
    if mask is None:
        return np.ascontiguousarray(ids, np.int32)
    start = int(np.argmax(mask != 0))
    if not mask.any():
        raise InvalidInputError("The prompt is empty: its attention mask is zero everywhere.")
    if not (mask[start:] != 0).all():
        raise InvalidInputError(
            "attention_mask hides tokens behind the start of a prompt; only left padding is supported.",
            'Set tokenizer.padding_side = "left"; for a prompt that holds the pad token as text, pass '
            "attention_mask=torch.ones_like(input_ids).",
        )
    return np.ascontiguousarray(ids[start:], np.int32)


def check_new_tokens(generation_config: GenerationConfig | None, options: dict[str, Any]) -> None:
    """Refuses a generation of no tokens.

    Raises:
        InvalidInputError: max_new_tokens is below 1.
    """
    wanted = options.get("max_new_tokens")
    if wanted is None and generation_config is not None:
        wanted = generation_config.max_new_tokens
    if wanted is not None and wanted < 1:
        raise InvalidInputError(f"max_new_tokens is {wanted}; it must be at least 1.")


def check_options(options: dict[str, Any]) -> None:
    """Refuses keyword arguments of model.generate that would not reach our loop.

    Raises:
        UnsupportedGenerationError: Names the option and the alternative.
    """
    hints = {
        "assistant_model": "Leave it out: the drafter makes the drafts.",
        "prompt_lookup_num_tokens": "Leave it out: the drafter looks the prompt up itself.",
        "inputs_embeds": "Pass the whole text as input_ids instead.",
        "adapter_names": "Generate with the rows of each adapter apart, after model.set_adapter(name).",
    }
    for name, hint in hints.items():
        if options.get(name) is not None:
            raise UnsupportedGenerationError(f"{name} is not supported by drafted decoding.", hint)
    cache = options.get("cache_implementation")
    if cache not in _CACHES:
        raise UnsupportedGenerationError(
            f"cache_implementation={cache!r} is not supported by drafted decoding.", _CACHE_HINT
        )


def best_of_options(
    best_of: int | None, model: Any, config: GenerationConfig | None, options: dict[str, Any]
) -> int | None:
    """Makes model.generate expand each prompt to as many samples as are drawn.

    Args:
        best_of: Samples of each prompt, or None.
        model: Of transformers.
        config: The caller's.
        options: Keyword arguments for model.generate; ``num_return_sequences`` is changed in place.

    Returns:
        Number of samples to return; None for all.

    Raises:
        InvalidInputError: Fewer samples than are to be returned, or no sampling.
    """
    if best_of is None:
        return None
    wanted = effective(model, config, options, "num_return_sequences") or 1
    if best_of < wanted:
        raise InvalidInputError(
            f"best_of is {best_of}; it must be at least num_return_sequences, which is {wanted}."
        )
    if not effective(model, config, options, "do_sample"):
        raise InvalidInputError(
            "best_of draws several samples; greedy decoding has one.", "Set do_sample=True."
        )
    options["num_return_sequences"] = best_of
    return int(wanted)


def check_generation(
    config: GenerationConfig,
    processors: Sequence[Any],
    rows: int,
    model_inputs: dict[str, Any],
    own: GenerationConfig | None = None,
    takes_media: bool = False,
) -> None:
    """Refuses generation modes that drafted decoding does not do.

    Settings of caches and assistants in the model's own configuration, which change no text, are ignored.

    Args:
        config: As prepared by model.generate.
        processors: As prepared by model.generate.
        rows: Of the batch.
        model_inputs: Inputs that model.generate would pass to the model. Those that transformers adds are
            accepted; those of the caller that would change the output are refused by name.
        own: The model's own configuration.
        takes_media: Whether inputs beside token ids are passed on, as those of images are.

    Raises:
        UnsupportedGenerationError: Names the option and the alternative.
    """
    stock = "Use model.generate without custom_generate for it."

    def asked(name: str) -> Any:
        value = getattr(config, name, None)
        return None if own is not None and value == getattr(own, name, None) else value

    dictionary = bool(config.return_dict_in_generate)
    refused = {
        "num_beams": (config.num_beams or 1) > 1,
        "num_beam_groups": (getattr(config, "num_beam_groups", None) or 1) > 1,
        "guidance_scale": rows > 1
        and any(type(p) is UnbatchedClassifierFreeGuidanceLogitsProcessor for p in processors),
        "penalty_alpha": bool(getattr(config, "penalty_alpha", None)) and not config.do_sample,
        "dola_layers": getattr(config, "dola_layers", None) is not None,
        "force_words_ids": getattr(config, "force_words_ids", None) is not None,
        "constraints": getattr(config, "constraints", None) is not None,
        "prompt_lookup_num_tokens": asked("prompt_lookup_num_tokens") is not None,
        "assistant_early_exit": asked("assistant_early_exit") is not None,
        "output_attentions": dictionary and bool(config.output_attentions),
        "output_hidden_states": dictionary and bool(config.output_hidden_states),
        "cache_implementation": asked("cache_implementation") not in _CACHES,
    }
    hints = {
        "num_beams": "Sample with num_return_sequences or best_of, or use model.generate for beams.",
        "guidance_scale": "It follows one text only: generate the rows one by one.",
        "prompt_lookup_num_tokens": "Leave it out: the drafter looks the prompt up itself.",
        "assistant_early_exit": "Leave it out: the drafter makes the drafts.",
        "cache_implementation": _CACHE_HINT,
    }
    for name, found in refused.items():
        if found:
            raise UnsupportedGenerationError(
                f"{name}={getattr(config, name, None)!r} is not supported by drafted decoding.",
                hints.get(name, stock),
            )
    extra = [name for name in further_inputs(model_inputs) if not takes_media or name == "inputs_embeds"]
    if extra:
        raise UnsupportedGenerationError(
            f"Drafted decoding takes token ids only; it cannot pass on {', '.join(sorted(extra))}.",
            stock,
        )


def further_inputs(model_inputs: dict[str, Any]) -> list[str]:
    """Names of the caller's model inputs that are no text: those of images, and unusual positions.

    Args:
        model_inputs: As the decoding loop received them.
    """
    given = callers_model_inputs(model_inputs)
    known = {"input_ids", "attention_mask", "position_ids", "logits_to_keep", "use_cache", *CACHE_NAMES}
    known |= {"output_attentions", "output_hidden_states"}  # they are in the configuration too
    extra = [name for name, value in given.items() if name not in known and not _is_empty(value)]
    if "position_ids" in given and not _are_usual(model_inputs):
        extra.append("position_ids")
    return extra


def _is_empty(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 0
    return value is None or (isinstance(value, Sized) and len(value) == 0)


def _are_usual(model_inputs: dict[str, Any]) -> bool:
    """True if positions count the tokens that are not padding, as they would if they were left out."""
    positions, mask = model_inputs.get("position_ids"), model_inputs.get("attention_mask")
    if positions is None:
        return True
    if mask is None:
        mask = torch.ones_like(positions)
    if positions.shape != mask.shape:
        return False
    return bool(((positions == mask.cumsum(-1) - 1) | (mask == 0)).all())


def check_tokenizer(tokenizer: Any, model: Any, vocabulary: int) -> None:
    """Refuses a tokenizer whose ids have other meanings for the model.

    Args:
        tokenizer: Any transformers tokenizer.
        model: The model.
        vocabulary: Rows of the model's embedding.

    Raises:
        TokenizerMismatchError: It has more ids than the model, or other special ids.
    """
    if len(tokenizer) > vocabulary:
        raise TokenizerMismatchError(
            f"The tokenizer has {len(tokenizer)} ids, the model's embedding {vocabulary} rows.",
            "Load the tokenizer from the model's folder.",
        )
    configs = (model.config.get_text_config(decoder=True), model.config, model.generation_config)
    for name in ("bos_token_id", "eos_token_id"):
        mine = getattr(tokenizer, name, None)
        theirs: set[int] = set()
        for config in configs:
            value = getattr(config, name, None)
            theirs.update([] if value is None else [value] if isinstance(value, int) else value)
        if mine is not None and theirs and mine not in theirs:
            raise TokenizerMismatchError(
                f"The tokenizer's {name} is {mine}, the model's {sorted(theirs)}.",
                "Load the tokenizer from the model's folder.",
            )


def reference_tokens(texts: Any, tokenizer: Any, vocabulary: int) -> list[TokenArray]:
    """Reference texts as token ids.

    Args:
        texts: A string, token ids, or a list of either; None for nothing.
        tokenizer: Needed for strings.
        vocabulary: Rows of the model's embedding.

    Raises:
        InvalidInputError: It has another type, is a string without a tokenizer, or has an unknown id.
    """
    if texts is None:
        return []
    if not isinstance(texts, (str, Tensor, np.ndarray, Sequence)):
        raise InvalidInputError(
            f"prediction or documents is a {type(texts).__name__}.",
            "Pass text, token ids, or a list of those.",
        )
    if isinstance(texts, (str, Tensor, np.ndarray)) or (
        len(texts) > 0 and isinstance(texts[0], (int, np.integer))
    ):
        texts = [texts]
    out = []
    for text in texts:
        if isinstance(text, str):
            if tokenizer is None:
                raise InvalidInputError(
                    "prediction and documents as text need a tokenizer.",
                    "Pass tokenizer= to RetrievalDrafter.for_model, or token ids.",
                )
            ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"], np.int64)
        else:
            ids = np.asarray(text.cpu() if isinstance(text, Tensor) else text).reshape(-1)
        if len(ids) and not (ids.dtype.kind in "iu" and ids.min() >= 0 and ids.max() < vocabulary):
            raise InvalidInputError(
                f"A reference holds values outside the token ids 0..{vocabulary - 1}.",
                "Use the tokenizer that belongs to the model.",
            )
        if len(ids):
            out.append(np.ascontiguousarray(ids, np.int32))
    return out
