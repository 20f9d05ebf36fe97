"""Tiny models of every family whose trees can be verified, with weights that make text repeat itself."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import transformers

from tests.support.models import CONFIGS, OTHERS, SHAPE

__all__ = ["ARCHITECTURES", "EAGER_ONLY", "model_of"]

WINDOW = 16

_SHAPE = {**SHAPE, "intermediate_size": 48, "num_hidden_layers": 2}
_OLD: dict[str, Any] = {
    "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "initializer_range": 0.3,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LATENT = {
    "head_dim": None, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1,
    **_EXPERTS,
}  # fmt: skip
_WINDOWED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}


def _of(name: str, shape: dict[str, Any] = _SHAPE, **extra: Any) -> Callable[..., Any]:
    wanted = {key: value for key, value in {**shape, **extra}.items() if key != "head_dim" or value}
    return lambda **options: getattr(transformers, name)(**{**wanted, **options})


ARCHITECTURES: dict[str, Callable[..., Any]] = {
    **CONFIGS,
    "diffllama": OTHERS["diffllama"],
    "gemma": _of("GemmaConfig"),
    "gemma2": _of("Gemma2Config", query_pre_attn_scalar=8, **_WINDOWED),
    "phi": _of("PhiConfig", num_key_value_heads=4),
    "phi3": _of("Phi3Config", sliding_window=None),
    "phi3-windowed": _of("Phi3Config", sliding_window=WINDOW),
    "cohere": _of("CohereConfig"),
    "cohere2": _of("Cohere2Config", **_WINDOWED),
    "olmo": _of("OlmoConfig"),
    "olmo2": _of("Olmo2Config"),
    "olmoe": _of("OlmoeConfig", num_experts=4, num_experts_per_tok=2),
    "starcoder2": _of("Starcoder2Config", sliding_window=WINDOW),
    "qwen3": _of("Qwen3Config"),
    "qwen3-moe": _of("Qwen3MoeConfig", num_experts=4, **_EXPERTS),
    "stablelm": _of("StableLmConfig"),
    "granite": _of("GraniteConfig"),
    "granite-moe": _of("GraniteMoeConfig", num_local_experts=4, num_experts_per_tok=2),
    "falcon": _of(
        "FalconConfig", alibi=False, intermediate_size=None, num_key_value_heads=None, head_dim=None
    ),
    "opt": _of("OPTConfig", ffn_dim=48, word_embed_proj_dim=32, init_std=0.3),
    "gptj": _of("GPTJConfig", _OLD, rotary_dim=8),
    "codegen": _of("CodeGenConfig", _OLD, rotary_dim=8),
    "gpt-bigcode": _of("GPTBigCodeConfig", _OLD),
    "deepseek-v2": _of("DeepseekV2Config", q_lora_rank=None, n_group=1, topk_group=1, **_LATENT),
    "deepseek-v3": _of("DeepseekV3Config", q_lora_rank=16, n_group=2, topk_group=1, **_LATENT),
    "gpt-oss": _of(
        "GptOssConfig",
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        **_WINDOWED,
    ),
    "smollm3": _of("SmolLM3Config", no_rope_layers=[1, 0]),
    "helium": _of("HeliumConfig"),
    "glm4": _of("Glm4Config"),
    "nemotron": _of("NemotronConfig"),
    "exaone4": _of("Exaone4Config", **_WINDOWED),
    "persimmon": _of("PersimmonConfig"),
    "ernie": _of("Ernie4_5Config"),
}

EAGER_ONLY = ("gemma2", "gpt-oss")
"""Models for which transformers has no torch attention."""


@functools.lru_cache(maxsize=96)
def model_of(name: str, attention: str, vocabulary: int, weights: int, dtype: torch.dtype) -> Any:
    """A model for inference; the same one for the same arguments. float64 has the weights of float32."""
    torch.manual_seed(weights)
    config = ARCHITECTURES[name](vocab_size=vocabulary)
    # Fast experts know no float64.
    experts = {} if dtype == torch.float32 else {"experts_implementation": "eager"}
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention, **experts)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = None
    return model.eval().to(dtype)
