"""Tiny random heads, written as their publishers write them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from tests.support.models import GEMMA4, SHAPE, WINDOW

SIZE, INNER, HEADS, GROUPS, DIM = 32, 48, 4, 2, 8
COLUMNS = 40
"""Tokens of EAGLE-3's own vocabulary."""

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": SIZE,
    "intermediate_size": INNER,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "num_hidden_layers": 1,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "vocab_size": 97,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}


def _random(*shape: int) -> Tensor:
    return torch.randn(shape) * 0.3


def _layer(prefix: str, width: int, *norms: str) -> dict[str, Tensor]:
    weights = {
        "self_attn.q_proj.weight": _random(HEADS * DIM, width),
        "self_attn.k_proj.weight": _random(GROUPS * DIM, width),
        "self_attn.v_proj.weight": _random(GROUPS * DIM, width),
        "self_attn.o_proj.weight": _random(SIZE, HEADS * DIM),
        "mlp.gate_proj.weight": _random(INNER, SIZE),
        "mlp.up_proj.weight": _random(INNER, SIZE),
        "mlp.down_proj.weight": _random(SIZE, INNER),
    }
    weights |= {f"{norm}.weight": 1 + _random(SIZE) for norm in norms}
    return {f"{prefix}.{name}": weight for name, weight in weights.items()}


def _own_vocabulary(vocabulary: int = 97) -> dict[str, Tensor]:
    kept = torch.randperm(vocabulary)[:COLUMNS].sort().values
    marks = torch.zeros(vocabulary, dtype=torch.bool)
    marks[kept] = True
    return {"d2t": kept - torch.arange(COLUMNS), "t2d": marks}


def _eagle3_weights(layer: str) -> dict[str, Tensor]:
    return {
        "fc.weight": _random(SIZE, 3 * SIZE),
        **_layer(layer, 2 * SIZE, "hidden_norm", "input_layernorm", "post_attention_layernorm"),
        "norm.weight": 1 + _random(SIZE),
        "lm_head.weight": _random(COLUMNS, SIZE),
        **_own_vocabulary(),
    }


def _eagle() -> tuple[dict[str, Any], dict[str, Tensor]]:
    weights = {"embed_tokens.weight": _random(97, SIZE), "fc.weight": _random(SIZE, 2 * SIZE)}
    return LLAMA, {
        **weights,
        "fc.bias": _random(SIZE),
        **_layer("layers.0", SIZE, "post_attention_layernorm"),
    }


def _speculators_eagle() -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = {
        "architectures": ["EagleSpeculator"], "speculators_model_type": "eagle", "layernorms": False,
        "fusion_bias": False, "transformer_layer_config": LLAMA,
    }  # fmt: skip
    layer = _layer("transformer", SIZE, "post_attention_layernorm")
    return config, {"fusion_fc.weight": _random(SIZE, 2 * SIZE), **layer}


def _eagle3() -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = {**LLAMA, "architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": COLUMNS}
    return config | {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 2]}}, _eagle3_weights(
        "midlayer"
    )


def _speculators_eagle3() -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = {
        "architectures": ["Eagle3DraftModel"], "speculators_model_type": "eagle3",
        "draft_vocab_size": COLUMNS, "norm_before_residual": True, "norm_before_fc": False,
        "eagle_aux_hidden_state_layer_ids": [1, 2, 0],
        "target_hidden_size": None, "transformer_layer_config": LLAMA,
    }  # fmt: skip
    return config, {"embed_tokens.weight": _random(97, SIZE), **_eagle3_weights("layers.0")}


def _medusa() -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = {"medusa_num_heads": 3, "medusa_num_layers": 1, "base_model_name_or_path": "tiny"}
    weights = {}
    for head in range(3):
        weights |= {
            f"{head}.0.linear.weight": _random(SIZE, SIZE), f"{head}.0.linear.bias": _random(SIZE),
            f"{head}.1.weight": _random(97, SIZE),
        }  # fmt: skip
    return config, weights


def _mlp_speculator() -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = {
        "architectures": ["MLPSpeculatorPreTrainedModel"], "model_type": "mlp_speculator", "emb_dim": SIZE,
        "inner_dim": 24, "n_predict": 3, "vocab_size": 97, "tie_weights": True, "scale_input": True,
    }  # fmt: skip
    weights = {
        "emb.0.weight": _random(97, 24), "proj.0.weight": _random(24, SIZE), "proj.1.weight": _random(24, 24),
        "head.0.weight": _random(97, 24), "ln.0.weight": 1 + _random(24), "ln.0.bias": _random(24),
    }  # fmt: skip
    return config, {f"speculator.{name}": weight for name, weight in weights.items()}


def _hydra() -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = {
        "hydra_num_heads": 3, "hydra_num_layers": 2, "hydra_head_arch": "mlp", "grounded_heads": True,
        "hidden_state_offset": 0, "base_model_name_or_path": "tiny",
    }  # fmt: skip
    weights = {}
    for head in range(3):
        joined = SIZE * (head + 2)
        for part in ("linear", "res_connection"):
            weights[f"hydra_mlp.{head}.0.{part}.weight"] = _random(SIZE, joined)
            weights[f"hydra_mlp.{head}.0.{part}.bias"] = _random(SIZE)
        weights |= {
            f"hydra_mlp.{head}.1.linear.weight": _random(SIZE, SIZE),
            f"hydra_mlp.{head}.1.linear.bias": _random(SIZE),
            f"hydra_lm_head.{head}.weight": _random(97, SIZE), f"hydra_lm_head.{head}.bias": _random(97),
        }  # fmt: skip
    return config, weights


def _redrafter() -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = {
        "model_type": "recurrent_drafting_drafter", "vocab_size": 97, "hidden_size": SIZE, "exit_dim": 48,
        "num_draft_layers": 2, "num_lookback_tokens": 1, "rnn": True, "architectures": ["Drafter"],
    }  # fmt: skip
    weights = {
        "input_proj.weight": _random(48, 2 * SIZE), "input_proj.bias": _random(48),
        "lm_head.2.weight": _random(97, 48), "rnn_w.weight": _random(SIZE, SIZE),
        "rnn_u.weight": _random(SIZE, SIZE), "rnn_u.bias": _random(SIZE),
    }  # fmt: skip
    for block in range(2):
        weights |= {
            f"lm_head.{block}.linear.weight": _random(48, 48),
            f"lm_head.{block}.linear.bias": _random(48),
        }
    return config, weights


def _dflash() -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = {
        **LLAMA, "architectures": ["DFlashDraftModel"], "model_type": "qwen3", "num_hidden_layers": 2,
        "head_dim": DIM, "block_size": 4, "num_target_layers": 3,
        "dflash_config": {"mask_token_id": 96, "target_layer_ids": [0, 2]},
    }  # fmt: skip
    weights = {"fc.weight": _random(SIZE, 2 * SIZE)}
    weights |= {f"{norm}.weight": 1 + _random(SIZE) for norm in ("hidden_norm", "norm")}
    for layer in range(2):
        weights |= _layer(f"layers.{layer}", SIZE, "input_layernorm", "post_attention_layernorm")
        weights |= {f"layers.{layer}.self_attn.{each}_norm.weight": 1 + _random(DIM) for each in "qk"}
    return config, weights


def _speculators_dflash() -> tuple[dict[str, Any], dict[str, Tensor]]:
    given, weights = _dflash()
    layers = {key: given.pop(key) for key in [*LLAMA, "head_dim"] if key != "architectures"}
    config = {
        "architectures": ["DFlashSpeculator"], "speculators_model_type": "dflash", "block_size": 4,
        "transformer_layer_config": layers, "draft_vocab_size": COLUMNS, "mask_token_id": 96,
        "aux_hidden_state_layer_ids": [0, 2], "target_hidden_size": None, "sample_from_anchor": False,
    }  # fmt: skip
    own = {"lm_head.weight": _random(COLUMNS, SIZE), "embed_tokens.weight": _random(97, SIZE)}
    return config, {**weights, **own, **_own_vocabulary()}


def assistant_model(**options: Any) -> Any:
    """A tiny assistant of Gemma 4 for targets of `tests.support.models.GEMMA4`.

    Args:
        **options: Of its configuration.
    """
    shape = {**SHAPE, "hidden_size": 24, "num_hidden_layers": 2, "num_kv_shared_layers": 2}
    kinds = ["sliding_attention", "full_attention"]
    own = {"layer_types": kinds, "sliding_window": WINDOW, "global_head_dim": 16}
    plain = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    text = transformers.Gemma4TextConfig(**shape, **own, **plain)
    config = transformers.Gemma4AssistantConfig(text_config=text, backbone_hidden_size=SIZE, **options)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def _assistant(unified: str = "") -> tuple[dict[str, Any], dict[str, Tensor]]:
    model = assistant_model()
    config = json.loads(model.config.to_json_string())
    config["model_type"] = f"gemma4{unified}_assistant"
    config["text_config"]["model_type"] = f"gemma4{unified}_text"
    weights = {name: each.clone() for name, each in model.state_dict().items() if name != "lm_head.weight"}
    return config, weights


LAYOUTS: dict[str, Callable[[], tuple[dict[str, Any], dict[str, Tensor]]]] = {
    "eagle": _eagle,
    "speculators eagle": _speculators_eagle,
    "eagle3": _eagle3,
    "speculators eagle3": _speculators_eagle3,
    "medusa": _medusa,
    "mlp_speculator": _mlp_speculator,
    "hydra": _hydra,
    "recurrent_drafting_drafter": _redrafter,
    "dflash": _dflash,
    "speculators dflash": _speculators_dflash,
    "gemma4_assistant": _assistant,
    "gemma4_unified_assistant": lambda: _assistant("_unified"),
}

HAS_ASSISTANTS = hasattr(transformers, "Gemma4AssistantConfig")


def cases(targets: Sequence[str]) -> list[Any]:
    """Each layout with each of the targets, or those whose keys it reads: (layout, target)."""
    found = []
    for layout in LAYOUTS:
        reads_keys = layout.endswith("_assistant")
        marks = [pytest.mark.skipif(reads_keys and not HAS_ASSISTANTS, reason="an older transformers")]
        found += [pytest.param(layout, each, marks=marks) for each in (GEMMA4 if reads_keys else targets)]
    return found


def write_head(folder: Path, layout: str, **config: Any) -> str:
    """Writes a head of a layout for a target of 97 tokens and width 32, and returns its name."""
    torch.manual_seed(3)
    given, weights = LAYOUTS[layout]()
    (folder / "config.json").write_text(json.dumps({**given, **config}))
    if layout in ("medusa", "hydra"):
        torch.save(weights, folder / f"{layout}_lm_head.pt")
    elif layout == "eagle":
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        save_file(weights, folder / "model.safetensors")
    return str(folder)
