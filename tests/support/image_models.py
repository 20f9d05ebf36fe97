"""Tiny models with random weights that read images, and prompts with images for them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from tests.support.models import SHAPE

IMAGE = 95
"""The id that stands for a part of an image."""
MARKS = (93, 94, 96)
"""Ids that the configurations name for the beginning and end of images, and for videos."""

_TEXT: dict[str, Any] = {**SHAPE, "num_hidden_layers": 2, "tie_word_embeddings": False}
_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.3,
}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}


def _gemma3() -> Any:
    text = {
        **_TEXT,
        "query_pre_attn_scalar": 8,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    return transformers.Gemma3Config(
        text_config=text,
        vision_config={**_VISION, "image_size": 32, "patch_size": 8},
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=93,
        eoi_token_index=94,
        initializer_range=0.3,
    )


def _llava() -> Any:
    return transformers.LlavaConfig(
        text_config={**_TEXT, "model_type": "llama"},
        vision_config={**_VISION, "model_type": "clip_vision_model", "image_size": 16, "patch_size": 8},
        image_token_index=IMAGE,
        image_seq_length=4,
    )


def _mistral3() -> Any:
    return transformers.Mistral3Config(
        text_config={**_TEXT, "model_type": "mistral", "sliding_window": 16},
        vision_config={
            **_VISION,
            "model_type": "pixtral",
            "head_dim": 8,
            "image_size": 32,
            "patch_size": 8,
        },
        image_token_index=IMAGE,
        spatial_merge_size=2,
        vision_feature_layer=-1,
    )


def _internvl() -> Any:
    return transformers.InternVLConfig(
        text_config={**_TEXT, "model_type": "qwen2"},
        vision_config={
            **_VISION,
            "model_type": "internvl_vision",
            "image_size": [32, 32],
            "patch_size": [8, 8],
        },
        image_token_id=IMAGE,
        image_seq_length=4,
        downsample_ratio=0.5,
    )


def _idefics3(kind: str) -> Callable[[], Any]:
    def make() -> Any:
        return getattr(transformers, f"{kind}Config")(
            text_config={**_TEXT, "model_type": "llama"},
            vision_config={**_VISION, "image_size": 32, "patch_size": 8},
            image_token_id=IMAGE,
            scale_factor=2,
            tie_word_embeddings=False,
            pad_token_id=0,
        )

    return make


def _qwen(kind: str, text: dict[str, Any], vision: dict[str, Any]) -> Callable[[], Any]:
    def make() -> Any:
        return getattr(transformers, f"{kind}Config")(
            text_config={**_TEXT, **text},
            vision_config={"depth": 2, "num_heads": 2, "patch_size": 8, "intermediate_size": 24, **vision},
            image_token_id=IMAGE,
            video_token_id=96,
            vision_start_token_id=93,
            vision_end_token_id=94,
            tie_word_embeddings=False,
        )

    return make


_QWEN2 = {"rope_parameters": _MROPE}
CLASSES: dict[str, tuple[str, Callable[[], Any]]] = {
    "gemma3": ("Gemma3ForConditionalGeneration", _gemma3),
    "llava": ("LlavaForConditionalGeneration", _llava),
    "mistral3": ("Mistral3ForConditionalGeneration", _mistral3),
    "internvl": ("InternVLForConditionalGeneration", _internvl),
    "idefics3": ("Idefics3ForConditionalGeneration", _idefics3("Idefics3")),
    "smolvlm": ("SmolVLMForConditionalGeneration", _idefics3("SmolVLM")),
    "qwen2_5_vl": (
        "Qwen2_5_VLForConditionalGeneration",
        _qwen(
            "Qwen2_5_VL",
            _QWEN2,
            {"hidden_size": 16, "out_hidden_size": 32, "window_size": 32, "fullatt_block_indexes": [1]},
        ),
    ),
    "qwen3_vl": (
        "Qwen3VLForConditionalGeneration",
        _qwen(
            "Qwen3VL",
            {"rope_parameters": {**_MROPE, "mrope_interleaved": True}},
            {
                "hidden_size": 16,
                "out_hidden_size": 32,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            },
        ),
    ),
}
"""Class and configuration of models by name."""


def make_image_model(name: str, seed: int = 0) -> Any:
    """A model in float32, for inference."""
    kind, config = CLASSES[name]
    torch.manual_seed(seed)
    made = config()
    made._attn_implementation = "sdpa"
    model = getattr(transformers, kind)(made).eval()
    for part in model.modules():
        if isinstance(part, (torch.nn.Linear, torch.nn.Embedding, torch.nn.Conv2d, torch.nn.Conv3d)):
            torch.nn.init.normal_(part.weight, std=0.3)
    for weight in model.parameters():
        if weight.ndim > 1 and not weight.any():  # Gemma 3's projection of images
            torch.nn.init.normal_(weight, std=0.3)
    if name == "gemma3":  # else the newest token's own embedding outweighs all else
        torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.02)
    with torch.no_grad():
        model.get_output_embeddings().weight[[IMAGE, *MARKS]] = 0.0  # so that replies are text
    given = model.generation_config
    given.bos_token_id = given.eos_token_id = given.pad_token_id = None
    return model


def image_inputs(name: str, images: Sequence[int], seed: int = 0) -> dict[str, Tensor]:
    """Inputs that a processor makes beside the ids: of `images[row]` random images in each row."""
    made = torch.Generator().manual_seed(seed)
    count = sum(images)
    if name.startswith("qwen"):
        return {
            "pixel_values": torch.randn(count * 16, 3 * 2 * 8 * 8, generator=made),
            "image_grid_thw": torch.tensor([[1, 4, 4]] * count),
        }
    size = 16 if name == "llava" else 32
    pixels = torch.randn(count, 3, size, size, generator=made)
    if name == "mistral3":
        return {"pixel_values": pixels, "image_sizes": torch.tensor([[size, size]] * count)}
    if name in ("idefics3", "smolvlm"):
        assert len(set(images)) == 1, "each row has as many"
        pixels = pixels.view(len(images), images[0], 3, size, size)
        return {"pixel_values": pixels, "pixel_attention_mask": torch.ones_like(pixels[:, :, 0]).long()}
    return {"pixel_values": pixels}


def image_prompt(
    name: str, model: Any, lengths: Sequence[int] = (20,), images: int = 1, seed: int = 0
) -> dict[str, Tensor]:
    """Prompts of random text with images in it, left-padded, as arguments of `model.generate`.

    Args:
        name: Of the model.
        model: For the arguments that it takes.
        lengths: Tokens of text of each.
        images: In each, 4 tokens long.
        seed: Of texts and images.
    """
    made = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        text = torch.randint(3, 90, (length,), generator=made)
        parts = list(text.split(-(-length // (images + 1))))
        for image in range(images):
            parts.insert(2 * image + 1, torch.tensor([93, *[IMAGE] * 4, 94]))
        rows.append(torch.cat(parts))
    width = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in rows])
    mask = torch.stack([(torch.arange(width) >= width - len(row)).long() for row in rows])
    inputs = {"input_ids": ids, "attention_mask": mask, **image_inputs(name, [images] * len(rows), seed)}
    kinds = (ids == IMAGE).long()
    taken = inspect.signature(model.forward).parameters
    for types in ("token_type_ids", "mm_token_type_ids"):
        if types in taken:
            inputs[types] = kinds
    return inputs
