"""Left-padded batches of random prompts."""

from __future__ import annotations

import torch

from tests.support.drafters import prompt_ids

LENGTHS = (5, 23, 40, 17, 60, 9, 31, 12)


def padded(prompts: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids and attention_mask of prompts of shape (1, length) each, padded with token 0."""
    width = max(prompt.shape[1] for prompt in prompts)
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - prompt.shape[1] :] = prompt[0]
        mask[row, width - prompt.shape[1] :] = 1
    return ids, mask


def ragged(lengths: tuple[int, ...] = LENGTHS) -> list[torch.Tensor]:
    """Different prompts of these lengths."""
    return [prompt_ids(length, seed=row + 3) for row, length in enumerate(lengths)]
