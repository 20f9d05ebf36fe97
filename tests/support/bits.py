"""Half-precision models, their caches bit by bit, and drafters whose passes have one shape."""

from __future__ import annotations

import copy
from typing import Any

import torch

from retrieval_draft.engine.probe import find_target
from tests.random_generate.architectures import EAGER_ONLY, model_of
from tests.support.drafters import drafter_with
from tests.support.models import CACHE, CONFIGS, VOCABULARY, make
from tests.support.sources import OracleSource

ARCHITECTURES = ("llama", "qwen2", "qwen3-windowed", "mistral", "gemma3", "gemma2", "mixtral", "gpt-oss")
"""Full and sliding windows, soft caps, norms of queries and keys, experts, sinks."""


def half(name: str, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    """A small random model of `ARCHITECTURES`."""
    if name in CONFIGS:
        return make(name, **options).to(dtype)
    attention = "eager" if name in EAGER_ONLY else "sdpa"
    return copy.deepcopy(model_of(name, attention, VOCABULARY, 0, torch.float32)).to(dtype)


def bitwise(model: Any, source: OracleSource | None = None, **options: Any) -> Any:
    """A drafter from this source, or one that decodes plainly, with passes of one shape on a tape."""
    target = find_target(model, graphs="tape", exact="bitwise")
    sources = () if source is None else (source,)
    return drafter_with(model, *sources, target=target, exact="bitwise", cpu_kernels=False, **options)


def generate(drafter: Any, prompt: torch.Tensor, new: int, **options: Any) -> tuple[torch.Tensor, Any]:
    """The text, and its cache."""
    out = drafter.generate(
        prompt, max_new_tokens=new, return_dict_in_generate=True, **{"do_sample": False, **options}
    )
    return out.sequences, out[CACHE]


def same_bits(cache: Any, other: Any) -> bool:
    """True if two caches hold the same keys and values, those that the next token sees, bit for bit."""
    assert cache.get_seq_length() == other.get_seq_length() > 0
    return all(
        torch.equal(states.view(torch.uint8), others.view(torch.uint8))
        for layer, same in zip(cache.layers, other.layers, strict=True)
        for states, others in (
            (layer.keys.contiguous(), same.keys.contiguous()),
            (layer.values.contiguous(), same.values.contiguous()),
        )
    )
