"""Tiny models that verify chains, or nothing: recurrent states, own masks, chosen keys."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from transformers import cache_utils

from tests.support.models import SHAPE, WINDOW

_LINEAR = ["linear_attention", "full_attention", "linear_attention"]
_GATED_DELTA = {
    "layer_types": _LINEAR,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_EXPERTS = {
    "num_experts_per_tok": 2,
    "num_experts": 4,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
}
_LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
_MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
    "mamba_n_groups": 1,
}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_next": ("Qwen3NextConfig", {**_GATED_DELTA, **_EXPERTS}),
    "qwen3_5_text": ("Qwen3_5TextConfig", _GATED_DELTA),
    "kimi_linear": (
        "KimiLinearConfig",
        {
            **_LATENT,
            "q_lora_rank": None,
            "layer_types": _LINEAR,
            "mlp_layer_types": ["dense", "sparse", "dense"],
            "linear_head_dim": 8,
            "linear_num_heads": 4,
            "num_experts": 4,
            "num_experts_per_token": 2,
            "moe_intermediate_size": 24,
            "pad_token_id": 0,
        },
    ),
    "nemotron_h": (
        "NemotronHConfig",
        {
            "layers_block_type": ["linear_attention", "mlp", "full_attention", "linear_attention"],
            "num_hidden_layers": None,
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 2,
            "chunk_size": 16,
            "pad_token_id": 0,
        },
    ),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        {
            **_MAMBA,
            "layer_types": _LINEAR,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 24,
        },
    ),
    "falcon_h1": ("FalconH1Config", {**_MAMBA, "mamba_d_ssm": 64, "pad_token_id": 0}),
    "lfm2": (
        "Lfm2Config",
        {"layer_types": ["conv", "full_attention", "conv"], "full_attn_idxs": None, "pad_token_id": 0},
    ),
    "llama4_text": (
        "Llama4TextConfig",
        {
            "attention_chunk_size": WINDOW,
            "intermediate_size_mlp": 48,
            "num_local_experts": 4,
            "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
            "no_rope_layers": [1, 0, 1],
        },
    ),
    "deepseek_v32": (
        "DeepseekV32Config",
        {
            **_LATENT,
            "index_topk": 128,
            "index_head_dim": 16,
            "index_n_heads": 2,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "n_group": 1,
            "topk_group": 1,
            "mlp_layer_types": ["dense", "sparse", "dense"],
        },
    ),
    "bloom": ("BloomConfig", {"n_layer": 2, "n_head": 4}),
    "mpt": ("MptConfig", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 512}),
    "gpt_neo": (
        "GPTNeoConfig",
        {
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": WINDOW,
        },
    ),
    "doge": ("DogeConfig", {"keep_window_size": 512}),
    "diffllama": ("DiffLlamaConfig", {}),
    "mamba": ("MambaConfig", {"state_size": 4, "num_hidden_layers": 2}),
}
"""Configurations by name; of those that the installed transformers has."""

_OWN_SHAPE = ("bloom", "mpt", "gpt_neo", "mamba")
"""Families whose settings have other names than `SHAPE`."""

_RECURRENT = (
    "qwen3_next", "qwen3_5_text", "kimi_linear", "nemotron_h", "granitemoehybrid", "falcon_h1", "lfm2",
)  # fmt: skip
_TAKES_SEVERAL = hasattr(cache_utils, "LinearAttentionLayer")
"""True if recurrent models take several tokens after a state: older transformers began anew with them."""

KNOWN = tuple(
    name
    for name, (config, _) in FAMILIES.items()
    if hasattr(transformers, config) and (_TAKES_SEVERAL or name not in _RECURRENT)
)
"""Families that the installed transformers can verify chains with, or trees, or nothing for Mamba."""


def make_family(name: str, seed: int = 0, **options: Any) -> Any:
    """A model of `FAMILIES` in float32, for inference, whose text is not one token over and over."""
    kind, extra = FAMILIES[name]
    shape = {key: SHAPE[key] for key in ("vocab_size", "hidden_size")} if name in _OWN_SHAPE else SHAPE
    ends = {key: None for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    given = {**shape, "initializer_range": 0.3, **ends, **extra, **options}
    given = {key: value for key, value in given.items() if not (key == "num_hidden_layers" and value is None)}
    torch.manual_seed(seed)
    config = getattr(transformers, kind)(**copy.deepcopy(given))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for part_name, part in model.named_parameters():
            if part_name.endswith(".A"):  # Doge keeps no key before another one where all are zero
                torch.nn.init.normal_(part)
        model.get_input_embeddings().weight.mul_(0.1 if getattr(config, "tie_word_embeddings", True) else 1.0)
    own = model.generation_config
    own.eos_token_id = own.pad_token_id = own.bos_token_id = None
    return model
