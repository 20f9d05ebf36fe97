"""Dependence of an engine's logits on the batch of a token."""

from __future__ import annotations

from typing import Any

__all__ = ["batch_noise"]

SHAPES = (1, 2, 3, 4, 6, 8, 11, 16, 64)
"""Tokens of a pass. On the CPU llama.cpp rounds activations of quantised models to 8 bits, and the rounding
of a number at the border depends on the order of a sum, which depends on the batch: logits of Gemma 3 270M
(Q4_K_M) move by 0.2 of their standard deviation of 5.4 on average, by 1 to 2 at most."""

LAST = 48
"""Number of tokens at the end that are put into passes of these sizes; the others come first, in one."""


def batch_noise(llama: Any, text: list[int], first: int, second: int) -> tuple[float, float]:
    """Lead of one token's logit over another's after a text, and its variation with the batch.

    Args:
        llama: An engine with the logits of all positions. Its text is lost.
        text: Token ids.
        first: The token that plain decoding chose.
        second: The other one.

    Returns:
        The least lead of `first` over all shapes of passes, 0 if `second` leads in any; and the range of the
        leads.
    """
    leads = []
    for size in SHAPES:
        llama.reset()
        head = text[: max(0, len(text) - LAST)]
        if head:
            llama.eval(head)
        tail = text[len(head) :]
        for at in range(0, len(tail), size):
            llama.eval(tail[at : at + size])
        logits = llama.scores[llama.n_tokens - 1]
        leads.append(float(logits[first]) - float(logits[second]))
    return max(min(leads), 0.0), max(leads) - min(leads)
