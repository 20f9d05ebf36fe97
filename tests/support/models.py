"""Tiny models with random weights, spread logits and text that repeats itself."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers

from retrieval_draft.engine.compat import output_cache_name

CACHE = output_cache_name()
"""Name of the cache among the arguments of `model.generate` and in what it returns."""

VOCABULARY = 97
WINDOW = 16

SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def _gpt2(**options: Any) -> Any:
    options.setdefault("vocab_size", VOCABULARY)
    return transformers.GPT2Config(
        n_embd=32, n_layer=3, n_head=4, n_positions=512, initializer_range=0.3,
        bos_token_id=None, eos_token_id=None, **options,
    )  # fmt: skip


def _config(name: str, **extra: Any) -> Any:
    return lambda **options: getattr(transformers, name)(**{**SHAPE, **extra, **options})


_WINDOWED = {
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": WINDOW,
}

CONFIGS = {
    "llama": _config("LlamaConfig"),
    "qwen2": _config("Qwen2Config"),
    "qwen3-windowed": _config("Qwen3Config", use_sliding_window=True, **_WINDOWED),
    "gemma3": _config("Gemma3TextConfig", query_pre_attn_scalar=8, tie_word_embeddings=False, **_WINDOWED),
    "mistral": _config("MistralConfig", sliding_window=WINDOW),
    "gpt-neox": _config("GPTNeoXConfig", num_key_value_heads=None, head_dim=None),
    "mixtral": _config("MixtralConfig", num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "gpt2": _gpt2,
}

SWITCH = 48
"""Tokens of the longest text with the rotary factors of short ones, in models of `ROPES`."""

_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": SWITCH,
}


def _rope(name: str, *left_out: str, **extra: Any) -> Any:
    shape = {key: value for key, value in SHAPE.items() if key not in left_out}
    return lambda **options: getattr(transformers, name)(**copy.deepcopy({**shape, **extra, **options}))


_DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}
_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
_PHI3 = {"rope_parameters": _LONGROPE, "original_max_position_embeddings": SWITCH, "pad_token_id": 0}
_MSCALES = {"short_mscale": 1.2, "long_mscale": 1.6}

ROPES = {
    "phi3": _rope("Phi3Config", "head_dim", **_PHI3),
    "phi3-windowed": _rope("Phi3Config", "head_dim", **_PHI3, sliding_window=WINDOW),
    "phimoe": _rope(
        "PhimoeConfig", "head_dim", rope_parameters={**_LONGROPE, **_MSCALES}, num_local_experts=4,
        num_experts_per_tok=2, original_max_position_embeddings=SWITCH,
    ),
    "llama-longrope": _rope("LlamaConfig", rope_parameters=_LONGROPE),
    "gemma3-longrope": _rope(
        "Gemma3TextConfig", query_pre_attn_scalar=8, tie_word_embeddings=False, **_WINDOWED,
        rope_parameters={"sliding_attention": _DEFAULT, "full_attention": _LONGROPE},
    ),
    "gemma3-dynamic": _rope(
        "Gemma3TextConfig", query_pre_attn_scalar=8, tie_word_embeddings=False, **_WINDOWED,
        rope_parameters={"sliding_attention": _DYNAMIC, "full_attention": _DEFAULT},
        max_position_embeddings=SWITCH,
    ),
    "llama-dynamic": _rope(
        "LlamaConfig", rope_parameters=_DYNAMIC, max_position_embeddings=SWITCH,
    ),
}  # fmt: skip
"""Models whose rotary factors depend on the longest position of a pass."""

OTHERS = {
    "diffllama": _config("DiffLlamaConfig"),
    "doge": _config("DogeConfig"),
    "gpt-neo": lambda vocab_size=VOCABULARY, **options: transformers.GPTNeoConfig(
        vocab_size=vocab_size, hidden_size=32, num_layers=2, attention_types=[[["global", "local"], 1]],
        num_heads=4, intermediate_size=48, max_position_embeddings=512, initializer_range=0.3,
        bos_token_id=None, eos_token_id=None, **options,
    ),
}  # fmt: skip
"""Models whose attention does something of its own."""

_GEMMA4: dict[str, Any] = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": WINDOW,
    "global_head_dim": 16,
    "hidden_size_per_layer_input": 4,
    "vocab_size_per_layer_input": VOCABULARY,
}

GEMMA4 = {
    "gemma4": _config("Gemma4TextConfig", **_GEMMA4),
    "gemma4-shared": _config("Gemma4TextConfig", num_kv_shared_layers=2, **_GEMMA4),
}
"""Models whose keys an assistant reads; the last two layers of the second read those of the first two."""


def make(name: str, *, attention: str = "sdpa", seed: int = 0, **options: Any) -> Any:
    """A model of `CONFIGS`, `ROPES`, `OTHERS` or `GEMMA4` in float32, for inference."""
    torch.manual_seed(seed)
    config = {**CONFIGS, **ROPES, **OTHERS, **GEMMA4}[name](**options)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    model.generation_config.eos_token_id = config.eos_token_id
    model.generation_config.pad_token_id = None
    return model.eval()
