"""Tiny models with random weights, whose greedy text is not one token over and over."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from benchmarks.models.configs import tiny_config
from benchmarks.models.shapes import TEXT_IDS, VOCABULARY

__all__ = ["random_prompt", "tiny_model"]

_DISTINCT = 12
"""So many distinct tokens of 40 are enough."""

_NO_OPTIONS = (
    "eos_token_id", "pad_token_id", "bos_token_id", "max_length", "max_new_tokens", "forced_bos_token_id",
    "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens",
)  # fmt: skip


def random_prompt(length: int, seed: int) -> Tensor:
    """Random ids, in which a third of the text comes again twice: int64, shape (1, length)."""
    generator = torch.Generator().manual_seed(seed)
    ids = functools.partial(torch.randint, TEXT_IDS.start, TEXT_IDS.stop, generator=generator)
    part, other = ids((length // 3,)), ids((length,))
    return torch.cat([part, other[: length - 3 * len(part) + 2], part, part])[:length][None]


def tiny_model(
    family: str,
    kind: str,
    settings: Mapping[str, Any] | None = None,
    image_text: bool = False,
    attention: str | None = None,
    seed: int = 0,
) -> Any:
    """A model in float32, for inference.

    Args:
        family: Key of `CONFIG_MAPPING`.
        kind: Name of the model's class.
        settings: Of the configuration.
        image_text: Whether the class reads images.
        attention: Attention implementation; None for the model's own choice.
        seed: Of the weights.

    Raises:
        Exception: Any that the model's class raises at such a configuration.
    """
    made = getattr(transformers, kind)
    config = _config_for(made, tiny_config(family, settings, image_text))
    if attention is not None:
        config._attn_implementation = attention
    torch.manual_seed(seed)
    model = made(config).eval()
    if not model.can_generate():
        raise ValueError(f"{kind} has no generate")
    for name, weights in model.named_parameters():
        # With zeros no token of Doge sees another, and no image is read by Gemma 3.
        if (weights.ndim > 1 or name.endswith(".A")) and not weights.any():
            nn.init.normal_(weights)
    given = model.generation_config
    for option in _NO_OPTIONS:
        setattr(given, option, None)
    if model.config.is_encoder_decoder:
        given.decoder_start_token_id = TEXT_IDS.start
    given.num_beams, given.no_repeat_ngram_size, given.do_sample = 1, 0, False
    _spread(model, seed)
    return model


def _config_for(kind: Any, config: Any) -> Any:
    """The configuration, or the part of it that the class is made from."""
    wanted = kind.config_class
    if wanted is None or isinstance(config, wanted):
        return config
    parts = (*vars(config).values(), config.get_text_config(decoder=True))
    return next((part for part in parts if isinstance(part, wanted)), config)


def _spread(model: Any, seed: int) -> None:
    """Changes weights until greedy text varies.

    With tied embeddings the newest token's own embedding wins unless it is small, and some initialisations
    leave the logits nearly constant.
    """

    def shrink() -> None:
        model.get_input_embeddings().weight.mul_(0.1)

    def draw(scale: float = 0.3) -> None:
        for part in model.modules():
            if type(part) in (nn.Linear, nn.Embedding) or type(part).__name__ == "Conv1D":
                part.weight.normal_(0, scale)

    torch.manual_seed(seed + 1)
    best, kept = _distinct_tokens(model), copy.deepcopy(model.state_dict())
    for change in (shrink, shrink, draw, shrink, draw, functools.partial(draw, 1.0), shrink):
        if best >= _DISTINCT:
            break
        with torch.no_grad():
            change()
        found = _distinct_tokens(model)
        if found > best:
            best, kept = found, copy.deepcopy(model.state_dict())
    model.load_state_dict(kept)


def _distinct_tokens(model: Any) -> int:
    """Distinct tokens of a greedy text; all that there are where the model cannot generate."""
    prompt = random_prompt(50, 5)
    try:
        out = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, pad_token_id=0
        )
    except Exception:  # what stock cannot run is counted by its trial
        return VOCABULARY
    return int(out[0, prompt.shape[1] :].unique().numel())
