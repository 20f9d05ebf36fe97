"""Data for tiny models: sizes by the names of settings, and settings by the names of families."""

from __future__ import annotations

from typing import Any

__all__ = [
    "DEFAULTS",
    "HEADS",
    "HEAD_WIDTH",
    "IMAGE_TEXT_SETTINGS",
    "KEY_HEADS",
    "LATE_SETTINGS",
    "LAYERS",
    "LAYER_COUNTS",
    "NO_IDS",
    "NO_TEXT",
    "SETTINGS",
    "SIZES",
    "TEXT_IDS",
    "VARIANTS",
    "VOCABULARY",
    "WINDOW",
]

VOCABULARY, HIDDEN, HEADS, HEAD_WIDTH, LAYERS, WINDOW = 211, 64, 4, 16, 4, 16

TEXT_IDS = range(3, 150)
"""Token ids of prompts; special tokens have ids below and above."""

_ROWS: tuple[tuple[int, str], ...] = (
    (
        VOCABULARY,
        "vocab_size unpadded_vocab_size vocab_size_per_layer_input decoder_vocab_size",
    ),
    (
        HIDDEN,
        "hidden_size d_model n_embd emb_dim embedding_dim embedding_size input_embedding_size "
        "output_embedding_size word_embed_proj_dim attention_hidden_size lru_width hidden_size_global "
        "dim_model_base backbone_hidden_size out_hidden_size text_hidden_size mm_hidden_size",
    ),
    (
        96,
        "intermediate_size ffn_hidden_size ffn_dim decoder_ffn_dim encoder_ffn_dim d_ff dff dim_ff d_inner "
        "feed_forward_size intermediate_size_mlp dense_intermediate_size mlp_dim n_inner "
        "expert_ffn_hidden_size",
    ),
    (
        48,
        "moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size "
        "moe_shared_expert_intermediate_size shared_intermediate_size",
    ),
    (
        LAYERS,
        "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers num_blocks "
        "encoder_layers num_encoder_layers",
    ),
    (2, "depth conf_num_hidden_layers num_global_layers num_layers_per_stack"),
    (
        HEADS,
        "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
        "attention_heads num_encoder_attention_heads num_decoder_attention_heads conf_num_attention_heads "
        "swa_num_attention_heads",
    ),
    (
        HEAD_WIDTH,
        "head_dim dim_head d_head d_kv kv_channels swa_head_dim linear_key_head_dim linear_value_head_dim "
        "linear_head_dim",
    ),
    (
        16,
        "kv_lora_rank qk_nope_head_dim v_head_dim o_lora_rank adapter_rank laurel_rank "
        "hidden_size_per_layer_input mamba_d_head mamba_head_dim mamba_chunk_size chunk_size",
    ),
    (32, "q_lora_rank index_head_dim index_topk router_hidden_size"),
    (64, "index_n_heads"),  # of few heads all give 0 for many keys, which then are equal
    (24, "qk_head_dim"),
    (
        8,
        "qk_rope_head_dim rotary_dim d_rel num_experts num_local_experts n_routed_experts moe_num_experts "
        "mamba_n_heads mamba_num_heads mamba_d_state ssm_state_size state_size mamba_dt_rank time_step_rank "
        "log_scaling_n_floor floor_scale",
    ),
    (2, "num_experts_per_tok num_experts_per_token moe_k moe_topk moe_top_k n_group num_expert_group"),
    (1, "topk_group"),
    (4, "linear_num_heads linear_num_key_heads linear_num_value_heads"),
    (128, "mamba_d_ssm keep_window_size"),
    (
        512,
        "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions context_length "
        "model_max_length original_max_position_embeddings",
    ),
    (
        WINDOW,
        "sliding_window attention_chunk_size local_attention attention_window_size window_size "
        "sliding_window_size local_attn_chunk_length lsh_attn_chunk_length",
    ),
)

SIZES: dict[str, int] = {name: size for size, names in _ROWS for name in names.split()}
"""Largest value of a setting, by its name, in the configuration of any family."""

KEY_HEADS = (
    "num_key_value_heads",
    "num_kv_heads",
    "swa_num_key_value_heads",
    "kv_n_heads",
    "num_query_groups",
)
"""Settings that become the number of heads where they equal it, and 2 elsewhere."""

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
"""Names under which configurations hold the number of layers, the first found counts."""

NO_IDS = (
    "eos_token_id", "bos_token_id", "sep_token_id", "decoder_start_token_id", "forced_eos_token_id",
    "forced_bos_token_id",
)  # fmt: skip
"""Special tokens that tiny models do not have: no text ends or begins by itself."""

DEFAULTS = (
    "transformers_version", "architectures", "id2label", "label2id", "num_labels", "dtype", "return_dict",
    "problem_type",
)  # fmt: skip
"""Settings that are left at their defaults."""

_WINDOWED = ["sliding_attention", "full_attention"] * 2
_LINEAR = ["linear_attention", "full_attention"] * 2
_CONVOLUTION = ["conv", "full_attention"] * 2
_FULL = ["full_attention"] * 4
_ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4}
_MROPE: dict[str, Any] = {**_ROPE, "mrope_section": [2, 3, 3]}
_LONGROPE: dict[str, Any] = {
    **_ROPE, "rope_type": "longrope", "factor": 4.0, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
    "original_max_position_embeddings": 64,
}  # fmt: skip

SETTINGS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "blenderbot": {"encoder_layers": LAYERS},
    "blt": {
        "patch_in_forward": False,
        "encoder_hash_byte_group_size": [2, 3],
        "encoder_hash_byte_group_vocab": 64,
    },
    "cohere_compass_text": {
        "layer_types": _WINDOWED,
        "rope_parameters": {kind: _MROPE for kind in sorted(set(_WINDOWED))},
    },
    "deepseek_v2": {
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
        "topk_method": "group_limited_greedy",
    },
    "deepseek_v3": {"first_k_dense_replace": 1},
    "dots1": {
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    },
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 16,
    },
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "num_hidden_layers": 6,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.95, 0.0, 0.95, 0.0, 0.0, 0.0],
        "intermediate_size": [96] * 6,
    },
    "glm4_moe": {"first_k_dense_replace": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": _LINEAR},
    "hrm_text": {"num_layers_per_stack": None, "num_hidden_layers": 2},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "kolibri1": {"num_local_experts": 8},
    "laguna": {"layer_types": _WINDOWED, "num_attention_heads_per_layer": [4, 4, 4, 4]},
    "lfm2": {"layer_types": _CONVOLUTION, "num_hidden_layers": 4, "full_attn_idxs": None},
    "lfm2_moe": {"layer_types": _CONVOLUTION},
    "longcat_flash": {"head_dim": 8, "zero_expert_num": 2, "num_layers": 2},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "hc_lowrank": 8,
    },
    "reformer": {"axial_pos_embds": False},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128, "autocast_kernel_dtype": "float32"},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": [*["linear_attention"] * 2, "hybrid", "linear_attention", "hybrid"],
        "num_hidden_layers": 5,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
}
"""Settings of a family that no rule of `SIZES` finds."""

SETTINGS |= {
    "dots3_note": {
        "text_config": SETTINGS["dots3_note_text"],
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
    },
    "gemma3n": {"text_config": SETTINGS["gemma3n_text"]},
    "qwen4_exp": {"text_config": SETTINGS["qwen4_exp_text"]},
}

_MROPE_TEXT: dict[str, Any] = {"text_config": {"rope_parameters": _MROPE}}

_WINDOWED_VISION: dict[str, Any] = {"vision_config": {"window_size": 112}}

IMAGE_TEXT_SETTINGS: dict[str, dict[str, Any]] = {
    "aria": {"projector_patch_to_query_dict": {49: 4}},
    "chameleon": {"vocabulary_map": {"<image>": 200, "IMGIMGA": 201}},
    "cohere_compass": {"text_config": SETTINGS["cohere_compass_text"]},
    "emu3": {"vocabulary_map": {"<|extra_0|>": 200, "<image>": 201, "<|visual token 000000|>": 202}},
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": {**_ROPE, "mrope_section": [3, 3, 2]}}},
    "exaone4_5": _WINDOWED_VISION,
    "gemma3": {"vision_config": {"image_size": 64}, "mm_tokens_per_image": 4},
    "glm46v": _MROPE_TEXT,
    "glm4v": _MROPE_TEXT,
    "glm4v_moe": {
        "text_config": {
            "rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
        }
    },
    "glm5_next": {"text_config": {"index_topk": 16, "index_kpool": 4}},
    "glm_ocr": _MROPE_TEXT,
    "glmga": _MROPE_TEXT,
    "kosmos-2.5": {
        "text_config": {"embed_dim": 32, "layers": 2, "attention_heads": 4},
        "latent_query_num": 8,
    },
    "hy_v4_vl": {"text_config": {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}}},
    "hyperclovax_vision_v2": _WINDOWED_VISION,
    "llava_next": {"image_grid_pinpoints": [[224, 224]]},
    "llava_next_video": {"image_grid_pinpoints": [[224, 224]]},
    "llava_onevision": {"image_grid_pinpoints": [[384, 384]]},
    "mistral4": {
        "head_dim": 16,
        "rope_parameters": {
            **_ROPE,
            "partial_rotary_factor": 0.5,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 64,
        },
    },
    "molmo2": {"adapter_config": {"vision_feature_layer": [3, 2]}},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "paddleocr_vl": _MROPE_TEXT,
    "paligemma": {"hidden_size": 64, "projection_dim": 64, "text_config": {"num_key_value_heads": 4}},
    "qwen2_5_omni_thinker": {**_MROPE_TEXT, **_WINDOWED_VISION},
    "qwen2_5_vl": {**_MROPE_TEXT, **_WINDOWED_VISION},
    "qwen2_vl": _MROPE_TEXT,
    "step3p7": {"text_config": {"sliding_window": WINDOW}},
}
"""The same for image-text classes, which add to `SETTINGS`."""

LATE_SETTINGS: dict[str, dict[str, Any]] = {
    "blt": {"num_attention_heads": HEADS, "num_hidden_layers": LAYERS, "hidden_size": HIDDEN},
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0},
}
"""Settings that a configuration takes only once it is made, by their dotted names."""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "bamba:full": ("bamba", {"attn_layer_indices": [0, 1, 2, 3]}),
    "bert:encoder": ("bert", {"is_decoder": False}),
    "deepseek_v2:dense": ("deepseek_v2", {"first_k_dense_replace": 4}),
    "deepseek_v32:ties": ("deepseek_v32", {"index_n_heads": 4, "index_topk": 96}),
    "doge:wide": ("doge", {"keep_window_size": 512}),
    "falcon:alibi": ("falcon", {"alibi": True}),
    "falcon:new": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "gemma3_text:bidirectional": ("gemma3_text", {"use_bidirectional_attention": True}),
    "gemma4_text:moe": (
        "gemma4_text",
        {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 48},
    ),
    "gemma4_text:shared": (
        "gemma4_text",
        {"layer_types": _WINDOWED * 2, "num_hidden_layers": 8, "num_kv_shared_layers": 4},
    ),
    "gpt_neo:wide": ("gpt_neo", {"window_size": 256}),
    "granitemoehybrid:full": ("granitemoehybrid", {"layer_types": _FULL}),
    "lfm2:full": ("lfm2", {"layer_types": _FULL, "num_hidden_layers": 4}),
    "llama:dynamic": (
        "llama",
        {
            "max_position_embeddings": 64,
            "rope_parameters": {**_ROPE, "rope_type": "dynamic", "factor": 4.0},
        },
    ),
    "llama:longrope": ("llama", {"max_position_embeddings": 256, "rope_parameters": _LONGROPE}),
    "llama:tied": ("llama", {"tie_word_embeddings": True}),
    "llama:yarn": (
        "llama",
        {
            "rope_parameters": {
                **_ROPE,
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            }
        },
    ),
    "minimax:full": ("minimax", {"layer_types": _FULL}),
    "mistral:full": ("mistral", {"sliding_window": None}),
    "mixtral:sliding": ("mixtral", {"sliding_window": WINDOW}),
    "mpt:rope": ("mpt", {"attn_config": {"alibi": False}}),
    "nemotron_h:full": (
        "nemotron_h",
        {"layers_block_type": ["full_attention", "mlp", "full_attention", "moe"]},
    ),
    "phi3:longrope": (
        "phi3",
        {
            "max_position_embeddings": 256,
            "original_max_position_embeddings": 64,
            "rope_parameters": _LONGROPE,
        },
    ),
    "phi3:sliding": ("phi3", {"sliding_window": WINDOW}),
    "qwen2:sliding": ("qwen2", {"use_sliding_window": True, "layer_types": _WINDOWED}),
    "qwen2_moe:sliding": ("qwen2_moe", {"use_sliding_window": True, "layer_types": _WINDOWED}),
    "qwen3:sliding": ("qwen3", {"use_sliding_window": True, "layer_types": _WINDOWED}),
    "qwen3_moe:sliding": ("qwen3_moe", {"use_sliding_window": True}),
    "roberta:encoder": ("roberta", {"is_decoder": False}),
    "starcoder2:sliding": ("starcoder2", {"sliding_window": WINDOW}),
}
"""Family and settings of further models, for families whose defaults leave out what people run."""

NO_TEXT = {
    "gemma4_assistant": "drafts for another model, and takes that one's keys and hidden states",
    "gemma4_unified_assistant": "drafts for another model, and takes that one's keys and hidden states",
    "musicgen": "several codebooks of audio at each position",
    "musicgen_melody": "several codebooks of audio at each position",
}
"""Causal classes that generate no text by themselves, with the reason."""
