"""Random LoRA adapters of tiny models."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import torch


def save_adapter(model: Any, folder: Path, seed: int) -> Path:
    """Writes an adapter of `model`, which is left as it is."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False, lora_alpha=16,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    peft.get_peft_model(copy.deepcopy(model), config).save_pretrained(str(folder))
    return folder
