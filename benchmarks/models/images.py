"""A prompt with an image, for any class whose placeholders and pixels can be found by trying."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.models.tiny import random_prompt

__all__ = ["image_prompt"]

_PLACEHOLDERS = (
    "image_token_id", "image_token_index", "image_patch_id", "image_pad_token_id", "img_context_token_id",
    "media_placeholder_token_id",
)  # fmt: skip
_PATCHES = 4
"""Patches along each side of an image that comes as a grid."""
_MOST = 2000
"""Placeholders of the longest prompt: tiny models read short texts."""


def image_prompt(model: Any, seed: int = 0) -> tuple[Tensor, Tensor, dict[str, Any]] | None:
    """A prompt of random text around one random image.

    The model itself tells how many tokens an image takes, in `get_image_features`.

    Args:
        model: Of an image-text class.
        seed: Of the text and the image.

    Returns:
        Ids and mask, int64, shape (1, length), and the other arguments of `model.generate`. None where no
        input works, or where the text does not depend on the image.
    """
    image = next(
        (ids for name in _PLACEHOLDERS if isinstance(ids := getattr(model.config, name, None), int)), None
    )
    features = getattr(model, "get_image_features", None)
    if image is None or features is None:
        return None
    names = inspect.signature(features).parameters
    for made in _pixels(model, seed):
        # Not every class converts them to its own kind.
        pixels = {
            name: value.to(model.dtype) if value.is_floating_point() else value
            for name, value in made.items()
        }
        given = {name: value for name, value in pixels.items() if name in names}
        try:
            with torch.no_grad():
                tokens = _token_count(features(**given))
        except Exception:  # noqa: S112 - these are no inputs for this class
            continue
        if 0 < tokens <= _MOST:
            found = _prompt(model, image, tokens, pixels, seed)
            if found is not None:
                return found
    return None


def _prompt(
    model: Any, image: int, tokens: int, pixels: dict[str, Tensor], seed: int
) -> tuple[Tensor, Tensor, dict[str, Any]] | None:
    """The prompt, if the model generates with it and the image changes what it predicts."""
    text = random_prompt(24, seed + 8)
    ids = torch.cat([text[:, :8], torch.full((1, tokens), image), text[:, 8:]], 1)
    mask = torch.ones_like(ids)
    kinds = (ids == image).long()
    taken = inspect.signature(model.forward).parameters
    more = {name: kinds for name in ("token_type_ids", "mm_token_type_ids") if name in taken}
    other = {**pixels, "pixel_values": pixels["pixel_values"].flip(-1) + 0.5}
    options = {"max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True, "pad_token_id": 0}
    try:
        first, second = (
            model.generate(ids, attention_mask=mask, **given, **more, **options).logits[0]
            for given in (pixels, other)
        )
    except Exception:  # the class wants other ids beside the image
        return None
    return None if torch.equal(first, second) else (ids, mask, {**pixels, **more})


def _pixels(model: Any, seed: int) -> Iterator[dict[str, Tensor]]:
    """Inputs of the usual shapes: a picture, one with its size, a grid of patches, tiles of a picture."""
    config = getattr(model.config, "vision_config", model.config)
    generator = torch.Generator().manual_seed(seed + 3)

    def number(name: str, default: int) -> int:
        value = getattr(config, name, None)
        value = value[0] if isinstance(value, list | tuple) and value else value
        return value if isinstance(value, int) else default

    channels = number("in_channels", number("num_channels", 3))
    patch = number("patch_size", 14)
    grid = torch.tensor([[1, _PATCHES, _PATCHES]])
    for frames in sorted({number("temporal_patch_size", 1), 1}, reverse=True):
        flat = torch.randn(_PATCHES**2, channels * frames * patch**2, generator=generator)
        yield {"pixel_values": flat, "image_grid_thw": grid}
        yield {"pixel_values": flat.view(_PATCHES**2, channels, patch, -1), "image_grid_thw": grid}
    side = 3  # Gemma 4 pools three patches by three
    positions = torch.cartesian_prod(torch.arange(side), torch.arange(side)).flip(-1)[None]
    rows = torch.rand(1, side**2, channels * patch**2, generator=generator)
    yield {"pixel_values": rows, "image_position_ids": positions}
    rows = torch.randn(1, _PATCHES**2, channels * patch**2, generator=generator)
    shapes = torch.tensor([[_PATCHES, _PATCHES]])
    seen = torch.ones(1, _PATCHES**2, dtype=torch.int64)
    yield {"pixel_values": rows, "spatial_shapes": shapes, "pixel_attention_mask": seen}
    for size in sorted({number("image_size", _PATCHES * patch), _PATCHES * patch}):
        picture = torch.randn(1, channels, size, size, generator=generator)
        sizes = torch.tensor([[size, size]])
        yield {"pixel_values": picture}
        yield {"pixel_values": picture, "image_sizes": sizes}
        tiles = picture[None]
        yield {"pixel_values": tiles, "pixel_attention_mask": torch.ones_like(tiles[:, :, 0]).long()}
        yield {"pixel_values": tiles.repeat(1, 2, 1, 1, 1), "image_sizes": sizes}


def _token_count(features: Any) -> int:
    """Rows of what an image becomes: a tensor, a list of them, or an output that holds either."""
    features = getattr(features, "pooler_output", features)
    if isinstance(features, Tensor):
        return int(features.shape[:-1].numel())
    return sum(_token_count(part) for part in features)
