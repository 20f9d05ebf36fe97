"""Several texts from one prompt, printed when all are complete."""

from __future__ import annotations

import sys
from typing import Any

from retrieval_draft.cli.output import print_json

__all__ = ["print_samples"]


def print_samples(drafter: Any, tokenizer: Any, inputs: Any, options: dict[str, Any], json: bool) -> None:
    """Samples and prints texts, a line of dashes between them; or one JSON object.

    Args:
        drafter: A `RetrievalDrafter`.
        tokenizer: Its tokenizer.
        inputs: The prompt, as model inputs.
        options: For `RetrievalDrafter.generate`.
        json: Whether to print JSON.
    """
    out = drafter.generate(**inputs, return_dict_in_generate=True, **options)
    replies = out.sequences[:, inputs["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(replies, skip_special_tokens=True)
    logprobs = getattr(out, "logprobs", None)
    if json:
        samples: list[dict[str, Any]] = [{"text": text} for text in texts]
        for sample, each in zip(samples, logprobs or (), strict=False):
            sample["mean_logprob"] = float(each.mean())
        print_json({"samples": samples, "stats": drafter.last_stats.as_dict()})
        return
    for number, text in enumerate(texts):
        if number:
            print("-" * 20)
        print(text)
    sys.stdout.flush()
